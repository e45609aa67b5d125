"""How the command ends when something goes wrong: one line on stderr, and a code scripts can branch on."""

from __future__ import annotations

from services.common.errors import MultiloraError

EXIT_OTHER = 1

EXIT_CODES = {
    "NOT_FOUND": 3,
    "INVALID_ARGUMENT": 4,
    "FAILED_PRECONDITION": 4,
    "ALREADY_EXISTS": 4,
    "UNIMPLEMENTED": 4,
    "UNAVAILABLE": 5,
    "DEADLINE_EXCEEDED": 5,
    "CANCELLED": 5,
    "RESOURCE_EXHAUSTED": 6,
    "UNAUTHENTICATED": 7,
    "PERMISSION_DENIED": 7,
}

EXIT_CODES_HELP = """\
\b
Exit codes:
  0  done
  1  anything not named below, such as a fault of the server
  2  wrong usage
  3  not found
  4  invalid, or does not fit what is there
  5  the service is away, or the time was up
  6  full; try again later
  7  not allowed, or not known who asks
  130  interrupted
"""


def exit_code(error: MultiloraError) -> int:
    return EXIT_CODES.get(error.code, EXIT_OTHER)


def one_line(error: MultiloraError) -> str:
    """What is wrong, what to do, and the stable reason in brackets."""
    again = "" if error.retry_after is None else f"; try again in {error.retry_after:g} s"
    return f"{' '.join(error.message.split())}{again} [{error.reason}]"

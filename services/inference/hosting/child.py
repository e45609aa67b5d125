"""The engine's process: `python -m services.inference.hosting.child FD`, started by `ProcessHost` and by nobody else.

It lives as long as the socket `FD`: the end of the face's process, however it came, is the end of this one.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from services.common.errors import MultiloraError
from services.common.process import settle
from services.inference.config import LOG_FORMAT, ConfigError
from services.inference.engine.messages import AdapterReply, EngineInput, EngineOutput, RequestOutput
from services.inference.hosting.wire import Start, Started, encode, portable, receive

log = logging.getLogger(__name__)

EXIT_ORPHANED = 1


def run(connection: socket.socket) -> None:
    """Build the engine that the first frame asks for, say how that went, and run it to its end."""
    messages = receive(connection)
    start = next(messages, None)
    if not isinstance(start, Start):
        return
    logging.basicConfig(level=start.log_level, format=LOG_FORMAT)
    inbox: queue.SimpleQueue[EngineInput] = queue.SimpleQueue()
    threading.Thread(target=_take_in, args=(messages, inbox), name="inbox", daemon=True).start()
    try:
        engine = start.build(inbox)
    except Exception as error:
        if not isinstance(error, ConfigError | MultiloraError):
            log.exception("the engine was not built")
        connection.sendall(encode(Started(portable(error))))
        return
    settle()
    connection.sendall(encode(Started()))
    engine.emit = lambda outputs: connection.sendall(encode(list(map(_portable, outputs))))
    engine.run()


def _take_in(messages: Iterator[Any], inbox: queue.SimpleQueue[EngineInput]) -> None:
    for message in messages:
        inbox.put(message)
    os._exit(EXIT_ORPHANED)  # at once, from whatever step: nobody is left to hear of it


def _portable(output: EngineOutput) -> EngineOutput:
    if isinstance(output, AdapterReply) and output.error is not None:
        return replace(output, error=portable(output.error))
    if isinstance(output, RequestOutput) and output.finished is not None and output.finished.error is not None:
        return output._replace(finished=replace(output.finished, error=portable(output.finished.error)))
    return output


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the face is asked to end, and ends this process with it
    run(socket.socket(fileno=int(sys.argv[1])))

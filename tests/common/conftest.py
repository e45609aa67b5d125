"""Settings for the tests of what both services share."""

from __future__ import annotations

from hypothesis import settings

# No example may fail for being slow: other work runs on the same cores. What hangs meets the test's own timeout.
settings.register_profile("multilora", deadline=None)
settings.load_profile("multilora")

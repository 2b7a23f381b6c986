"""Whose fault a failure is: of this process, or of one that it was connected with.

May import level 0 and `run`.
"""

from __future__ import annotations

import re
import socket

from jaxtrainer.errors import DistributedError
from jaxtrainer.run import Run

# As XLA says it, in a ValueError from a step that was compiled ahead of time.
_OF_THE_NETWORK = re.compile(
    "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): "
)


def may_follow(error: BaseException) -> bool:
    """Return whether an exception may be what comes of the end of another process."""
    return isinstance(error, DistributedError) or _OF_THE_NETWORK.match(str(error)) is not None


def failure(name: str, run: Run, error: BaseException) -> str:
    """Return the sentence about a process that an exception has ended a call of."""
    return f"{name} failed in step {run.global_step} of {run.stage}: {line_of(error)}"


def line_of(error: BaseException) -> str:
    """Return an exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def is_refused(address: str | None) -> bool:
    """Return whether nobody listens at `host:port`, on a host that can be reached."""
    host, _, port = (address or ":0").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False

"""Lines through pipes whose other end may hang: no call blocks beyond its deadline."""

import os
import selectors
import time


def write_by(deadline: float, descriptor: int, data: bytes) -> bool:
    """Write all of it; False if nobody has read it by the deadline (monotonic) or ever will.

    The descriptor must not block.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            if not _wait(deadline, descriptor, selectors.EVENT_WRITE):
                return False
        except BrokenPipeError:
            return False
    return True


def read_line_by(deadline: float, descriptor: int) -> bytes | None:
    """The next line, None if it is not whole by the deadline, empty if the writer has gone.

    Reads past the line's end: there may be nothing behind it.
    """
    received = b""
    while not received.endswith(b"\n"):
        if not _wait(deadline, descriptor, selectors.EVENT_READ):
            return None
        chunk = os.read(descriptor, 65536)
        if not chunk:
            return b""
        received += chunk
    return received


def _wait(deadline: float, descriptor: int, event: int) -> bool:
    # poll, not select: beside a rollout engine descriptors pass 1024.
    with selectors.PollSelector() as selector:
        selector.register(descriptor, event)
        return bool(selector.select(max(0.0, deadline - time.monotonic())))

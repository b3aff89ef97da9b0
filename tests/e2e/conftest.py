"""Lets forked ranks start fast."""

import gc
import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage() -> Iterator[None]:
    """vLLM collects garbage several times while it starts. In a forked rank each time would walk
    (and so copy) everything that the parent has imported: seconds instead of a tenth."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _interrupts_are_heard() -> None:
    """A shell that started the tests in the background ignores SIGINT for them, and so would every
    program that they start: it keeps what it is told to ignore."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

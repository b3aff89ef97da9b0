"""Importing Megatron-Core in less time."""

import contextlib
import importlib
import sys
from collections.abc import Iterator


def import_megatron() -> None:
    """Import `megatron.core` without wandb, which it would import for its own loggers alone.

    Those are not used here, and wandb takes a quarter of the time that a rank needs to start. Call
    before anything else imports it; `import wandb` works as usual afterwards.
    """
    with _hidden("wandb"):
        importlib.import_module("megatron.core")


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    if name in sys.modules:
        yield
        return
    # What stands for a module that cannot be imported.
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]

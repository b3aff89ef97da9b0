"""The state of every random number generator of this process, as text."""

# Nothing in training draws from them: samples, data order and initial weights have generators of
# their own, seeded by what they are for. They are kept for the code of others, which might.

import base64
import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """Python's, numpy's and torch's generators, JSON-able."""
    _name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": json.dumps(random.getstate()),
        "numpy": [_text(np.asarray(keys).tobytes()), int(position), int(has_gauss), float(gauss)],
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state().numpy().tobytes())
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Continue from `rng_state` of a process on the same kind of device."""
    version, internal, gauss_next = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    drawn = np.frombuffer(base64.b64decode(keys), dtype=np.uint32)
    np.random.set_state(("MT19937", drawn, position, has_gauss, gauss))
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

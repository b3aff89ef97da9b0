"""Tells two sets of weights of one shape apart, without reading all of them."""

import hashlib
from pathlib import Path
from typing import Final

import torch

from osft_mcore.weights.safetensors_io import read_hf_index
from osft_mcore.weights.safetensors_read import read_header, read_rows

NUM_ROWS: Final = 4
"""Of every tensor, evenly spaced, the first and the last among them."""


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256 of some rows of every tensor of a Hugging Face folder, with name, dtype and shape.

    The same however the tensors are spread over files. Training changes every row of some tensor,
    so that another model shows; a change of a few other rows does not.
    Raises ConfigError or WeightError as `read_hf_index` does.
    """
    index = read_hf_index(folder)
    headers = {path: read_header(path) for path in sorted(set(index.values()))}
    digest = hashlib.sha256()
    for name, path in sorted(index.items()):
        stored = headers[path][name]
        digest.update(repr((name, stored.dtype, stored.shape)).encode())
        last = stored.shape[0] - 1
        for row in sorted({last * i // (NUM_ROWS - 1) for i in range(NUM_ROWS)}):
            values = read_rows(path, stored, row, row + 1)
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

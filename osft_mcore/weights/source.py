"""Where the rows of weights can be read from, whatever the format of the files."""

from typing import Protocol

import torch
from torch import Tensor

from osft_mcore.weights.layout import Layouts
from osft_mcore.weights.plan import Copy


class WeightSource(Protocol):
    """A checkpoint on disk. Its parameters are spread over shards, numbered from 0."""

    @property
    def layouts(self) -> Layouts:
        """Shard -> parameter -> which rows of which Hugging Face tensors it holds."""
        ...

    def dtype(self, shard: int, param: str) -> torch.dtype:
        """Dtype of a parameter in the file."""
        ...

    def rows(self, copy: Copy) -> Tensor:
        """The rows that `copy` takes from its source, in the file's dtype.

        Raises WeightError if the file does not have them.
        """
        ...

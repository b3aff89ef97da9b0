"""Keeps libraries from talking between the lines of the table; imports none of them."""

import logging
import warnings


def silence_libraries() -> None:
    """Call before Megatron-Core and vLLM are imported: both tell at once what they lack."""
    warnings.simplefilter("ignore")
    for name in ("megatron", "vllm", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)

"""The table of kernels: what it says follows from what is installed."""

from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

from osft_mcore.model.kernels import Installed, installed, kernels_in_use

PARTS = ["linear layers", "attention", "norms", "rope", "adam", "cross-entropy"]


def chosen(*, cuda: bool, engine: bool, adam: str) -> dict[str, tuple[str, str]]:
    found = Installed(cuda=cuda, transformer_engine=engine, adam=adam)
    table = kernels_in_use(found)
    assert [kernel.part for kernel in table] == PARTS
    return {kernel.part: (kernel.choice, kernel.why) for kernel in table}


def test_without_cuda_everything_is_torch_and_says_so() -> None:
    # Transformer Engine alone does not help: its kernels need the device.
    for engine in (False, True):
        table = chosen(cuda=False, engine=engine, adam="torch")
        assert {choice.split()[0].rstrip(",") for choice, _ in table.values()} == {"torch"}
        assert table["attention"] == ("torch scaled_dot_product_attention", "no CUDA device")
        assert table["rope"][1] == table["norms"][1] == "no CUDA device"


def test_with_cuda_transformer_engine_decides() -> None:
    table = chosen(cuda=True, engine=True, adam="transformer_engine")
    for part in ("linear layers", "attention", "norms", "rope"):
        assert table[part][0].startswith("Transformer Engine"), part
        assert table[part][1] == "installed, with a CUDA device"
    assert table["adam"][0] == "Transformer Engine FusedAdam"
    without = chosen(cuda=True, engine=False, adam="apex")
    assert without["attention"][1] == "transformer_engine is not installed"
    assert without["adam"][0] == "apex FusedAdam"


def test_this_machine_is_described_by_what_megatron_took() -> None:
    assert (installed().adam == "torch") == USING_PYTORCH_OPTIMIZER

"""The conversion tools as programs: exit codes, memory, and what transformers makes of it all."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import convert_hf_to_mcore
import convert_mcore_to_hf
import pytest
import reshard_checkpoint
import torch
import verify_checkpoint
from models import save_random_model
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
SINGLE = "model.safetensors"


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / f"{tool}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def done(tool: str, *arguments: object) -> str:
    finished = run(tool, *arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def peak_mib(output: str) -> int:
    (found,) = re.findall(r"^peak memory: (\d+) MiB above the program itself$", output, re.M)
    return int(found)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A third of the model would be too much; its largest tensor is a twenty-fifth."""
    hf, mcore, back, again = (tmp_path / name for name in ("hf", "mcore", "back", "again"))
    size = ["--gib", "0.2", "--hidden", "512", "--vocab", "8000", "--shard-gib", "4"]
    done("make_synthetic_model", "--out", hf, *size)
    model_mib = (hf / SINGLE).stat().st_size >> 20
    assert model_mib > 190
    torch_dist = tmp_path / "torch_dist"
    one = ["--tp", "1", "--pp", "1"]
    peaks = [
        peak_mib(output)
        for output in (
            done("convert_hf_to_mcore", "--hf", hf, "--out", mcore, "--tp", 2),
            done("reshard_checkpoint", "--mcore", mcore, "--out", again, *one),
            done("convert_mcore_to_hf", "--mcore", again, "--out", back),
            done("convert_hf_to_mcore", "--hf", hf, "--out", torch_dist, "--format", "torch_dist"),
            done("verify_checkpoint", torch_dist, "--hf", back),
        )
    ]
    assert max(peaks) < model_mib / 3, peaks
    ours, theirs = load_file(back / SINGLE), load_file(hf / SINGLE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_the_printed_memory_is_what_was_used() -> None:
    code = (
        "from osft_mcore.checkpoint.command import run_tool\n"
        "run_tool('x', lambda _: len(bytearray(b'1') * 200_000_000) * 0)"
    )
    # A large parent must not count.
    ballast = bytearray(b"1") * 400_000_000
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert len(ballast) == 400_000_000
    assert 190 <= peak_mib(finished.stdout) <= 250


def test_no_conversion_imports_what_needs_a_gpu() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tools')\n"
        "import convert_hf_to_mcore, convert_mcore_to_hf, reshard_checkpoint, verify_checkpoint\n"
        "heavy = {'megatron', 'transformer_engine', 'vllm', 'transformers', 'triton'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert finished.returncode == 0, finished.stderr


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a tool in this process."""

    def called(tool: ModuleType, *arguments: object) -> int:
        monkeypatch.setattr("sys.argv", [f"{tool.__name__}.py", *map(str, arguments)])
        code: int = tool.main()
        return code

    return called


def test_a_conversion_and_its_verification(
    tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save_random_model(tmp_path / "hf", "qwen3", tied=True, vocab=129, layers=4)
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    (hf / "outside").symlink_to("/etc/hostname")
    mcore, other = tmp_path / "mcore", tmp_path / "pp2"
    assert call(convert_hf_to_mcore, "--hf", hf, "--out", mcore, "--tp", 2) == 0
    output = capsys.readouterr().out
    assert "carried along: chat_template.jinja, config.json" in output
    assert "left out: outside (a link out of the folder, to /etc/hostname)" in output
    assert re.search(r"^tensors \d+/\d+ ", output, re.M)
    layout = ["--tp", 1, "--pp", 2, "--vpp", 2]
    assert call(reshard_checkpoint, "--mcore", mcore, "--out", other, *layout) == 0
    back = tmp_path / "back"
    bf16 = ["--dtype", "bf16", "--max-shard-gib", "0.0001"]
    assert call(convert_mcore_to_hf, "--mcore", other, "--out", back, *bf16) == 0
    assert len(list(back.glob("model-*.safetensors"))) > 1
    assert call(verify_checkpoint, back) == 0
    assert call(verify_checkpoint, back, "--hf", hf) == 4
    assert "FAILED equal to" in capsys.readouterr().out


def test_logits_are_those_of_transformers(tmp_path: Path, call: Callable[..., int]) -> None:
    hf, mcore = tmp_path / "hf", tmp_path / "mcore"
    save_random_model(hf, "qwen3", tied=True, vocab=129, layers=4)
    assert call(convert_hf_to_mcore, "--hf", hf, "--out", mcore, "--tp", 2, "--pp", 2) == 0
    changed = shutil.copytree(hf, tmp_path / "changed")
    tensors = load_file(changed / SINGLE)
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, changed / SINGLE, metadata={"format": "pt"})
    other = save_random_model(tmp_path / "other", "qwen3", tied=True, vocab=130, layers=4)
    bare = tmp_path / "bare"
    to_bare = ["--hf", hf, "--out", bare, "--format", "torch_dist"]
    assert call(convert_hf_to_mcore, *to_bare) == 0
    shutil.rmtree(bare / "model")
    (bare / "manifest.json").unlink()
    # In a process of its own, because it makes a world; again, because it takes it down again.
    code = (
        "import sys; sys.path.insert(0, 'tools'); import verify_checkpoint as tool\n"
        f"sys.argv = ['tool', {str(mcore)!r}, '--logits']\n"
        "print('code', tool.main())\n"
        f"for hf in {[str(changed), str(other)]}:\n"
        "    sys.argv[3:] = ['--hf', hf]\n"
        "    print('code', tool.main())\n"
        f"sys.argv[1:] = [{str(hf)!r}, '--logits', '--hf', {str(changed)!r}]\n"
        "print('code', tool.main())\n"
        f"sys.argv[1:] = [{str(bare)!r}, '--logits', '--hf', {str(hf)!r}]\n"
        "print('code', tool.main())\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    good, bad, foreign, original, borrowed, _ = re.split(
        r"^code [04]\n", finished.stdout, flags=re.M
    )
    assert re.findall(r"^code (\d)$", finished.stdout, re.M) == ["0", "4", "4", "4", "0"]
    own = "against transformers on this checkpoint's own weights; --hf compares with the original"
    assert re.search(rf"^ok logits: largest difference \d.* {own}$", good, re.M)
    assert "FAILED" not in good
    against = re.escape(f"against transformers on {changed}, at most 0.0001 is rounding")
    for output in (bad, original):
        assert re.search(rf"^FAILED logits: largest difference \d.* {against}$", output, re.M)
    assert f"FAILED logits: --hf: {other} has a vocabulary of 130, {mcore} one of 129" in foreign
    assert re.search(rf"^ok logits: .* transformers on {re.escape(str(hf))}$", borrowed, re.M)
    assert re.search(r"^FAILED equal to .*: model.norm.weight differs", bad, re.M)
    assert bad.count("FAILED") == 2


def test_mistakes_are_told_without_a_traceback(
    tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    nothing, out = tmp_path / "nothing", tmp_path / "out"
    assert call(convert_hf_to_mcore, "--hf", nothing, "--out", out, "--vpp", 2) == 2
    assert capsys.readouterr().err.startswith("convert_hf_to_mcore.py: ConfigError\n  - --hf: no")
    assert call(convert_mcore_to_hf, "--mcore", nothing, "--out", out) == 2
    assert "nothing is not a folder" in capsys.readouterr().err
    assert call(reshard_checkpoint, "--mcore", nothing, "--out", out, "--tp", 1, "--pp", 1) == 2
    assert call(verify_checkpoint, nothing) == 2
    assert list(tmp_path.iterdir()) == []

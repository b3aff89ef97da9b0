"""`osft doctor` as a process, with real ranks."""

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from program import Outcome, as_rank, forked, no_process_left, outcome, started
from toy_run import write_start

# Forked children find it loaded.
import osft_mcore.doctor.examine  # noqa: F401

MODULE = (sys.executable, "-m", "osft_mcore.cli")
CONFIG = 2
PLANTED = "hf_" + "Planted0" * 5


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def sections(result: Outcome) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    title = ""
    for line in result.out.splitlines():
        if line.startswith("  "):
            found[title].append(line.strip())
        else:
            title = line
            found[title] = []
    return found


def test_a_machine_in_order(tmp_path: Path) -> None:
    """Two ranks ping each other on this machine; nothing is written, no secret is shown."""
    with no_process_left():
        result = outcome(
            started(["doctor"], tmp_path, {"HF_TOKEN": PLANTED}, program=MODULE), timeout_s=240
        )
    assert result.code == 0, result
    found = sections(result)
    assert list(found) == [
        "versions", "kernels", "devices", "network", "ports", "disk", "variables", "imports",
        "ping", "training would start",
    ]  # fmt: skip
    versions = dict(line.split() for line in found["versions"] if ":" not in line)
    assert versions["torch"] == version("torch")
    assert [line.split("  ")[0] for line in found["kernels"]] == [
        "linear layers", "attention", "norms", "rope", "adam", "cross-entropy",
    ]  # fmt: skip
    assert "127.0.0.1" in next(line for line in found["network"] if line.startswith("lo "))
    assert "2 ranks (0, 1)" in found["ping"][0]
    assert found["ping"][1].startswith("gloo, rank 0 to ")
    assert "sum of 16 MiB over 2 ranks" in found["ping"][2]
    assert "HF_TOKEN=[redacted]" in found["variables"]
    assert PLANTED not in result.out + result.err
    assert list(tmp_path.iterdir()) == []


def options_of_a_run(folder: Path, output_dir: str) -> list[str]:
    data, model = write_start(folder)
    return [
        "doctor", "--quick", f"model.path={model}", f"data.train={data / 'train.parquet'}",
        f"output_dir={output_dir}", "model.dtype=fp32", "rollout.max_prompt_tokens=16",
        "rollout.max_response_tokens=20", "checkpoint.every=1", "train.prompts_per_step=4",
        "train.prompts_per_update=4",
    ]  # fmt: skip


def test_the_options_of_a_run(tmp_path: Path) -> None:
    """In order, then with an interface that is not there, and data under a name with a password."""
    options = options_of_a_run(tmp_path, str(tmp_path / "out"))
    result = forked(options, tmp_path)
    assert result.code == 0, result
    found = sections(result)
    of_run = found["osft train with these options"]
    assert of_run[0] == "1 ranks: actor tp=1 cp=1 pp=1 vpp=1 dp=1; rollout tp=1"
    assert of_run[1].startswith("a checkpoint takes ")
    assert found["options and files"] == [
        "options, model, tokenizer and data are as the run needs them"
    ]
    assert found["ping"][1] == "gloo: one rank, which spoke to itself"
    assert not (tmp_path / "out").exists()
    planted = {"SOME_SECRET": "planted-secret", "GLOO_SOCKET_IFNAME": "planted-secret"}
    result = forked([*options, "output_dir=planted-secret"], tmp_path, planted)
    assert result.code == CONFIG
    assert "output_dir: found what looks like a password" in result.out
    assert "planted-secret" not in result.out + result.err
    absent = f"data.train=https://user:{PLANTED}@host/x.parquet"
    variables = {"GLOO_SOCKET_IFNAME": "nope0"}
    result = forked([*options, absent, "parallel.tp=3"], tmp_path, variables)
    assert result.code == CONFIG
    assert sections(result)["ping"] == ["note: not tried: problems above come first"]
    assert "  PROBLEM: GLOO_SOCKET_IFNAME: no interface nope0" in result.out
    assert result.out.endswith("training would not start\n")
    assert result.err.startswith("osft: ConfigError\n  - GLOO_SOCKET_IFNAME: no interface nope0")
    problems = sections(result)["options and files"]
    assert any("data.train: 'https:" in line and "is not a file" in line for line in problems)
    assert any("parallel.tp" in line for line in problems)
    assert any("data.train: found what looks like a password" in line for line in problems)
    assert PLANTED not in result.out + result.err


def test_under_torchrun(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    program = (*torchrun, *MODULE[1:])
    with no_process_left():
        result = outcome(started(["doctor", "--quick"], tmp_path, program=program), timeout_s=240)
    assert result.code == 0, result
    found = sections(result)
    assert "2 ranks (0, 1)" in found["ping"][0]
    assert "sum of 16 MiB over 2 ranks" in found["ping"][2]
    assert result.out.endswith("training would start\n")
    assert result.out.count("training would start") == 1
    assert "RANK=0" in found["variables"]


def two_hosts(
    arguments: Sequence[str], folders: Sequence[Path], of_second: Mapping[str, str] | None = None
) -> tuple[Outcome, Outcome]:
    """Two ranks, each the first of a host as they see it, in `folders`; they have one name."""
    places = [
        as_rank(rank, 2)
        | {"MASTER_PORT": str(port), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        # This machine's name may stand for no address that other hosts reach.
        | {"GLOO_SOCKET_IFNAME": "lo"}
        | (of_second if rank and of_second else {})
        for port in [free_port()]
        for rank in range(2)
    ]
    said = folders[1] / "second.json"
    pid = os.fork()
    if pid == 0:
        second = forked(arguments, folders[1], places[1])
        said.write_text(json.dumps([second.code, second.out, second.err]))
        os._exit(0)
    first = forked(arguments, folders[0], places[0])
    os.waitpid(pid, 0)
    code, out, err = json.loads(said.read_text())
    said.unlink()
    return first, Outcome(code=code, out=out, err=err)


def test_hosts_share_the_folder_of_the_run(tmp_path: Path) -> None:
    """A relative folder, in the same place and in two; the file that tells is gone afterwards."""
    options = [*options_of_a_run(tmp_path, "runs/x"), "parallel.dp=2", "train.micro_batch_size=2"]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    apart = two_hosts(options, folders)
    shared = two_hosts(options, folders[:1] * 2)
    assert (apart[0].code, apart[1].code) == (CONFIG, CONFIG), apart
    problem = "output_dir: runs/x is not the folder that rank 0 has under that name"
    assert any(problem in line for line in sections(apart[0])["ping"]), apart[0]
    assert problem in apart[1].err
    assert (shared[0].code, shared[1].code) == (0, 0), shared
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_a_problem_of_one_host_ends_all_ranks_alike(tmp_path: Path) -> None:
    """Both are the first rank of a host, and one host's variable is wrong: nobody waits."""
    wrong = {"GLOO_SOCKET_IFNAME": "nope0"}
    first, second = two_hosts(["doctor", "--quick"], [tmp_path, tmp_path], wrong)
    assert (first.code, second.code) == (CONFIG, CONFIG), (first, second)
    ping = sections(first)["ping"]
    assert any("PROBLEM: " in line and "no interface nope0" in line for line in ping), ping
    assert ping[-1] == "note: not tried: problems above come first"
    assert first.out.endswith("training would not start\n")
    assert (first.err, second.out) == ("", "")
    assert "GLOO_SOCKET_IFNAME: no interface nope0" in second.err


def test_half_a_launcher(tmp_path: Path) -> None:
    result = forked(["doctor"], tmp_path, {"RANK": "0"})
    assert result.code == CONFIG
    assert "WORLD_SIZE, MASTER_ADDR, MASTER_PORT: not set" in result.err

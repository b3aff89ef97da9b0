"""What the facts of a machine mean: judged without the machine."""

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from osft_mcore.config.load import load_config
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import RunConfig
from osft_mcore.doctor import run, verdict
from osft_mcore.doctor.facts import (
    GIB,
    MIB,
    Fabric,
    Finding,
    GpuFound,
    Interface,
    Machine,
    NumaNode,
    Port,
    Section,
    Space,
    TorchDevices,
    errors_of,
    lines_of,
    ranges,
    section_lines,
    without_secrets,
)
from osft_mcore.doctor.gather import memory_limit, numa_nodes, parse_cores, parse_gpus, space
from osft_mcore.doctor.network import fabric, ports
from osft_mcore.errors import ConfigError, DataError

GPU = GpuFound(name="NVIDIA H100", memory=80 * GIB, free=79 * GIB, driver="570.1", numa_node=0)
CPU_TORCH = TorchDevices(version="2.13.0+cpu", cuda_build=None, num_gpus=0)
GPU_TORCH = TorchDevices(version="2.13.0+cu130", cuda_build="13.0", num_gpus=8)
MACHINE = Machine(
    host="one",
    usable_cores=frozenset(range(16)),
    num_cores=16,
    numa=(NumaNode(number=0, cores=frozenset(range(16)), memory=64 * GIB),),
    memory=64 * GIB,
    memory_available=60 * GIB,
    memory_limit=None,
    open_files=1024,
    locked_memory=64 * MIB,
    shm=Space(what="/dev/shm", path="/dev/shm", free=8 * GIB),
    gpus=(),
    interfaces=(
        Interface(name="lo", addresses=("127.0.0.1",), up=True),
        Interface(name="eth0", addresses=("192.0.2.7",), up=True),
        Interface(name="eth1", addresses=(), up=False),
        Interface(name="ib0", addresses=("192.0.2.9",), up=True),
    ),
    fabric=(),
    own_address="192.0.2.7",
    localhost=True,
    ports=(),
    spaces=(),
)
SHAPE = ModelShape(
    model_type="qwen2", vocab=1000, hidden=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=32, ffn=96, tied=False, qkv_bias=True, qk_norm=False, norm_eps=1e-6,
    rope_theta=1e4, rope_scaling=None, max_position=4096, init_std=0.02,
)  # fmt: skip


def problems(section: Section) -> str:
    return "\n".join(section.problems)


def notes(findings: tuple[Finding, ...]) -> str:
    return "\n".join(found.text for found in findings if found.kind == "note")


def devices(
    num_ranks: int = 2, torch: TorchDevices = CPU_TORCH, world_size: int = 2, **changes: Any
) -> Section:
    machine = replace(MACHINE, **changes)
    return verdict.device_section(machine, torch, num_ranks=num_ranks, world_size=world_size)


def network(
    num_hosts: int = 1,
    variables: Mapping[str, str] = {},
    uses_nccl: bool = True,
    **changes: Any,
) -> Section:
    machine = replace(MACHINE, **changes)
    return verdict.network_section(machine, variables, num_hosts=num_hosts, uses_nccl=uses_nccl)


def test_a_machine_in_order_has_no_problem_and_no_note() -> None:
    for section in (devices(), network(), verdict.space_section(MACHINE.spaces)):
        assert not section.problems
        assert not notes(section.findings)
    assert errors_of([devices(), network()]) == ()


@pytest.mark.parametrize(
    ("free", "num_ranks", "found"),
    [(64 * MIB - 1, 1, "64 MiB for 1 ranks"), (511 * MIB, 8, "512 MiB for 8 ranks")],
)
def test_a_small_dev_shm_stops_training(free: int, num_ranks: int, found: str) -> None:
    shm = Space(what="/dev/shm", path="/dev/shm", free=free)
    assert found in problems(devices(num_ranks, shm=shm))
    assert "--shm-size" in problems(devices(num_ranks, shm=shm))
    enough = replace(shm, free=num_ranks * 64 * MIB)
    assert not problems(devices(num_ranks, shm=enough))
    assert "containers usually get" in notes(devices(num_ranks, shm=enough).findings)
    assert "not there" in problems(devices(shm=None))


def test_gpus_that_torch_cannot_use() -> None:
    gone = replace(GPU_TORCH, num_gpus=0)
    assert "the driver is 570.1" in problems(devices(torch=gone, gpus=(GPU,)))
    assert not problems(devices(torch=GPU_TORCH, gpus=(GPU,)))
    # A build for CPUs was somebody's choice.
    assert not problems(devices(gpus=(GPU,)))
    assert "requirements.txt" in notes(devices(gpus=(GPU,)).findings)
    assert "requirements-cpu.txt" in notes(devices(torch=gone).findings)


def test_what_is_only_slow_is_a_note() -> None:
    halves = [frozenset(range(8)), frozenset(range(8, 16))]
    numa = tuple(NumaNode(number=n, cores=half, memory=GIB) for n, half in enumerate(halves))
    assert "several NUMA nodes" in notes(devices(numa=numa).findings)
    assert not notes(devices(numa=numa, usable_cores=halves[1]).findings)
    apart = (GPU, replace(GPU, numa_node=1, free=20 * GIB))
    found = devices(torch=GPU_TORCH, gpus=apart)
    assert "GPUs are on NUMA nodes 0-1" in notes(found.findings)
    assert "60.0 GiB of this GPU are in use" in notes(found.findings)
    assert not found.problems


def test_little_memory_stops_training() -> None:
    assert "1.9 GiB available" in problems(devices(memory_available=int(1.9 * GIB)))
    lines = list(section_lines(devices(memory_limit=4 * GIB)))
    assert any("the container or job may use 4.0 GiB" in line for line in lines)


def test_limits_of_a_process() -> None:
    assert not notes(devices(world_size=48).findings)
    assert "ulimit -n: 1024 open files, and a rank of 64" in notes(devices(world_size=64).findings)
    fabric_found = (Fabric(name="mlx5_0 port 1", state="ACTIVE"),)
    assert "ulimit -l: 64 MiB can be pinned" in notes(devices(fabric=fabric_found).findings)
    assert not notes(devices(fabric=fabric_found, locked_memory=math.inf).findings)


def test_the_tightest_limit_of_a_job_counts(tmp_path: Path) -> None:
    """A Slurm job's group is below the root, and a step's below the job's; files are given up."""
    membership = tmp_path / "cgroup"
    root = tmp_path / "fs"
    assert memory_limit(root, membership) == (None, None)
    job = root / "job_1"
    step = job / "step_0"
    step.mkdir(parents=True)
    membership.write_text("0::/job_1/step_0\n")
    for group, most, used, cached in ((step, "max", 5, 0), (job, str(8 * GIB), 6 * GIB, GIB)):
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    assert memory_limit(root, membership) == (8 * GIB, 3 * GIB)
    # The older layout, whose stat has a group's own figures and those of all below.
    old = root / "memory" / "job_1"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(f"{4 * GIB}\n")
    (old / "memory.usage_in_bytes").write_text(f"{3 * GIB}\n")
    (old / "memory.stat").write_text(f"inactive_file 0\ntotal_inactive_file {GIB}\n")
    membership.write_text("5:cpuset:/x\n4:memory:/job_1\n0::/\n")
    assert memory_limit(root, membership) == (4 * GIB, 2 * GIB)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"GLOO_SOCKET_IFNAME": "eth0,ib0"}, ""),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "no interface eth on this host"),
        ({"GLOO_SOCKET_IFNAME": "eth1"}, "'eth1', which is down; up are: lo, eth0, ib0"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, ""),
        ({"NCCL_SOCKET_IFNAME": "=eth1"}, "'=eth1', which is down"),
        ({"NCCL_SOCKET_IFNAME": "bond"}, "no interface bond on this host"),
        ({"GLOO_SOCKET_IFNAME": ""}, ""),
    ],
)
def test_an_interface_that_a_variable_names_is_there(variables: dict[str, str], found: str) -> None:
    said = problems(network(variables=variables))
    assert found in said
    assert bool(said) == bool(found)


def test_ranks_on_a_cpu_do_not_heed_what_is_for_nccl() -> None:
    assert not problems(network(variables={"NCCL_SOCKET_IFNAME": "bond"}, uses_nccl=False))


def test_other_hosts_do_not_reach_the_loopback_interface() -> None:
    assert not problems(network(own_address="127.0.1.1"))
    assert "other hosts cannot reach it" in problems(network(2, own_address="127.0.1.1"))
    named = {"GLOO_SOCKET_IFNAME": "eth0"}
    assert not problems(network(2, named, own_address="127.0.1.1"))


def test_names_and_fabric() -> None:
    assert "localhost: the name stands for no address" in problems(network(localhost=False))
    down = (Interface(name="lo", addresses=("127.0.0.1",), up=False), *MACHINE.interfaces[1:])
    assert "ip link set lo up" in problems(network(interfaces=down))
    assert "GLOO_SOCKET_IFNAME" in notes(network(own_address="").findings)
    ports_found = (Fabric(name="mlx5_0 port 1", state="DOWN"),)
    assert "mlx5_0 port 1 while it is DOWN" in notes(network(fabric=ports_found).findings)


def test_ports() -> None:
    """osft without a launcher does not look at MASTER_PORT, which clusters export to every job."""
    taken = Port(what="MASTER_PORT", text="29501", trouble="Address already in use")
    found = verdict.port_section(replace(MACHINE, ports=(taken,)))
    assert not found.problems
    assert "MASTER_PORT 29501 on 127.0.0.1: Address already in use" in notes(found.findings)
    none_left = replace(taken, what="any port", text="0")
    assert "no port" in problems(verdict.port_section(replace(MACHINE, ports=(none_left,))))


def test_the_rendezvous_port_is_tried_on_loopback() -> None:

    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1])
        found = {port.what: port for port in ports({"MASTER_PORT": number}, launched=False)}
        assert "in use" in found["MASTER_PORT"].trouble
        assert found["any port"].trouble == ""
        # The ranks' own store is there.
        assert len(ports({"MASTER_PORT": number}, launched=True)) == 1
    (_, wrong, _) = ports({"MASTER_PORT": "http"}, launched=False)
    assert wrong.trouble == "expected a number from 1 to 65535"


def test_a_full_disk_stops_training(small_disk: Path) -> None:
    found = verdict.space_section([space("output folder", small_disk / "runs" / "new")])
    assert "free, the disk is full; make room" in problems(found)
    assert "output_dir" in problems(found)
    cache = replace(space("Hugging Face cache", small_disk), needed=False)
    assert not verdict.space_section([cache]).problems


def test_disks_that_take_no_file() -> None:
    room = Space(what="temporary files", path="/x", free=GIB)
    assert not verdict.space_section([room]).problems
    for change in ({"has_names": False}, {"writable": False}, {"free": -1}):
        assert "TMPDIR" in problems(verdict.space_section([replace(room, **change)]))


def test_secrets_are_not_shown() -> None:
    planted = "Zq81planted" * 4
    variables = {
        "HF_TOKEN": planted,
        "WANDB_API_KEY": planted,
        "NCCL_DEBUG": "INFO",
        "VLLM_PROXY": f"http://user:{planted}@host/",
        "MY_PASSWORD": planted,
        "VLLM_AUTH": "known by its name alone",
        "TORCHELASTIC_RUN_ID": "x",
    }
    text = "\n".join(section_lines(verdict.variable_section(variables, num_cores=4, num_ranks=2)))
    assert planted not in text
    assert "by its name" not in text
    assert "NCCL_DEBUG=INFO" in text
    assert "HF_TOKEN=[redacted]" in text
    assert "TORCHELASTIC" not in text
    # In problems, and in errors of others, too.
    url = f"data.train: 'https://user:{planted}@host/x' is not a file"
    for error in (ConfigError(url), DataError(url)):
        shown = without_secrets(error)
        assert type(shown) is type(error)
        assert planted not in f"{shown}{lines_of(error)}"
    found = Section(title="x", findings=(Finding(kind="problem", text=url),))
    assert planted not in str(errors_of([found])[0])
    assert "is not a file" in "\n".join(section_lines(found))
    assert planted not in "\n".join(section_lines(found))


def test_threads_that_wait_for_each_other() -> None:
    def said(threads: str, num_ranks: int) -> str:
        variables = {"OMP_NUM_THREADS": threads}
        return notes(verdict.variable_section(variables, num_cores=8, num_ranks=num_ranks).findings)

    assert "4 in 4 ranks on 8 cores" in said("4", 4)
    assert not said("4", 2)


def test_files_of_the_kernel(tmp_path: Path) -> None:
    assert parse_cores("0-2,8\n") == {0, 1, 2, 8}
    assert parse_cores("\n") == frozenset()
    assert ranges([8, 0, 1, 2]) == "0-2,8"
    node = tmp_path / "node1"
    node.mkdir()
    (node / "cpulist").write_text("4-5\n")
    (node / "meminfo").write_text("Node 1 MemTotal:  1024 kB\nNode 1 MemFree: 1 kB\n")
    assert numa_nodes(tmp_path) == (
        NumaNode(number=1, cores=frozenset({4, 5}), memory=1024 * 1024),
    )
    state = tmp_path / "mlx5_0" / "ports" / "1" / "state"
    state.parent.mkdir(parents=True)
    state.write_text("4: ACTIVE\n")
    assert fabric(tmp_path) == (Fabric(name="mlx5_0 port 1", state="ACTIVE"),)


BUS = "00000000:1B:00.0"
SAID = "".join(
    f"{number}, GPU-{letter * 4}-1, NVIDIA H100, 81559, {80000 + number}, 570.1, {BUS}\n"
    for number, letter in enumerate("abc")
)


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        (None, [0, 1, 2]), ("1", [1]), ("2,0", [0, 2]), ("GPU-bbbb", [1]), ("", []), ("-1", []),
        ("MIG-aaaa", []), ("7", [0, 1, 2]),
    ],
)  # fmt: skip
def test_gpus_that_a_run_does_not_see_do_not_count(visible: str | None, numbers: list[int]) -> None:
    found = parse_gpus(f"{SAID}[N/A]\n", {BUS: 1}, visible)
    assert [gpu.free // MIB - 80000 for gpu in found] == numbers
    assert all((gpu.memory, gpu.numa_node) == (81559 * MIB, 1) for gpu in found)


def test_a_size_that_the_driver_does_not_tell_is_no_size() -> None:
    unknown = SAID.replace("81559", "[N/A]", 1)
    gpus = parse_gpus(unknown, {}, "0")
    assert [(gpu.memory, gpu.free) for gpu in gpus] == [(0, 0)]
    found = devices(torch=GPU_TORCH, gpus=gpus)
    assert "GPU: NVIDIA H100, memory not told, driver 570.1" in "\n".join(section_lines(found))
    assert not notes(found.findings)
    assert of_gpus(gpus) == []
    assert of_gpus((*gpus, GPU)) == of_gpus((GPU,)) != []


def of_run(config: RunConfig, *, num_gpus: int, launched: int | None = None) -> Section:
    start = run.Start(num_gpus=num_gpus, num_cores=4, launched=launched)
    return Section(title="run", findings=tuple(run.rank_findings(config, "train", start)))


def test_a_rank_needs_a_gpu_of_its_own() -> None:
    config = load_config(["parallel.tp=4", "parallel.dp=4"])
    assert "16 ranks on a host with 8 GPUs" in problems(of_run(config, num_gpus=8))
    assert "torchrun on 2 hosts" in problems(of_run(config, num_gpus=8))
    assert not problems(of_run(config, num_gpus=16))
    assert not problems(of_run(config, num_gpus=8, launched=8))
    assert "16 ranks on 4 cores" in notes(of_run(config, num_gpus=16).findings)
    on_cpu = of_run(config, num_gpus=0)
    assert not on_cpu.problems
    assert "16 ranks on 4 cores" in notes(on_cpu.findings)


def test_a_checkpoint_has_room(small_disk: Path) -> None:
    config = load_config([f"output_dir={small_disk / 'run'}", "checkpoint.every=5"])

    def said(config: RunConfig, shape: ModelShape = SHAPE) -> Section:
        return Section(title="run", findings=tuple(run.disk_findings(config, "train", shape)))

    # bf16 weights, and three times fp32 for the optimizer; the vocabulary is padded to 1024.
    padded = replace(SHAPE, vocab=1024).num_parameters
    assert run.disk_of(config, "train", SHAPE).checkpoint == padded * 14
    assert 2 * MIB < padded * 14 < 3 * MIB
    assert not said(config).problems
    assert "all that the run keeps at once" in notes(said(config).findings)
    large = replace(SHAPE, vocab=10 * SHAPE.vocab)
    assert "a checkpoint takes" in problems(said(config, large))
    assert "output_dir" in problems(said(config, large))
    without = load_config([f"output_dir={small_disk / 'run'}"])
    assert not said(without, large).problems
    assert "for the end of the run" in notes(said(without, large).findings)


def of_gpus(
    gpus: tuple[GpuFound, ...],
    shape: ModelShape = SHAPE,
    *,
    num_ranks: int = 1,
    options: Sequence[str] = (),
    **changes: Any,
) -> list[Finding]:
    config = load_config(["train.prompts_per_step=4", "train.prompts_per_update=4", *options])
    machine = replace(MACHINE, gpus=gpus, **changes)
    return list(run.gpu_findings(config, "train", shape, machine, num_ranks=num_ranks))


def test_gpu_memory() -> None:
    def said(gpu: GpuFound, shape: ModelShape = SHAPE) -> Section:
        return Section(title="run", findings=tuple(of_gpus((gpu,), shape)))

    assert not said(GPU).problems
    assert not notes(said(GPU).findings)
    # rollout.gpu_memory_utilization is 0.5.
    assert "39.0 GiB free" in problems(said(replace(GPU, free=39 * GIB)))
    large = replace(SHAPE, hidden=8192, num_heads=64, num_kv_heads=8, head_dim=128, ffn=28672)
    certain = replace(large, num_layers=80)
    assert "weights, gradients and optimizer take" in problems(said(GPU, certain))
    # 3 layers: what is known fits, the estimate does not.
    close = said(GPU, replace(large, num_layers=3))
    assert not close.problems
    assert "by that estimate it does not fit" in notes(close.findings)


def test_host_memory_of_copies() -> None:
    """Offloaded optimizer state and a save of a bf16 model: 12 and 2 bytes a parameter."""
    size = 14 * replace(SHAPE, vocab=1024).num_parameters

    def said(available: int) -> str:
        found = of_gpus(
            (GPU,), num_ranks=8, options=["train.offload=optimizer"], memory_available=available
        )
        return notes(tuple(found))

    assert "of the 8 ranks here" in said(8 * size - 1)
    assert not said(8 * size)


def test_snapshots_in_memory() -> None:
    options = ["evaluation.mode=async", "evaluation.snapshots=/dev/shm", "model.dtype=bf16"]
    size = 2 * 2 * SHAPE.num_parameters

    def said(options: list[str], free: int) -> str:
        found = tuple(run.shm_findings(load_config(options), "train", SHAPE, free))
        return notes(found)

    assert "2 sets of weights" in said(options, size - 1)
    assert not said(options, size)
    assert not said(["evaluation.mode=async"], 0)

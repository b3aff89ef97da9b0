"""What a machine's facts mean for training; pure."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from osft_mcore.doctor.facts import (
    GIB,
    MIB,
    Finding,
    Machine,
    Port,
    Section,
    Space,
    TorchDevices,
    fact,
    gib,
    note,
    problem,
    ranges,
)
from osft_mcore.log.redact import redacted
from osft_mcore.parallel.network import GLOO, NCCL, interface_problem, reach_problem

SHM_PER_RANK: Final = 64 * MIB
"""Buffers of NCCL, gloo and vLLM, which end the ranks where they do not fit. A container that was
not given more has 64 MiB in all."""
SHM_USUAL: Final = GIB
LEAST_FREE: Final = 64 * MIB
"""A disk with less is full: logs, metrics and compiled code have to go somewhere."""
LEAST_MEMORY: Final = 2 * GIB
FILES: Final = 256
FILES_PER_RANK: Final = 16
"""Open files of a rank: libraries and weights, and sockets to all ranks, in several groups."""
SHOWN_VARIABLES: Final = (
    "CUDA_", "CUBLAS_", "GLOO_", "HF_", "HUGGING_FACE_", "KMP_", "MASTER_", "MKL_", "NCCL_",
    "NVTE_", "NVIDIA_", "OMP_", "OSFT_", "PYTORCH_", "SLURM_JOB_", "TORCH", "TRANSFORMERS_",
    "VLLM_", "WANDB_",
)  # fmt: skip
"""Variables whose names begin so."""
UNTOLD: Final = "TORCHELASTIC_"
"""What torchrun tells its ranks, and people do not set."""
OF_RANKS: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def device_section(
    found: Machine, torch: TorchDevices, *, num_ranks: int, world_size: int
) -> Section:
    """Cores, memory and GPUs; `num_ranks` of a run are on this host."""
    return Section(
        title="devices",
        findings=(
            *_cores(found),
            *_memory(found, num_ranks),
            *_limits(found, world_size),
            *_gpus(found, torch),
        ),
    )


def _cores(found: Machine) -> Iterator[Finding]:
    usable = found.usable_cores
    yield fact(f"cores: {len(usable)} of {found.num_cores} usable ({ranges(usable)})")
    for node in found.numa:
        here = usable & node.cores
        yield fact(
            f"NUMA node {node.number}: cores {ranges(node.cores)}, {gib(node.memory)}"
            + ("" if here else "; none of them usable")
        )
    if sum(bool(usable & node.cores) for node in found.numa) > 1:
        yield note(
            "the usable cores are on several NUMA nodes: memory of another node is slower; where a "
            "rank computes on a CPU, bind it to one (numactl --cpunodebind --membind)"
        )


def _memory(found: Machine, num_ranks: int) -> Iterator[Finding]:
    text = f"memory: {gib(found.memory_available)} of {gib(found.memory)} available"
    if found.memory_limit is not None:
        text += f"; the container or job may use {gib(found.memory_limit)}"
    yield fact(text)
    if 0 < found.memory_available < LEAST_MEMORY:
        yield problem(
            f"memory: {gib(found.memory_available)} available, expected {gib(LEAST_MEMORY)} to "
            "load the libraries alone; end what uses it, or take another machine"
        )
    needed = num_ranks * SHM_PER_RANK
    if found.shm is None or found.shm.free < 0:
        yield problem("/dev/shm: not there; ranks exchange through it; mount a tmpfs there")
    elif found.shm.free < needed:
        yield problem(
            f"/dev/shm: {gib(found.shm.free)} free, expected {gib(needed)} for {num_ranks} ranks; "
            "give the container more (--shm-size=8g, or --ipc=host), or delete what lies there"
        )
    else:
        yield fact(f"/dev/shm: {gib(found.shm.free)} free")
        if found.shm.free < SHM_USUAL:
            yield note("/dev/shm is small; containers usually get 8 GiB (--shm-size=8g)")


def _limits(found: Machine, world_size: int) -> Iterator[Finding]:
    needed = FILES + FILES_PER_RANK * world_size
    if found.open_files < needed:
        yield note(
            f"ulimit -n: {found.open_files:g} open files, and a rank of {world_size} may need "
            f"{needed}; raise it"
        )
    if found.fabric and found.locked_memory != math.inf:
        yield note(
            f"ulimit -l: {gib(found.locked_memory)} can be pinned; InfiniBand needs it unlimited"
        )


def _gpus(found: Machine, torch: TorchDevices) -> Iterator[Finding]:
    for gpu in found.gpus:
        place = "" if gpu.numa_node is None else f", NUMA node {gpu.numa_node}"
        size = f"{gib(gpu.free)} of {gib(gpu.memory)} free" if gpu.memory else "memory not told"
        yield fact(f"GPU: {gpu.name}, {size}, driver {gpu.driver}{place}")
        if gpu.free < 0.9 * gpu.memory:
            yield note(f"{gib(gpu.memory - gpu.free)} of this GPU are in use by somebody else")
    nodes = {gpu.numa_node for gpu in found.gpus if gpu.numa_node is not None}
    if len(nodes) > 1:
        yield note(
            f"GPUs are on NUMA nodes {ranges(nodes)}: tensor-parallel ranks within one node are "
            "the quicker ones"
        )
    build = "a build for CPUs" if torch.cuda_build is None else f"built for CUDA {torch.cuda_build}"
    if torch.num_gpus:
        yield fact(f"torch uses {torch.num_gpus} GPUs ({torch.version}, {build}); ranks take NCCL")
        return
    yield fact(f"torch uses no GPU ({torch.version}, {build}); ranks compute on the CPU, over gloo")
    if found.gpus and torch.cuda_build is None:
        yield note("there are GPUs; install requirements.txt to use them")
    elif found.gpus:
        yield problem(
            f"torch cannot use the GPUs: it was built for CUDA {torch.cuda_build}, the driver is "
            f"{found.gpus[0].driver}; is CUDA_VISIBLE_DEVICES right, and the driver new enough?"
        )
    elif torch.cuda_build is not None:
        yield note(
            "torch was built for GPUs and finds none, and the driver does not answer; on a CPU "
            "machine install requirements-cpu.txt"
        )


def network_section(
    found: Machine, variables: Mapping[str, str], *, num_hosts: int, uses_nccl: bool
) -> Section:
    """Interfaces, and whether the variables name ones that are there."""
    findings = list(_interfaces(found))
    for name in (GLOO, NCCL) if uses_nccl else (GLOO,):
        findings += _named(found, name, variables.get(name, ""))
    names = [one.name for one in found.interfaces]
    trouble = reach_problem(variables.get(GLOO, ""), found.own_address, names)
    if num_hosts > 1 and trouble:
        findings.append(problem(trouble))
    return Section(title="network", findings=tuple(findings))


def _interfaces(found: Machine) -> Iterator[Finding]:
    width = max((len(one.name) for one in found.interfaces), default=0)
    for one in found.interfaces:
        state = "up" if one.up else "down"
        yield fact(f"{one.name:<{width}}  {state:<4}  {', '.join(one.addresses) or '-'}")
    for port in found.fabric:
        yield fact(f"InfiniBand {port.name}: {port.state}")
        if port.state != "ACTIVE":
            yield note(f"NCCL does not use {port.name} while it is {port.state}")
    yield fact(f"host {found.host}: {found.own_address or 'its name stands for no address'}")
    if not found.localhost:
        yield problem("localhost: the name stands for no address; add it to /etc/hosts")
    loopback = [one for one in found.interfaces if "127.0.0.1" in one.addresses]
    if not any(one.up for one in loopback):
        yield problem("127.0.0.1: no interface has it and is up; try: ip link set lo up")
    if not found.own_address:
        yield note(
            "gloo listens where the host's name points to, and that is nowhere; add it to "
            "/etc/hosts, or name an interface in GLOO_SOCKET_IFNAME"
        )


def _named(found: Machine, variable: str, value: str) -> Iterator[Finding]:
    """Whether the interfaces that a variable names are there, and up."""
    if not value:
        return
    if trouble := interface_problem(variable, value, [one.name for one in found.interfaces]):
        yield problem(trouble)
        return
    up = [one.name for one in found.interfaces if one.up]
    if interface_problem(variable, value, up):
        yield problem(f"{variable}: found {value!r}, which is down; up are: {', '.join(up) or '-'}")
    else:
        yield fact(f"{variable} = {value}")


def port_section(found: Machine) -> Section:
    """Whether ranks can meet on this machine."""
    return Section(title="ports", findings=tuple(_port(port) for port in found.ports))


def _port(found: Port) -> Finding:
    if found.text == "0":
        if found.trouble:
            return problem(f"127.0.0.1: no port can be listened on: {found.trouble}")
        return fact("127.0.0.1: ranks can listen on any free port")
    name = f"{found.what} {found.text} on 127.0.0.1"
    if not found.trouble:
        return fact(f"{name}: free")
    return note(
        f"{name}: {found.trouble}; name another one to torchrun (--rdzv-endpoint); osft without a "
        "launcher takes any that is free"
    )


def space_section(spaces: Sequence[Space]) -> Section:
    """Free disk."""
    return Section(title="disk", findings=tuple(f for one in spaces for f in _space(one)))


def _space(found: Space) -> Iterator[Finding]:
    name = f"{found.what} ({found.path})"
    state = ""
    if found.free < 0:
        state = "cannot be looked at"
    elif not found.has_names:
        state = "no file can be added, for the file system is out of inodes"
    elif found.free < LEAST_FREE:
        state = f"{gib(found.free)} free, the disk is full"
    elif not found.writable:
        state = "this user may not write there"
    if not state:
        yield fact(f"{name}: {gib(found.free)} free")
    elif found.needed:
        option = {"output folder": "output_dir", "temporary files": "TMPDIR"}[found.what]
        yield problem(f"{name}: {state}; make room, or choose another place ({option})")
    else:
        yield note(f"{name}: {state}; nothing can be fetched into it")


def variable_section(variables: Mapping[str, str], *, num_cores: int, num_ranks: int) -> Section:
    """Those that change what libraries do, without secrets."""
    shown = {
        name: value
        for name, value in sorted(variables.items())
        if (name.startswith(SHOWN_VARIABLES) and not name.startswith(UNTOLD)) or name in OF_RANKS
    }
    findings = [fact(f"{name}={value}") for name, value in redacted(shown).items()]
    threads = variables.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) * num_ranks > num_cores:
        findings.append(
            note(
                f"OMP_NUM_THREADS = {threads} in {num_ranks} ranks on {num_cores} cores: threads "
                "wait for each other; lower or unset it"
            )
        )
    if variables.get("CUDA_LAUNCH_BLOCKING") == "1":
        findings.append(note("CUDA_LAUNCH_BLOCKING = 1 makes GPUs wait for each kernel; unset it"))
    return Section(title="variables", findings=tuple(findings) or (fact("none is set"),))

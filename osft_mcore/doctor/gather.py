"""Looks at this machine: reads files of the kernel and asks the driver; changes nothing."""

import csv
import math
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from osft_mcore.doctor.facts import MIB, GpuFound, Machine, NumaNode, Space
from osft_mcore.doctor.network import fabric, interfaces, ports
from osft_mcore.files import nearest_existing
from osft_mcore.parallel.network import addresses, own_address

SHM: Final = Path("/dev/shm")
DRIVER_S: Final = 30.0
"""A driver that hangs is one of the things to find out."""
_QUERY: Final = "index,uuid,name,memory.total,memory.free,driver_version,pci.bus_id"


def machine(variables: Mapping[str, str], *, output_dir: Path, launched: bool) -> Machine:
    """This host, and where a run would put files; `launched`: its ranks have been started."""
    memory = _meminfo(Path("/proc/meminfo"))
    available = memory.get("MemAvailable", 0)
    limit, left = memory_limit()
    tmp = Path(variables.get("TMPDIR") or "/tmp")
    return Machine(
        host=socket.gethostname(),
        usable_cores=frozenset(os.sched_getaffinity(0)),
        num_cores=os.cpu_count() or 1,
        numa=numa_nodes(),
        memory=memory.get("MemTotal", 0),
        memory_available=available if left is None else min(available, left),
        memory_limit=limit,
        open_files=_ulimit(resource.RLIMIT_NOFILE),
        locked_memory=_ulimit(resource.RLIMIT_MEMLOCK),
        shm=space("/dev/shm", SHM) if SHM.is_dir() else None,
        gpus=_gpus(variables.get("CUDA_VISIBLE_DEVICES")),
        interfaces=interfaces(),
        fabric=fabric(),
        own_address=own_address(),
        localhost=bool(addresses("localhost")),
        ports=ports(variables, launched=launched),
        spaces=(
            space("output folder", output_dir),
            space("Hugging Face cache", _hub_cache(variables), needed=False),
            space("temporary files", tmp),
        ),
    )


def space(what: str, path: Path, *, needed: bool = True) -> Space:
    """Of the file system that `path` is on, or will be."""
    try:
        at = nearest_existing(path)
        found = os.statvfs(at)
    except OSError:
        return Space(what=what, path=str(path), free=-1, needed=needed)
    return Space(
        what=what,
        path=str(path),
        free=found.f_bavail * found.f_frsize,
        # Some file systems make up names as they go, and count none.
        has_names=found.f_files == 0 or found.f_favail > 0,
        writable=os.access(at, os.W_OK),
        needed=needed,
    )


def numa_nodes(folder: Path = Path("/sys/devices/system/node")) -> tuple[NumaNode, ...]:
    """By number; none where the kernel does not tell."""
    found = []
    for node in folder.glob("node[0-9]*"):
        with suppress(OSError, ValueError):
            sizes = _meminfo(node / "meminfo")
            found.append(
                NumaNode(
                    number=int(node.name.removeprefix("node")),
                    cores=parse_cores((node / "cpulist").read_text()),
                    memory=sizes.get("MemTotal", 0),
                )
            )
    return tuple(sorted(found, key=lambda node: node.number))


def parse_cores(text: str) -> frozenset[int]:
    """The kernel's way to list cores: 0-3,8."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def parse_gpus(
    text: str, numa_node: Mapping[str, int], visible: str | None
) -> tuple[GpuFound, ...]:
    """What nvidia-smi says of the GPUs in `visible`, CUDA_VISIBLE_DEVICES; None: of all.

    Of all, too, if none is what that names: a slip. Of none where it is empty, or names parts of
    GPUs (MIG), whose sizes nvidia-smi does not tell.
    """
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines())]
    rows = [row for row in rows if len(row) == len(_QUERY.split(","))]
    names = [] if visible is None else [name.strip() for name in visible.split(",")]
    if all(name in ("", "-1") or name.startswith("MIG-") for name in names):
        named = rows if visible is None else []
    else:
        named = [
            row for row in rows if any(n and (n == row[0] or row[1].startswith(n)) for n in names)
        ]
        named = named or rows
    return tuple(_gpu(row, numa_node) for row in named)


def _gpu(row: Sequence[str], numa_node: Mapping[str, int]) -> GpuFound:
    _, _, name, memory, free, driver, bus = row
    known = memory.isdecimal() and free.isdecimal()
    return GpuFound(
        name=name,
        memory=int(memory) * MIB if known else 0,
        free=int(free) * MIB if known else 0,
        driver=driver,
        numa_node=numa_node.get(bus),
    )


def _gpus(visible: str | None) -> tuple[GpuFound, ...]:
    """Of the driver, which torch may not be able to use; none where it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        answer = subprocess.run(
            [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=DRIVER_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    buses = [line.rsplit(",", 1)[-1].strip() for line in answer.splitlines()]
    numa_node = {bus: node for bus in buses if (node := _numa_of(bus)) is not None}
    return parse_gpus(answer, numa_node, visible)


def _numa_of(bus: str) -> int | None:
    """nvidia-smi writes eight digits of the domain, the kernel four, in small letters."""
    domain, _, rest = bus.lower().partition(":")
    with suppress(OSError, ValueError):
        file = Path("/sys/bus/pci/devices") / f"{domain[-4:]}:{rest}" / "numa_node"
        number = int(file.read_text())
        # -1: the firmware does not say.
        return number if number >= 0 else None
    return None


def _meminfo(file: Path) -> dict[str, int]:
    """Bytes by name; of a NUMA node's file, too, whose lines begin with the node."""
    sizes = {}
    with suppress(OSError):
        for line in file.read_text().splitlines():
            words = line.replace(":", " ").split()
            if words[-1:] == ["kB"]:
                sizes[words[-3]] = int(words[-2]) * 1024
    return sizes


def memory_limit(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> tuple[int | None, int | None]:
    """The tightest limit on this process's memory, and what is left of it; None: there is none.

    A container's own group is the root of what it sees; a Slurm job's is below it.
    """
    groups = {root, root / "memory"}
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if "memory" in kinds.split(",") or not kinds:
                top = root / "memory" if kinds else root
                own = top / path.lstrip("/")
                groups |= {at for at in (own, *own.parents) if at.is_relative_to(top)}
    limits = [limit for group in groups for limit in _limits_of(group)]
    return min(limits, key=lambda pair: pair[1], default=(None, None))


def _limits_of(group: Path) -> Iterator[tuple[int, int]]:
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for most, used in names:
        with suppress(OSError, ValueError):
            limit = int((group / most).read_text())
            # Without a limit the older file has a number that no machine reaches.
            if limit < 2**60:
                # The kernel gives up copies of files first.
                stat = dict(line.split() for line in (group / "memory.stat").open())
                cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
                yield limit, max(0, limit - int((group / used).read_text()) + cached)


def _ulimit(kind: int) -> float:
    soft, _ = resource.getrlimit(kind)
    return math.inf if soft == resource.RLIM_INFINITY else soft


def _hub_cache(variables: Mapping[str, str]) -> Path:
    home = Path(variables.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(variables.get("HF_HUB_CACHE") or home / "hub")

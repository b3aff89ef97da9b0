"""Looks at this machine: reads files of the kernel and asks the driver; changes nothing."""

import csv
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from osft_mcore.doctor.facts import MIB, GpuFound, Machine, NumaNode, Space
from osft_mcore.doctor.network import fabric, host_address, interfaces, ports

SHM: Final = Path("/dev/shm")
DRIVER_S: Final = 30.0
"""A driver that hangs is one of the things to find out."""
_QUERY: Final = "name,memory.total,memory.free,driver_version,pci.bus_id"


def machine(variables: Mapping[str, str], *, output_dir: Path, launched: bool) -> Machine:
    """This host, and where a run would put files; `launched`: its ranks have been started."""
    memory = _meminfo(Path("/proc/meminfo"))
    tmp = Path(variables.get("TMPDIR") or "/tmp")
    return Machine(
        host=socket.gethostname(),
        usable_cores=frozenset(os.sched_getaffinity(0)),
        num_cores=os.cpu_count() or 1,
        numa=numa_nodes(),
        memory=memory.get("MemTotal", 0),
        memory_available=memory.get("MemAvailable", 0),
        memory_limit=_memory_limit(),
        shm=space("/dev/shm", SHM) if SHM.is_dir() else None,
        gpus=_gpus(),
        interfaces=interfaces(),
        fabric=fabric(),
        own_address=host_address(socket.gethostname()),
        localhost=bool(host_address("localhost")),
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
        existing = next(at for at in (path, *path.absolute().parents) if at.exists())
        found = os.statvfs(existing)
    except OSError:
        return Space(what=what, path=str(path), free=-1, needed=needed)
    return Space(
        what=what,
        path=str(path),
        free=found.f_bavail * found.f_frsize,
        # Some file systems make up names as they go, and count none.
        has_names=found.f_files == 0 or found.f_favail > 0,
        writable=os.access(existing, os.W_OK),
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


def parse_gpus(text: str, numa_node: Mapping[str, int]) -> tuple[GpuFound, ...]:
    """What nvidia-smi says, by bus id; a size that it does not know is 0."""
    return tuple(
        GpuFound(
            name=row[0].strip(),
            memory=_number(row[1]) * MIB,
            free=_number(row[2]) * MIB,
            driver=row[3].strip(),
            numa_node=numa_node.get(row[4].strip()),
        )
        for row in csv.reader(text.splitlines())
        if len(row) == len(_QUERY.split(","))
    )


def _gpus() -> tuple[GpuFound, ...]:
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
    return parse_gpus(answer, {bus: node for bus in buses if (node := _numa_of(bus)) is not None})


def _numa_of(bus: str) -> int | None:
    """nvidia-smi writes eight digits of the domain, the kernel four, in small letters."""
    domain, _, rest = bus.lower().partition(":")
    with suppress(OSError, ValueError):
        file = Path("/sys/bus/pci/devices") / f"{domain[-4:]}:{rest}" / "numa_node"
        number = int(file.read_text())
        # -1: the firmware does not say.
        return number if number >= 0 else None
    return None


def _number(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0


def _meminfo(file: Path) -> dict[str, int]:
    """Bytes by name; of a NUMA node's file, too, whose lines begin with the node."""
    sizes = {}
    with suppress(OSError):
        for line in file.read_text().splitlines():
            words = line.replace(":", " ").split()
            if words[-1:] == ["kB"]:
                sizes[words[-3]] = int(words[-2]) * 1024
    return sizes


def _memory_limit() -> int | None:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError):
            text = Path(file).read_text().strip()
            # Without a limit the older file has a number that no machine reaches.
            return int(text) if text.isdecimal() and int(text) < 2**60 else None
    return None


def _hub_cache(variables: Mapping[str, str]) -> Path:
    home = Path(variables.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(variables.get("HF_HUB_CACHE") or home / "hub")

"""Process groups: the only place that touches torch.distributed's and Megatron's globals."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from osft_mcore.errors import ConfigError
from osft_mcore.parallel.board import Board
from osft_mcore.parallel.cpu import megatron_device
from osft_mcore.parallel.deadlines import Deadlines
from osft_mcore.parallel.loopback import ON_LOOPBACK
from osft_mcore.parallel.network import port_in_use
from osft_mcore.parallel.peers import Process, this_process
from osft_mcore.parallel.topology import Coordinates, Topology
from osft_mcore.parallel.watchdog import Watchdog
from osft_mcore.parallel.world import (
    launched_world_size,
    launcher_keeps_store,
    local_rank,
    local_world_size,
    started_by_own_launcher,
)

STORE_PATIENCE_S: Final = 10.0
"""Longest that connecting to the launcher's store may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelContext:
    """This rank's place and its groups; handed down, never looked up."""

    topology: Topology
    coordinates: Coordinates
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    world_group: dist.ProcessGroup
    timeout_minutes: float
    """Longest that a collective may take while the run starts."""
    watch: Watchdog

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.coordinates.rank

    @property
    def is_first_stage(self) -> bool:
        """True where the embedding lives, in the first chunk."""
        return self.coordinates.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the loss is computed, in the last chunk."""
        return self.coordinates.pp_rank == self.topology.pp - 1


@contextlib.contextmanager
def parallel_context(
    topology: Topology, *, timeout_minutes: float, deadlines: Deadlines | None = None
) -> Iterator[ParallelContext]:
    """Join the process groups of the launcher's world, and leave them at the end.

    Every rank must call, under torchrun (or anything that sets its variables). `deadlines`:
    what the context watches over; None: nothing. `timeout_minutes`: of joining.
    Raises ConfigError if the world does not fit the topology, or if rank 0 has to open MASTER_PORT
    and cannot.
    """
    world_size = launched_world_size() or 1
    if world_size != topology.world_size:
        raise ConfigError(
            f"parallel: found {world_size} processes, expected tp*cp*pp*dp = {topology.tp}"
            f"*{topology.cp}*{topology.pp}*{topology.dp} = {topology.world_size}"
        )
    device = _claim_device()
    with _port_in_use_as_config_error():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(minutes=timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
    try:
        context = join_groups(topology, device=device, timeout_minutes=timeout_minutes)
        if deadlines is None:
            yield context
        else:
            with _watchdog(context, deadlines) as watch:
                yield dataclasses.replace(context, watch=watch)
    finally:
        parallel_state.destroy_model_parallel()
        # Closing a rollout engine already takes the world down.
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[ParallelContext]:
    """A world of this process and no other, on the CPU: to compute with a model, not to train."""
    for name, value in ON_LOOPBACK.items():
        # Even alone gloo opens a socket.
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield join_groups(Topology(tp=1, pp=1, dp=1), device=torch.device("cpu"))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def join_groups(
    topology: Topology, *, device: torch.device, timeout_minutes: float = 30.0
) -> ParallelContext:
    """Make Megatron's groups over the initialised world. Collective over the world."""
    with megatron_device():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tp,
            pipeline_model_parallel_size=topology.pp,
            # Any number here, even 1, selects the interleaved schedule.
            virtual_pipeline_model_parallel_size=topology.vpp if topology.vpp > 1 else None,
            context_parallel_size=topology.cp,
            distributed_timeout_minutes=math.ceil(timeout_minutes),
        )
        # Weights are loaded and dropout is off, so no random number is ever drawn; this tracker's
        # forks do nothing, on any device.
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    coordinates = topology.coordinates(dist.get_rank())
    world = dist.group.WORLD
    assert world is not None, "initialize_model_parallel needs an initialised world"
    context = ParallelContext(
        topology=topology,
        coordinates=coordinates,
        device=device,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        world_group=world,
        timeout_minutes=timeout_minutes,
        watch=Watchdog(
            coordinates.rank, deadlines=Deadlines({}, otherwise_s=0.0, slack=0.0),
            limit_collectives=limit_collectives, board=None,
        ),
    )  # fmt: skip
    found = (
        context.tp_group.rank(),
        context.pp_group.rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    place = coordinates
    expected = (place.tp_rank, place.pp_rank, place.cp_rank, place.dp_rank, place.copy)
    assert found == expected, f"Megatron's rank order changed: {found} is not {expected}"
    return context


def limit_collectives(seconds: float) -> None:
    """From now on a collective of any group that this rank is in fails after so long."""
    for group in list(_world.pg_map):
        _set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def _watchdog(context: ParallelContext, deadlines: Deadlines) -> Watchdog:
    """Collective over the world."""
    world_size, board, holders = context.topology.world_size, None, list[int]()
    if world_size > 1:
        # A connection of its own: on the world's, the main thread may be waiting.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = datetime.timedelta(seconds=STORE_PATIENCE_S)
        store = TCPStore(address, port, None, is_master=False, timeout=patience)
        holders = [] if launcher_keeps_store() else [0]
        keeper = f"{'rank 0' if holders else 'the launcher'} on {address}"
        board = Board(store, context.rank, world_size, keeper=keeper)
        if context.rank == 0:
            board.clear()
    # Nobody is beyond this before the board is clear.
    peers = [
        Process(**peer) for peer in all_gather_json(dataclasses.asdict(this_process()), context)
    ]
    return Watchdog(
        context.rank,
        deadlines=deadlines,
        limit_collectives=limit_collectives,
        board=board,
        peers=peers,
        holders=holders,
        # The own launcher does that itself, and at once.
        kills=not started_by_own_launcher(),
    )


@contextlib.contextmanager
def _port_in_use_as_config_error() -> Iterator[None]:
    try:
        yield
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = int(os.environ["MASTER_PORT"])
        raise ConfigError(f"MASTER_PORT: {port_in_use(port)}") from error


def wait_for_all(context: ParallelContext) -> None:
    """Return when every rank is here. Collective over the world."""
    dist.barrier(group=context.world_group)


def all_gather_json(value: Any, context: ParallelContext) -> list[Any]:
    """One JSON-able value per rank, by rank. Collective over the world; no pickle."""
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    payload = payload.to(context.device)
    size = torch.tensor([payload.numel()], device=context.device)
    sizes = [torch.zeros_like(size) for _ in range(context.topology.world_size)]
    dist.all_gather(sizes, size, group=context.world_group)
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=context.device)
    padded[: payload.numel()] = payload
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=context.world_group)
    return [
        json.loads(bytes(part[: int(length)].cpu().numpy()).decode())
        for part, length in zip(gathered, sizes, strict=True)
    ]


def _claim_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if local_world_size() > num_devices:
        raise ConfigError(
            f"parallel: {local_world_size()} processes on a machine with {num_devices} GPUs; each "
            "needs its own: lower parallel.tp, cp, pp or dp, or use more machines"
        )
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    return device

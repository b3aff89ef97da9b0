"""Entry point: the commands of `osft`; starts the ranks itself when no launcher did."""

# torch, Megatron-Core and vLLM take seconds to import, and a mistake in the options should not:
# they are imported inside functions, after the options are known to be good. `osft report` has no
# options of a run, and does not wait for what reads them.

import argparse
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from osft_mcore.command_line import FOLLOW, parse
from osft_mcore.doctor import command as doctor_command
from osft_mcore.errors import ConfigError, NothingLeft, OsftError, Stopped
from osft_mcore.log import redact
from osft_mcore.parallel.network import check_meeting_point, network_errors
from osft_mcore.parallel.topology import Topology, run_topology
from osft_mcore.parallel.world import (
    check_launch_environment,
    check_started_once,
    device_type,
    end_with_parent,
    launched_rank,
    launched_world_size,
    local_rank,
    local_world_size,
    started_by_a_run,
    started_by_own_launcher,
    started_by_torchrun,
    stay_on_cores,
    usable_cores,
    visible_gpus,
)
from osft_mcore.report import command as report_command

if TYPE_CHECKING:
    from osft_mcore.config.check_async import Host
    from osft_mcore.config.schema import Phase, RunConfig
    from osft_mcore.evaluation.harness import Backend, Harness
    from osft_mcore.log.console import Console
    from osft_mcore.parallel.groups import ParallelContext


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(given)
    try:
        if arguments.command == "report":
            report_command.run_report(arguments)
            return 0
        if arguments.command == FOLLOW:
            return _follow(given, arguments.run)
        return _run(given, arguments)
    except OsftError as error:
        return _report(error)
    except KeyboardInterrupt:
        sys.stderr.write("osft: stopped by SIGINT\n")
        return 130


def _run(given: Sequence[str], arguments: argparse.Namespace) -> int:
    if arguments.command == "doctor":
        return _doctor(arguments)
    from osft_mcore.config.check import check
    from osft_mcore.config.dimensions import known_shape

    phase: Phase = arguments.command
    check_launch_environment()
    check_started_once()
    world_size = launched_world_size()
    harness = _harness(arguments)
    sound = partial(
        check,
        world_size=world_size,
        phase=phase,
        device=device_type(),
        need_files=not arguments.dry_run,
        known=partial(known_shape, config_dir=arguments.config_dir),
        host=None if arguments.dry_run else _host(),
    )
    checks = partial(_check, arguments=arguments, sound=sound)
    try:
        config = _load(arguments.overrides, arguments)
    except ConfigError as error:
        hidden = _hidden_by(error, checks, arguments)
        raise ConfigError([*error.problems, *hidden]) from None
    checks(config)
    topology = run_topology(config, phase)
    if arguments.dry_run:
        from osft_mcore.plan.dry_run import dry_run

        sys.stdout.write(dry_run(config, phase, topology, arguments.config_dir))
        return 0
    if not started_by_own_launcher():
        from osft_mcore.train.preflight import input_errors

        errors = (*network_errors(), *input_errors(config, phase))
        if harness is not None:
            return _score_with_harness(given, config, harness, errors, topology.world_size)
        if errors:
            return _report(*errors)
    if world_size is None:
        from osft_mcore.parallel.launch import launch

        return launch(given, num_processes=topology.world_size)
    _run_rank(config, topology, partial(_run_phase, config, phase))
    return 0


def _check(
    config: "RunConfig", *, arguments: argparse.Namespace, sound: Callable[["RunConfig"], None]
) -> None:
    """Raise ConfigError for options that hold a secret, and for whatever `sound` raises it for."""
    from osft_mcore.config.load import as_options

    options = as_options(config) | {"--lm-eval-args": getattr(arguments, "lm_eval_args", "")}
    redact.check_options(options, redact.environment_secrets(os.environ), partial(sound, config))


def _follow(given: Sequence[str], run: Path) -> int:
    """The evaluator of a run that trains, which has started it and has checked the options."""
    if not started_by_a_run():
        raise ConfigError(
            f"{FOLLOW}: `osft train` starts it (evaluation.mode=async); by hand use "
            "`osft evaluate --run`"
        )
    end_with_parent()
    from osft_mcore.config.evaluation import cores, of_evaluator
    from osft_mcore.config.load import load_config

    config = of_evaluator(load_config([], run))
    topology = run_topology(config, "evaluate")
    if launched_world_size() is None:
        from osft_mcore.parallel.launch import launch

        # What started the run may have been told to ignore it; the run ends this process so.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if device_type() == "cpu":
            stay_on_cores(cores(config.evaluation.devices))
        return launch(given, num_processes=topology.world_size)

    def follow(context: "ParallelContext", console: "Console") -> None:
        from osft_mcore.train.follow import run_follow
        from osft_mcore.train.vllm import build_engine

        run_follow(config, context, console, build_engine)

    _run_rank(config, topology, follow)
    return 0


def _harness(arguments: argparse.Namespace) -> "Harness | None":
    """What --lm-eval asks for, if it is there."""
    tasks: str | None = getattr(arguments, "lm_eval", None)
    if tasks is None:
        if getattr(arguments, "lm_eval_args", None):
            raise ConfigError("--lm-eval-args: they are for --lm-eval, which is not there")
        return None
    from osft_mcore.evaluation.harness import parse_harness

    if launched_world_size() is not None and not started_by_own_launcher():
        raise ConfigError(
            "--lm-eval: the harness runs when the ranks have ended; start osft itself, without a "
            "launcher such as torchrun"
        )
    usual: Backend = "vllm" if device_type() == "cuda" else "hf"
    return parse_harness(tasks, arguments.lm_eval_args, usual=usual)


def _score_with_harness(
    given: Sequence[str],
    config: "RunConfig",
    harness: "Harness",
    errors: Sequence[OsftError],
    num_processes: int,
) -> int:
    """Score first, if that is not done, with ranks that end; then run the harness."""
    from osft_mcore.log.console import Console
    from osft_mcore.parallel.launch import launch
    from osft_mcore.train.harness import harness_errors, run_harness

    is_scored = any(isinstance(error, NothingLeft) for error in errors)
    others = [error for error in errors if not isinstance(error, NothingLeft)]
    if others := [*others, *harness_errors(config, harness)]:
        return _report(*others)
    if not is_scored and (code := launch(given, num_processes=num_processes)):
        return code
    run_harness(config, harness, Console(enabled=True, progress=config.logging.progress))
    return 0


def _load(overrides: Sequence[str], arguments: argparse.Namespace) -> "RunConfig":
    """The options of the command line, over those of conf/ or of the run that is named."""
    from osft_mcore.config.evaluation import of_run
    from osft_mcore.config.load import load_config

    run: Path | None = getattr(arguments, "run", None)
    if run is None:
        return load_config(overrides, arguments.config_dir)
    if arguments.config_dir is not None:
        raise ConfigError("--run: it takes the options from the run; leave out --config-dir")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"--run: no config.yaml in {str(run)!r}; expected the folder of a run")
    return of_run(load_config(overrides, run), run, overrides)


def _hidden_by(
    error: ConfigError, checks: Callable[["RunConfig"], None], arguments: argparse.Namespace
) -> list[str]:
    """What would also be wrong: unknown options and wrong types hide impossible combinations."""
    named = [problem.split(":")[0] for problem in error.problems]
    rest = [text for text in arguments.overrides if text.split("=")[0] not in named]
    if len(rest) == len(arguments.overrides):
        return []
    try:
        checks(_load(rest, arguments))
    except ConfigError as more:
        hidden = [problem for problem in more.problems if problem not in error.problems]
        return [f"without the above: {problem}" for problem in hidden]
    return []


def _host() -> "Host | None":
    """What evaluation.devices may name; None on hosts other than rank 0's."""
    from osft_mcore.config.check_async import Host

    if launched_rank() >= local_world_size():
        return None
    num_ranks = None if launched_world_size() is None else local_world_size()
    return Host(cores=usable_cores(), gpus=visible_gpus(), num_ranks=num_ranks)


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.meeting_point is not None:
        check_meeting_point(arguments.meeting_point)
        return 0
    _silence_libraries()
    if started_by_own_launcher():
        end_with_parent()
    check_launch_environment()
    ended = doctor_command.run_doctor(doctor_command.asked(arguments, dict(os.environ), _host))
    if ended.errors:
        _report(*ended.errors)
    if launched_world_size() is not None:
        _leave(ended.exit_code)
    return ended.exit_code


def _run_rank(
    config: "RunConfig",
    topology: Topology,
    run: 'Callable[["ParallelContext", "Console"], None]',
) -> None:
    """The program of one rank. Leaves the process at once on an error, so that no peer waits."""
    # A rank inside a collective would not see Python's own handler until the collective ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if started_by_own_launcher():
        end_with_parent()
    _silence_libraries()
    from osft_mcore.parallel.imports import import_megatron

    import_megatron()
    from osft_mcore.log.console import Console
    from osft_mcore.parallel.deadlines import deadlines_of
    from osft_mcore.parallel.groups import parallel_context

    try:
        limits = deadlines_of(config.deadlines, wait_minutes=config.evaluation.wait_minutes)
        start = config.deadlines.start
        world = parallel_context(topology, timeout_minutes=start, deadlines=limits)
        with world as context:
            console = Console(enabled=context.rank == 0, progress=config.logging.progress)
            run(context, console)
    except OsftError as error:
        _leave(_report(error))
    except BaseException:
        secrets = redact.environment_secrets(os.environ)
        text = redact.without_secrets(traceback.format_exc(), secrets)
        sys.stderr.write(f"[rank {os.environ.get('RANK')}] {text}")
        _leave(1)


def _run_phase(
    config: "RunConfig", phase: "Phase", context: "ParallelContext", console: "Console"
) -> None:
    if phase == "sft":
        from osft_mcore.train.sft import run_sft

        run_sft(config, context, console)
        return
    from osft_mcore.train.vllm import build_engine

    if phase == "train":
        from osft_mcore.train.osft import run_osft as run
    elif phase == "generate":
        from osft_mcore.train.generate import run_generate as run
    else:
        from osft_mcore.train.evaluate import run_evaluate as run
    run(config, context, console, build_engine)


def _silence_libraries() -> None:
    """Megatron-Core and vLLM tell every rank what they lack and how they start."""
    warnings.filterwarnings("ignore", module=r"megatron|torch|vllm|transformers")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for name in ("megatron", "vllm", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _report(*errors: OsftError) -> int:
    """Print errors and return the exit code: whole from one rank of each host, the first line of
    each from the others, in case it is theirs alone."""
    secrets = redact.environment_secrets(os.environ)
    for error in errors:
        if isinstance(error, Stopped | NothingLeft) and local_rank() > 0:
            # Every rank knows it, and none failed.
            continue
        found = error.problems if isinstance(error, ConfigError) else str(error).splitlines()
        lines = [redact.without_secrets(line, secrets) for line in found]
        if local_rank() == 0:
            text = "".join(f"  - {line}\n" for line in lines)
            sys.stderr.write(f"osft: {type(error).__name__}\n{text}")
        else:
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            sys.stderr.write(f"[rank {launched_rank()}] {type(error).__name__}: {lines[0]}{more}\n")
    return _exit_code(errors[0])


def _exit_code(error: OsftError) -> int:
    """Under torchrun, which takes every other code for a failure of the rank, to be restarted: 0
    for what is none. Whether the run is done, summary.json says."""
    if isinstance(error, Stopped | NothingLeft) and started_by_torchrun():
        return 0
    return error.exit_code


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: tearing down process groups could wait for ranks that are already gone.
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())

"""`tools/plan_run.py`: from a command line to a plan."""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

from osft_mcore.config.check import check, model_is_here
from osft_mcore.config.dimensions import known_shape
from osft_mcore.config.load import as_options, load_config
from osft_mcore.config.model_shape import ModelShape, read_model_shape
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.errors import ConfigError
from osft_mcore.plan.assumptions import GPUS, Gpu, assumption_lines
from osft_mcore.plan.run import RunPlan, plan_run
from osft_mcore.plan.smallest import smallest_layout
from osft_mcore.plan.text import layout_options, plan_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="whose speed")
    parser.add_argument("--gpu-gib", type=float, help="its memory, if not what the GPU has")
    parser.add_argument(
        "--response-tokens", type=float, metavar="MEAN", help="mean length of an answer"
    )
    parser.add_argument("--phase", choices=("train", "sft"), default="train", help="as osft's")
    parser.add_argument(
        "--smallest", action="store_true", help="find the smallest layout that fits"
    )
    parser.add_argument("--json", action="store_true", help="print JSON; sizes in bytes")
    parser.add_argument("--config-dir", type=Path, help="as osft's")
    parser.add_argument("overrides", nargs="*", metavar="option=value", help="as osft's")


def run_command(arguments: argparse.Namespace) -> str:
    """The text to print. Raises ConfigError with all that is wrong with the options."""
    phase: Phase = arguments.phase
    gpu = _gpu(arguments)
    config = load_config(arguments.overrides, arguments.config_dir)
    shape = _shape(config, arguments.config_dir)
    plan = partial(
        plan_run, shape=shape, gpu=gpu, phase=phase, response_tokens=arguments.response_tokens
    )
    checked = partial(
        check, world_size=None, phase=phase, device="cuda", shape=shape, need_files=False
    )
    head = ""
    if arguments.smallest:
        config, found = smallest_layout(config, phase=phase, check=checked, plan=plan)
        head = f"# Smallest layout that fits\n{layout_options(config, phase=phase)}\n\n"
    else:
        checked(config)
        found = plan(config)
    if arguments.json:
        return _json(found, config, gpu) + "\n"
    return head + plan_text(found, config, gpu, phase=phase)


def _gpu(arguments: argparse.Namespace) -> Gpu:
    gpu, gib, mean = GPUS[arguments.gpu], arguments.gpu_gib, arguments.response_tokens
    problems = [
        f"{name}: found {value:g}, expected more than 0"
        for name, value in (("--gpu-gib", gib), ("--response-tokens", mean))
        if value is not None and not 0 < value < float("inf")
    ]
    if problems:
        raise ConfigError(problems)
    return gpu if gib is None else dataclasses.replace(gpu, gib=gib)


def _shape(config: RunConfig, config_dir: Path | None) -> ModelShape:
    path = config.model.path
    if not path:
        raise ConfigError("model.path: not set; expected a Hugging Face model folder")
    shape = read_model_shape(path) if model_is_here(config) else known_shape(path, config_dir)
    if shape is None:
        raise ConfigError(
            f"model.path: no config.json in {path!r}, and conf/model/dimensions has no model of "
            "that name; name a folder with a config.json"
        )
    return shape


def _json(plan: RunPlan, config: RunConfig, gpu: Gpu) -> str:
    lengths = plan.lengths
    totals = [moment.total for moment in plan.moments]
    found = {
        **dataclasses.asdict(plan),
        "totals": totals,
        "fits": plan.fits,
        "seconds_total": plan.seconds.total,
        "gpu": dataclasses.asdict(gpu),
        "assumptions": assumption_lines(
            gpu, response_tokens=lengths.response, prompt_tokens=lengths.prompt
        ),
        "options": {name: as_options(config)[name] for name in ("parallel", "rollout", "train")},
    }
    return json.dumps(found)

"""The commands of `osft`, and their flags."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from osft_mcore import __version__
from osft_mcore.doctor import command as doctor_command
from osft_mcore.log import redact
from osft_mcore.report import command as report_command

DESCRIPTION: Final = "Online SFT: a model is fine-tuned on its own answers. Train, score, report."
FOLLOW: Final = "follow"
"""The command of the process that evaluation.mode=async starts."""


def parse(given: Sequence[str]) -> argparse.Namespace:
    """What the command line asks for; ends the program with 2 if it cannot be read.

    Overrides may stand before and after flags; argparse alone takes them in one run only.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(given)
    takes_options = "overrides" in arguments
    if unknown := [text for text in rest if text.startswith("-") or not takes_options]:
        parser.error(f"unrecognized arguments: {' '.join(redact.redacted_arguments(unknown))}")
    if takes_options:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="osft", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"osft-mcore {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("train", "online SFT: sample, train, sync, repeat"),
        ("sft", "supervised fine-tuning on given answers"),
        ("generate", "sample answers to the training prompts once, for offline training"),
        ("evaluate", "score a model on held-out problems"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="print options, ranks and batches and stop; needs no GPU, model or data",
        )
        command.add_argument("--config-dir", type=Path, help="folder to use instead of conf/")
        if name == "evaluate":
            text = "score this run's checkpoints, with the options that it had; into RUN/scores"
            command.add_argument("--run", type=Path, help=text)
            text = "then run tasks of lm-evaluation-harness: names or .yaml files, with commas"
            command.add_argument("--lm-eval", metavar="TASKS", help=text)
            text = "for the harness, as one text, as in '--num_fewshot 4 --limit 100'"
            command.add_argument("--lm-eval-args", metavar="ARGS", default="", help=text)
        command.add_argument("overrides", nargs="*", metavar="option=value")
    # Without a help text it is not listed: nobody has to call it.
    commands.add_parser(FOLLOW).add_argument("run", type=Path)
    text = doctor_command.HELP
    doctor_command.add_arguments(commands.add_parser("doctor", help=text, description=text))
    text = report_command.HELP
    report_command.add_arguments(commands.add_parser("report", help=text, description=text))
    return parser

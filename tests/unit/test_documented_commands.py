"""Every command in the documents is one that the program takes, options and all."""

import argparse
import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch.distributed import run as torchrun

from osft_mcore import cli
from osft_mcore.command_line import parse
from osft_mcore.config.load import load_config, to_yaml
from osft_mcore.data.arithmetic import TinyModel, write_model_folder
from osft_mcore.errors import ConfigError
from osft_mcore.plan import command as plan_command

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    "osft", "python", "make", "torchrun", "bash", "sbatch", "pip",
    "examples/multi_node_torchrun.sh",
)  # fmt: skip
OTHERS = ("cat",)
"""Not ours to check."""
NEEDS_GPUS = "# needs GPUs"
"""For readers. Of such a command the options are checked, not whether they suit this machine."""
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    place: str
    text: str
    """Without the prompt, continued lines joined."""
    shown: tuple[str, ...] = ()
    """What the document says that it prints."""


def blocks(text: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line, and lines, of fenced blocks and of those indented by four."""
    lines, block, fence = text.splitlines(), [], False
    for number, line in enumerate([*lines, ""], 1):
        if line.startswith("```"):
            if fence:
                yield number - len(block), block
            block, fence = [], not fence
        elif fence or line.startswith("    $ ") or (block and line.startswith("    ")):
            block = [*block, line if fence else line[4:]]
        elif block:
            yield number - len(block), block
            block = []


def commands_in(path: Path) -> Iterator[Command]:
    for first, lines in blocks(path.read_text(encoding="utf-8")):
        prompted = any(line.startswith("$ ") for line in lines)
        if not prompted and lines[0].split(" ")[0] not in PROGRAMS:
            continue
        number = 0
        while number < len(lines):
            start, line = number, lines[number]
            number += 1
            if not line.strip() or (prompted and not line.startswith("$ ")) or line[0] == "#":
                continue
            text = line.removeprefix("$ ")
            while number < len(lines) and (text.endswith("\\") or lines[number][:2] == "  "):
                if prompted and not text.endswith("\\"):
                    break
                text = text.removesuffix("\\") + " " + lines[number].strip()
                number += 1
            shown = []
            for output in lines[number:] if prompted else ():
                if output.startswith("$ "):
                    break
                shown.append(output)
            place = f"{path.name}:{first + start}"
            yield Command(place=place, text=text, shown=tuple(line for line in shown if line))


COMMANDS = [command for path in DOCUMENTS for command in commands_in(path)]


class Parsed(Exception):
    """A tool has taken its command line."""


def words_of(text: str) -> list[str]:
    """As a shell would split it; of what may be left out or chosen, one choice is there."""
    plain = re.sub(r"\[(--[^\]]*)\]", r"\1", text)
    plain = re.sub(r"(\w+)(?:\|\w+)+", r"\1", plain)
    return shlex.split(plain, comments=True)


def problem_of(command: Command) -> str:
    """What is wrong with it; empty if nothing is."""
    for part in command.text.split(" && "):
        words = words_of(part)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                problem = checked(words, command)
        except ConfigError as error:
            problem = str(error)
        except SystemExit as ending:
            problem = said.getvalue() if ending.code else ""
        if problem:
            return f"{command.place}: {part}: {problem}"
    return ""


def checked(words: Sequence[str], command: Command) -> str:
    match words:
        case ["osft", *given]:
            return osft(given, command)
        case ["python", str(tool), *given]:
            return python(tool, given)
        case ["torchrun", *given]:
            found = torchrun.get_args_parser().parse_args([w for w in given if w != "..."])
            if (found.module, found.training_script) != (True, "osft_mcore.cli"):
                return "expected -m osft_mcore.cli"
            return osft(found.training_script_args, command)
        case ["sbatch", *given]:
            at = next(n for n, word in enumerate(given) if word.endswith(".sbatch"))
            if given[at].endswith("train.sbatch"):
                load_config([word for word in given[at + 2 :] if word != "..."])
            return bash(given[at])
        case [str(script), _nodes, _meeting_point, *given] if script.startswith("examples/"):
            load_config([word for word in given if word != "..."])
            return bash(script)
        case [str(variable), *rest] if re.fullmatch(r"[A-Z_]+=\S*", variable):
            return checked(rest, command)
    return checked_by_files(words)


def checked_by_files(words: Sequence[str]) -> str:
    match words:
        case [".venv/bin/python", "-m", "pytest", *files]:
            return missing(files)
        case ["pip", "install", *given]:
            return missing([name for flag, name in pairwise(given) if flag == "-r"])
        case ["make", target]:
            made = ["make", "-n", "-C", str(ROOT), target]
            return subprocess.run(made, capture_output=True, text=True).stderr
        case ["bash", script]:
            return bash(script)
        case [program, *_] if program in OTHERS:
            return ""
    return "no command that this test knows"


def missing(files: Sequence[str]) -> str:
    return "".join(f"no file {name}" for name in files if not (ROOT / name).is_file())


def osft(given: Sequence[str], command: Command) -> str:
    """Check the command line, and its options as far as the document gives them."""
    whole = "..." not in given
    given = [word.replace("=...", "=x") for word in given if word not in ("...", "option=value")]
    given = [word.replace("experiment=NAME", "experiment=arithmetic_osft") for word in given]
    arguments = parse(given)
    if arguments.command == "report":
        return ""
    if arguments.command == "doctor":
        load_config(arguments.overrides)
        return ""
    if not whole or NEEDS_GPUS in command.text or getattr(arguments, "run", None):
        load_config(arguments.overrides)
        if not getattr(arguments, "run", None):
            return ""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main([*given, "--dry-run"])
    refused = command.shown[:1] == ("osft: ConfigError",)
    if refused and said.getvalue().splitlines() != list(command.shown):
        return f"says something else: {said.getvalue()}"
    return "" if (code == 0) is not refused else said.getvalue()


def python(tool: str, given: Sequence[str]) -> str:
    path = ROOT / tool
    if path.parent != ROOT / "tools" or not path.is_file():
        return "no such tool"
    if "argparse" not in path.read_text(encoding="utf-8"):
        # Calling it would do its work.
        return "a tool that does not look at its arguments"
    module: Any = importlib.import_module(path.stem)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, parse_only(name))
        words = ["1" if PLACEHOLDER.fullmatch(word) else word for word in given]
        words = [word.replace("experiment=NAME", "experiment=arithmetic_osft") for word in words]
        patch.setattr("sys.argv", [tool, *(w for w in words if w not in ("...", "option=value"))])
        with contextlib.suppress(Parsed):
            module.main()
            return "ended without a look at its arguments"
    return ""


def parse_only(name: str) -> Any:
    parse = getattr(argparse.ArgumentParser, name)

    def parse_and_stop(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> NoReturn:
        found = parse(parser, *given, **named)
        if overrides := getattr(found, "overrides", None):
            load_config(overrides)
        raise Parsed

    return parse_and_stop


def bash(script: str) -> str:
    if not (ROOT / script).is_file():
        return "no such script"
    return subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True).stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents take for granted: the demo has run here."""
    folder = tmp_path_factory.mktemp("documents")
    run = folder / "runs" / "arithmetic"
    write_model_folder(run / "sft" / "hf", TinyModel())
    text = to_yaml(load_config(["experiment=arithmetic_osft"]))
    (run / "config.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _after_the_demo(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)


def test_there_are_commands() -> None:
    programs = {command.text.split()[0] for command in COMMANDS}
    assert set(PROGRAMS) - {"bash", "sbatch"} <= programs
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_a_documented_command_is_taken(command: Command) -> None:
    assert problem_of(command) == ""


def test_scripts_are_named_where_people_look() -> None:
    told = "".join(path.read_text("utf-8") for path in (*DOCUMENTS, ROOT / "Makefile"))
    scripts = [
        path.relative_to(ROOT).as_posix()
        # Those of examples/paper are in a table, by their names.
        for path in [*(ROOT / "examples").glob("*.sh"), *(ROOT / "examples").glob("slurm/*")]
    ]
    assert len(scripts) >= 8
    assert not [script for script in scripts if script not in told]


def planned(words: Sequence[str]) -> str:
    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser)
    return plan_command.run_command(parser.parse_intermixed_args(words))


PLANS = [at for at in COMMANDS if at.text.startswith("python tools/plan_run.py ") and at.shown]


@pytest.mark.parametrize("command", PLANS, ids=lambda command: command.place)
def test_a_plan_that_is_shown_is_what_the_tool_prints(command: Command) -> None:
    shown = [line for line in command.shown if line != "..."]
    printed = [line for line in planned(shlex.split(command.text)[2:]).splitlines() if line]
    assert shown == printed[: len(shown)]


def test_the_table_of_layouts_is_what_the_tool_says() -> None:
    rows = re.findall(
        r"^\| (as the preset.*|`[^|]*`) \| ([\d.]+)(: no)? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) == 10
    for name, *told in rows:
        options = re.findall(r"[\w.]+=[\w.]+", name)
        found = json.loads(planned(["--json", "experiment=sept_qwen2.5_math_7b", *options]))
        seconds, total = found["seconds"], found["seconds_total"]
        assert told == [
            f"{max(found['totals']) / 2**30:.1f}",
            "" if found["fits"] else ": no",
            f"{total - seconds['rollout'] - seconds['push']:.1f}",
            f"{seconds['push']:.2f}",
            f"{total:.1f}",
        ], name


@pytest.mark.parametrize(
    "text",
    [
        "osft trian experiment=arithmetic_osft",
        "osft train experiment=arithmetic_osft train.lrr=1",
        "osft train experiment=arithmetic_osft train.lr=fast ...",
        "osft train experiment=arithmetic_osft parallel.tp=3",
        "osft train experiment=no_such",
        "osft train experiment=arithmetic_osft parallel.tpp=2 # needs GPUs",
        "osft evaluate --run runs/arithmetic evaluation.stepz=[1]",
        "osft evaluate --run runs/arithmetic --lm-eval-argz x",
        "osft report runs/a --sample 5 --outt x",
        "osft doctor experiment=arithmetic_osft train.lrr=1",
        "osft doctor experiment=arithmetic_osft train.lrr=1 ...",
        "python tools/bench_loss.py --no-such",
        "python tools/no_such.py",
        "python tools/plan_run.py --gpu h1000",
        "python tools/plan_run.py experiment=arithmetic_osft parallel.tpp=2",
        "torchrun --nodez 2 -m osft_mcore.cli train ...",
        "torchrun --nnodes 2 -m osft_mcore.cli train parallel.tpp=2 ...",
        "make no-such",
        "bash examples/no_such.sh",
        "sbatch examples/slurm/train.sbatch runs/x experiment=arithmetic_osft train.lrr=1",
        "pip install -r no_such.txt",
        "rm x",
    ],
)
def test_a_command_that_is_wrong_is_found(text: str) -> None:
    assert problem_of(Command(place="here", text=text))


def test_a_refusal_must_be_the_one_that_is_shown() -> None:
    text = "osft train experiment=arithmetic_osft train.lr=fast"
    shown = ("osft: ConfigError", "  - train.lr: found 'fast', expected a number")
    assert problem_of(Command(place="here", text=text, shown=shown)) == ""
    assert problem_of(Command(place="here", text=text, shown=("osft: ConfigError", "  - x")))
    assert problem_of(Command(place="here", text="osft doctor", shown=shown)) == ""

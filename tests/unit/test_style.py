"""The rules of style that no linter checks."""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "osft_mcore").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
FILES = [*PACKAGE, *TOOLS]
MAX_FILE_LINES = 400
MAX_TOOL_LINES = 80
MAX_FUNCTION_LINES = 50
"""Without the docstring: a long explanation is no reason to split a function."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


Function = ast.FunctionDef | ast.AsyncFunctionDef


def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def num_lines(function: Function) -> int:
    """Lines from `def` to the end, docstring left out."""
    assert function.end_lineno is not None
    total = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is None:
        return total
    docstring = function.body[0]
    assert docstring.end_lineno is not None
    return total - (docstring.end_lineno - docstring.lineno + 1)


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def is_config(node: ast.expr) -> bool:
    """`cfg`, `config`, `self.config`, `cfg.rollout` and the like."""
    while isinstance(node, ast.Attribute):
        if node.attr in ("cfg", "config"):
            return True
        node = node.value
    return isinstance(node, ast.Name) and node.id in ("cfg", "config")


def config_lookups(tree: ast.Module) -> list[str]:
    """Calls that read an option by a string, so that neither mypy nor the schema sees it."""
    found = []
    for call in calls(tree):
        match call.func:
            case ast.Attribute(attr="get", value=owner) if is_config(owner):
                found.append(ast.unparse(call))
            case ast.Name(id="getattr" | "setattr") if is_config(call.args[0]):
                found.append(ast.unparse(call))
    return found


def prints(tree: ast.Module) -> list[str]:
    return [
        ast.unparse(call)
        for call in calls(tree)
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]


def found_in(paths: Sequence[Path], find: Callable[[ast.Module], list[str]]) -> dict[str, Any]:
    return {name_of(path): found for path in paths if (found := find(syntax(path)))}


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_there_is_something_to_check() -> None:
    assert len(PACKAGE) > 40
    assert TOOLS


def test_pytest_enters_every_folder_that_has_tests(pytestconfig: pytest.Config) -> None:
    """Its defaults skip some common names, `dist` and `build` among them."""
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(folders) > 2
    skipped = pytestconfig.getini("norecursedirs")
    assert not {name for name in folders if any(fnmatch(name, skip) for skip in skipped)}


def test_files_are_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    limits = dict.fromkeys(PACKAGE, MAX_FILE_LINES) | dict.fromkeys(TOOLS, MAX_TOOL_LINES)
    assert not {name_of(path): n for path, n in lines.items() if n > limits[path]}


def test_functions_are_short() -> None:
    lines = {
        f"{name_of(path)}: {node.name}": num_lines(node)
        for path in FILES
        for node in ast.walk(syntax(path))
        if isinstance(node, Function)
    }
    assert not {name: n for name, n in lines.items() if n > MAX_FUNCTION_LINES}


def test_options_are_read_as_fields() -> None:
    assert not found_in(FILES, config_lookups)


def test_the_package_does_not_print() -> None:
    assert not found_in(PACKAGE, prints)


def test_the_environment_is_read_in_few_places() -> None:
    """Only where a launcher or a library speaks through variables."""
    speakers = ("cli.py", "parallel/", "rollout/vllm_", "evaluation/worker_process.py")
    silent = [
        path
        for path in PACKAGE
        if not path.relative_to(ROOT / "osft_mcore").as_posix().startswith(speakers)
    ]
    reads = re.compile(r"\benviron\b|\bgetenv\b")
    assert not [name_of(p) for p in silent if reads.search(p.read_text(encoding="utf-8"))]


def test_no_file_names_a_place_on_someones_machine() -> None:
    """Placeholders such as /path/to/model are fine; homes and scratch folders are not."""
    private = re.compile(r"(?<![\w.~/<])/(?:home|Users|root|mnt|scratch|work|tmp)/\w+")
    this_file = Path(__file__).resolve()
    found = []
    for path in tracked_files():
        if path.suffix in (".safetensors", ".parquet", ".png") or path.resolve() == this_file:
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [f"{name_of(path)}:{i}" for i, line in enumerate(lines, 1) if private.search(line)]
    assert not found


@pytest.mark.parametrize(
    ("find", "bad", "good"),
    [
        (config_lookups, "self.config.rollout.get('tp', 1)", "table.get('tp', 1)"),
        (config_lookups, "getattr(cfg, 'tp')", "getattr(table, 'tp')"),
        (prints, "print('x')", "console.say('x')"),
    ],
)
def test_the_checks_can_fail(find: Callable[[ast.Module], list[str]], bad: str, good: str) -> None:
    assert find(ast.parse(bad))
    assert not find(ast.parse(good))


def test_the_line_count_leaves_out_the_docstring() -> None:
    (function,) = ast.parse('def f():\n    """a\n\n    b."""\n    x = 1\n    return x\n').body
    assert isinstance(function, ast.FunctionDef)
    assert num_lines(function) == 3

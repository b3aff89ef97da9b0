"""What the program never does: run what came with data, listen outside, give secrets away."""

import ast
import contextlib
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from osft_mcore.config.load import load_config
from osft_mcore.config.schema import LoggingConfig
from osft_mcore.data.arithmetic import TinyModel, write_model_folder
from osft_mcore.errors import ConfigError
from osft_mcore.log.metrics import MetricsLog
from osft_mcore.log.redact import (
    HIDDEN,
    environment_secrets,
    options_with_secrets,
    without_secrets,
)
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.loopback import loopback_store
from osft_mcore.train.inputs import load_chat_tokenizer

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for folder in ("osft_mcore", "tools") for path in sorted((ROOT / folder).rglob("*.py"))
]
SERIALIZERS = ("pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal")
"""Whose files run code when they are read. Not pickletools: it only reads."""
RUNNERS = ("eval", "exec", "compile", "__import__")
SHELLS = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput")
YAML = ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load")
BY_MODULE = (*SHELLS, *YAML, "torch.load")
"""To be called with the module in front."""
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "TCPStore": ("host_name", "port", "world_size", "is_master"),
    "load": ("file", "mmap_mode", "allow_pickle"),
    **dict.fromkeys(
        ("Popen", "run", "call", "check_call", "check_output"),
        ("args", "bufsize", "executable", "stdin", "stdout", "stderr", "preexec_fn", "close_fds",
         "shell"),
    ),
}  # fmt: skip
"""Names of arguments that may be given by their place; `load` is numpy's, `run` subprocess's."""
PICKLING = (
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list", "collective_rpc",
)  # fmt: skip
"""Collectives of torch, and vLLM's calls, that pickle what they send."""
ASKING = ("from_pretrained", "LLM")
"""Calls that run a model's own code if they are told to trust it."""
FORBIDDEN_TEXT = ("VLLM_ALLOW_INSECURE_SERIALIZATION", "0.0.0.0")


@functools.cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def unsafe(tree: ast.Module) -> Iterator[str]:
    """Ways to run code that came with a file, or to be reached from outside."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (a.name for a in names if a.name.split(".")[0] in SERIALIZERS)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in SERIALIZERS:
                yield module
            case ast.ImportFrom(module=str(module), names=names):
                # Calls of them would bear another name than the scan looks for.
                imported = (f"{module}.{alias.name}" for alias in names)
                yield from (name for name in imported if name in BY_MODULE)
            case ast.Call(func=func, args=args, keywords=keywords):
                name = ast.unparse(func)
                by_place = dict(zip(PARAMETERS.get(name.split(".")[-1], ()), args, strict=False))
                yield from unsafe_call(name, by_place | {k.arg: k.value for k in keywords})
            case ast.Dict(keys=keys, values=values):
                named = zip(keys, values, strict=True)
                yield from (
                    "trust_remote_code"
                    for key, value in named
                    if is_constant(key, "trust_remote_code") and not is_the_option(value)
                )


def unsafe_call(func: str, keywords: dict[str | None, ast.expr]) -> Iterator[str]:
    name = func.split(".")[-1]
    if func in (*RUNNERS, *SHELLS, *YAML) or name in PICKLING:
        yield func
    if "shell" in keywords and not is_constant(keywords["shell"], False):
        yield "shell"
    if func == "torch.load" and not is_constant(keywords.get("weights_only"), True):
        yield "torch.load"
    if "allow_pickle" in keywords:
        yield "allow_pickle"
    asks = name in ASKING or "trust_remote_code" in keywords
    if asks and not is_the_option(keywords.get("trust_remote_code")):
        yield "trust_remote_code"
    if name == "TCPStore" and "is_master" in keywords:
        served = not is_constant(keywords["is_master"], False)
        if served and "master_listen_fd" not in keywords:
            yield "TCPStore"


def is_constant(node: ast.expr | None, value: object) -> bool:
    # 0 is no False, and 1 no True.
    return isinstance(node, ast.Constant) and repr(node.value) == repr(value)


def is_the_option(node: ast.expr | None) -> bool:
    """False itself, or what the option `model.trust_remote_code` is handed down as."""
    if node is None:
        return False
    return is_constant(node, False) or ast.unparse(node).split(".")[-1] == "trust_remote_code"


def test_nothing_runs_what_came_with_data_and_nothing_is_open_to_others() -> None:
    assert len(SOURCES) > 150
    found = {
        name_of(path): problems for path in SOURCES if (problems := list(unsafe(syntax(path))))
    }
    assert not found


def test_code_is_asked_whether_to_trust_a_model_somewhere() -> None:
    """The scan above looks for calls by name: they must be there under these names."""
    found = {
        name_of(path)
        for path in SOURCES
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ASKING
    }
    assert found == {
        "osft_mcore/data/tokenizer.py", "osft_mcore/checkpoint/logits.py",
        "osft_mcore/rollout/vllm_engine.py",
    }  # fmt: skip


def test_a_users_own_function_is_the_only_code_that_is_loaded() -> None:
    """evaluation.scorer=file.py:function, in a process with a memory limit and a deadline."""
    loading = re.compile(r"exec_module|runpy|load_module|imp\.load")
    assert [name_of(p) for p in SOURCES if loading.search(p.read_text(encoding="utf-8"))] == [
        "osft_mcore/evaluation/judges.py"
    ]


def test_nothing_names_every_address_or_the_switch_for_pickles() -> None:
    folders = [ROOT / name for name in ("conf", "examples")]
    files = [
        *SOURCES,
        ROOT / "Makefile",
        *(p for f in folders for p in f.rglob("*") if p.is_file()),
    ]
    texts = {name_of(path): path.read_text(encoding="utf-8") for path in files}
    assert not [(name, text) for name in texts for text in FORBIDDEN_TEXT if text in texts[name]]


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("from pickle import load", "from safetensors import safe_open"),
        ("import torch, pickle", "import pickletools"),
        ("torch.load(f)", "torch.load(f, weights_only=True)"),
        ("torch.load(f, weights_only=flag)", "model.load(f)"),
        ("np.load(f, allow_pickle=True)", "np.load(f)"),
        ("eval(text)", "model.eval()"),
        ("exec(text)", "re.compile(text)"),
        ("os.system('ls')", "subprocess.run(['ls'])"),
        ("run('ls', shell=True)", "run(['ls'], shell=False)"),
        ("yaml.load(text)", "yaml.safe_load(text)"),
        ("dist.all_gather_object(out, value)", "dist.all_gather(out, value)"),
        ("LLM(path)", "LLM(path, trust_remote_code=trust_remote_code)"),
        ("Auto.from_pretrained(path)", "Auto.from_pretrained(path, trust_remote_code=False)"),
        ("f(trust_remote_code=True)", "f(trust_remote_code=config.model.trust_remote_code)"),
        ("{'trust_remote_code': True}", "{'trust_remote_code': trust_remote_code}"),
        ("TCPStore(h, 0, None, True)", "TCPStore(h, 0, None, False)"),
        ("TCPStore(h, 0, None, served)", "TCPStore(h, 0)"),
        ("np.load(f, None, True)", "np.load(f, None)"),
        ("Popen(a, -1, None, None, None, None, None, True, True)", "Popen(a, -1)"),
        ("from torch import load", "from safetensors.torch import load"),
        ("from os import path, system as call", "from os import path"),
        ("from subprocess import getoutput", "from subprocess import run"),
        ("from yaml import load", "from yaml import safe_load"),
        ("TCPStore(h, 0, is_master=True)", "TCPStore(h, 0, is_master=True, master_listen_fd=fd)"),
    ],
)
def test_the_scan_can_fail(bad: str, good: str) -> None:
    assert list(unsafe(ast.parse(bad)))
    assert not list(unsafe(ast.parse(good)))


def test_models_are_not_trusted_by_default() -> None:
    assert load_config([]).model.trust_remote_code is False
    presets = (ROOT / "conf").rglob("*.yaml")
    assert not [p.name for p in presets if "trust_remote_code" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("trusted", [False, True])
def test_code_beside_a_model_runs_only_if_the_option_says_so(
    trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where transformers copies such code to.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    folder, mark = tmp_path / "model", tmp_path / "mark"
    write_model_folder(folder, TinyModel())
    code = (
        "from transformers import PreTrainedTokenizerFast\n"
        f"open({str(mark)!r}, 'w').close()\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "own.py").write_text(code, encoding="utf-8")
    file = folder / "tokenizer_config.json"
    options = json.loads(file.read_text(encoding="utf-8"))
    options["auto_map"] = {"AutoTokenizer": [None, "own.Own"]}
    file.write_text(json.dumps(options), encoding="utf-8")
    config = load_config([f"model.path={folder}", f"model.trust_remote_code={trusted}"])
    with contextlib.suppress(ConfigError):
        load_chat_tokenizer(config)
    assert mark.exists() is trusted


def test_the_store_of_the_ranks_is_on_this_machine_only() -> None:
    store = loopback_store()
    hexadecimal = f":{store.port:04X}"
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    served = [line.split()[1] for lines in tables for line in lines if line.split()[3] == "0A"]
    assert [at for at in served if at.endswith(hexadecimal)] == [f"0100007F{hexadecimal}"]


PLANTED = {
    "MY_SERVICE_SECRET": "plain-word-42",
    "DB_PASSWORD": "correct,horse",
    "HF_TOKEN": "tok.en_123",
}


def test_secrets_of_the_environment() -> None:
    others = {
        "PATH": "/usr/bin", "SSH_AUTH_SOCK": "/run/agent.1", "SHORT_TOKEN": "1234567",
        "TOKENIZERS_PARALLELISM": "false---", "A_KEY": "two words", "PWD": "/a/folder",
        "HF_TOKEN_PATH": "/a/folder/token", "GIT_ASKPASS": "/usr/bin/askpass",
        "SSH_ASKPASS": "/usr/bin/askpass", "BYPASS": "localhost", "MONKEY": "longtailed",
    }  # fmt: skip
    assert environment_secrets(PLANTED | others) == tuple(PLANTED.values())


@pytest.mark.parametrize(
    "name",
    [
        "PGPASSWORD", "MYTOKEN", "HFTOKEN", "GHTOKEN", "DOCKERPASSWORD", "NGCAPIKEY", "SSHPASS",
        "DB_PASS", "AWS_SECRET_ACCESS_KEY", "mypassphrase", "CLIENTSECRET",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["plain-word", "/abc/defgh", ".dotted~x", "two words x"])
def test_a_name_that_is_sure_makes_any_value_a_secret(name: str, value: str) -> None:
    assert environment_secrets({name: value}) == (value,)


@pytest.mark.parametrize(
    "value",
    [
        "https://me:pw@host/x.parquet", "hf://datasets/x?tok.en_123", "a correct,horse b",
        ["data.parquet", "s3://key:word@bucket/x"], "hf_" + "aB3" * 11, "ghp_" + "a1" * 18,
        "AKIA" + "ABCD" * 4, "-----BEGIN PRIVATE KEY-----\nMIIE",
    ],
)  # fmt: skip
def test_an_option_that_holds_a_secret_is_refused(value: object) -> None:
    secrets = environment_secrets(PLANTED)
    [problem] = options_with_secrets({"data": {"train": value, "lr": 1}}, secrets)
    assert problem.startswith("data.train: found what looks like a password or a token")


@pytest.mark.parametrize(
    "value",
    [
        "data/train.parquet", "https://host/x", "models--x/snapshots/" + "0123456789" * 4,
        "Answer with one token: yes. Use basic arithmetic.", "runs/hf_qwen25math7binstruct",
        "runs/Qwen2.5-Math-7B_tau0.6_seed1", 7, None, True,
    ],
)  # fmt: skip
def test_an_option_that_holds_none_is_not(value: object) -> None:
    assert options_with_secrets({"data": {"train": value}}, environment_secrets(PLANTED)) == []


def test_messages_keep_everything_but_secrets() -> None:
    secrets = environment_secrets(PLANTED)
    said = "data.train: 'https://me:pw@host/x' and correct,horse: prompt_key=x token: 7"
    shown = f"data.train: 'https://{HIDDEN}@host/x' and {HIDDEN}: prompt_key=x token: 7"
    assert without_secrets(said, secrets) == shown


def test_wandb_gets_options_and_figures_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself it takes the command line, the console, and where the source is from."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "planted-api-key-of-forty-characters-0001")
    monkeypatch.setattr(sys, "argv", ["osft", "planted-argument"])
    monkeypatch.chdir(tmp_path)
    remote = ["remote", "add", "origin", "https://me:planted-remote@host/x.git"]
    for command in (["init", "-q"], remote):
        subprocess.run(["git", *command], check=True)
    run = tmp_path / "run"
    run.mkdir()
    metrics = MetricsLog(
        RunFolder(run, writer=True),
        LoggingConfig(wandb=True),
        {"data": {"train": "shown.parquet"}, "my_token": "planted-token"},
    )
    sys.stderr.write("planted-line\n")
    metrics.write(1, {"loss/nll": 0.5})
    metrics.close()
    kept = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"shown.parquet" in kept
    assert b"loss/nll" in kept
    assert re.findall(rb"planted[\w-]*", kept) == []

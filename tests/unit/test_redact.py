"""Secrets by name and by looks, and what only seems to be one."""

import pytest

from osft_mcore.log.redact import HIDDEN, redacted, redacted_arguments, redacted_text


@pytest.mark.parametrize(
    "name",
    ["wandb_api_key", "API_KEY", "hfToken", "hf-token", "password", "db.passwd", "secret", "AUTH"],
)
def test_by_name(name: str) -> None:
    assert redacted({name: "x"}) == {name: HIDDEN}
    assert redacted({"deep": [{name: ["x", "y"]}]}) == {"deep": [{name: HIDDEN}]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_response_tokens", 64), ("max_tokens_per_micro_batch", None), ("num_tokens", 1.5),
        ("prompt_key", "prompt"), ("response_key", "response_token_ids"), ("tokenizer", "gpt"),
        ("monkey", "x"), ("hf_token", ""), ("keyboard", "x"), ("author", "x"), ("secret", False),
    ],
)  # fmt: skip
def test_what_is_none(name: str, value: object) -> None:
    assert redacted({name: value}) == {name: value}


def test_a_password_of_digits_is_one() -> None:
    assert redacted({"password": 1234}) == {"password": HIDDEN}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/x?a=1", f"https://{HIDDEN}@host/x?a=1"),
        ("https://tok@host", f"https://{HIDDEN}@host"),
        (
            "https://host/x?a=1&access_token=abc&b=2",
            f"https://host/x?a=1&access_token={HIDDEN}&b=2",
        ),
        ("WANDB_API_KEY=abc osft train", f"WANDB_API_KEY={HIDDEN} osft train"),
        ("run --hf-token abc here", f"run --hf-token {HIDDEN} here"),
        ("Authorization: Bearer abcdefgh12345", f"Authorization: Bearer {HIDDEN}"),
        ("hf_" + "aB3" * 8, HIDDEN),
        ("sk-" + "abcd1234" * 3, HIDDEN),
        ("key is ghp_" + "a1" * 12, f"key is {HIDDEN}"),
        ("0123456789abcdef" * 2 + "01234567", HIDDEN),
        ("a " + "aB3x" * 8, f"a {HIDDEN}"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END", HIDDEN),
    ],
)
def test_by_looks(text: str, shown: str) -> None:
    assert redacted_text(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "runs/Qwen2.5-Math-7B_tau0.6_seed1", "train.max_tokens_per_micro_batch=2048",
        "data.prompt_key=prompt_token_ids", "data.response_key: response -> answer",
        "models--x/snapshots/" + "0123456789" * 4 + "/config.json", "https://host:8000/x",
        "alias 95.1%: layers.*.self_attn.qkv_proj", "48a8512aebda+changes", "a@b",
    ],
)  # fmt: skip
def test_text_that_stays(text: str) -> None:
    assert redacted_text(text) == text


def test_arguments() -> None:
    given = ["osft", "train", "--token", "abc", "logging.api_key=abc", "train.max_tokens=4",
             "evaluation.key=7", "seed=1", "--run", "x", "data.prompt_key=prompt"]  # fmt: skip
    assert redacted_arguments(given) == [
        "osft", "train", "--token", HIDDEN, f"logging.api_key={HIDDEN}", "train.max_tokens=4",
        "evaluation.key=7", "seed=1", "--run", "x", "data.prompt_key=prompt",
    ]  # fmt: skip

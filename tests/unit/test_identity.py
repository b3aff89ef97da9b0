"""What a later start says of options that are not those of the checkpoint."""

from osft_mcore.config.load import as_options
from osft_mcore.config.schema import RunConfig, TrainConfig
from osft_mcore.train.identity import changes


def test_an_option_that_is_new_since_then_had_what_is_the_default_now() -> None:
    config = RunConfig(train=TrainConfig(recompute="full"))
    saved = as_options(config)
    assert changes(saved, config) == []
    del saved["train"]["lr"], saved["train"]["recompute"]
    assert changes(saved, config) == ["train.recompute: 'none' -> 'full'"]


def test_options_that_differ_or_are_gone_are_told() -> None:
    saved = as_options(RunConfig(seed=2)) | {"output_dir": "elsewhere", "gone": 3}
    assert changes(saved, RunConfig()) == ["seed: 2 -> 1", "gone: 3 -> None"]

"""Rewrite tests/golden/config_*: run after a reviewed change of the schema or of a preset."""

import argparse
from pathlib import Path

from osft_mcore.config.load import default_config_dir, leaf_paths, load_config, to_yaml

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


def main() -> None:
    """One YAML file per preset in conf/experiment, and the list of all options."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for stale in GOLDEN.glob("config_*"):
        stale.unlink()
    (GOLDEN / "config_keys.txt").write_text("\n".join(leaf_paths()) + "\n", encoding="utf-8")
    for preset in sorted((default_config_dir() / "experiment").glob("*.yaml")):
        text = to_yaml(load_config([f"experiment={preset.stem}"]))
        (GOLDEN / f"config_{preset.stem}.yaml").write_text(text, encoding="utf-8")
        print(f"wrote {preset.stem}")


if __name__ == "__main__":
    main()

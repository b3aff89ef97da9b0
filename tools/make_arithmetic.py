"""Write the demo task: a model folder without weights, SFT traces, train and eval problems."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from osft_mcore.data.arithmetic import ArithmeticTask, TinyModel, describe, write_arithmetic
from osft_mcore.errors import OsftError


def main() -> int:
    """Parse the command line, write the files, say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--overwrite", action="store_true", help="write into a non-empty folder")
    for part in (ArithmeticTask, TinyModel):
        _add_fields(parser.add_argument_group(part.__name__), part)
    args = vars(parser.parse_args())
    try:
        task = ArithmeticTask(**_values(args, ArithmeticTask))
        model = TinyModel(**_values(args, TinyModel))
        files = write_arithmetic(args["out"], task, model, overwrite=args["overwrite"])
    except OsftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(describe(files, task, model))
    return 0


def _add_fields(group: Any, part: type) -> None:
    for field in fields(part):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=field.default, help=" "
            )
        else:
            group.add_argument(flag, type=type(field.default), default=field.default, help=" ")


def _values(args: dict[str, Any], part: type) -> dict[str, Any]:
    return {field.name: args[field.name] for field in fields(part)}


if __name__ == "__main__":
    sys.exit(main())

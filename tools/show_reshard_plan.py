"""Print what a weight push moves for a model and two layouts; needs no weights and no GPU."""

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.errors import OsftError
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.weight_plan import layout_pairs, push_bytes
from osft_mcore.weights.bound import PlanBytes

SIZES = ("tp", "cp", "pp", "vpp", "dp", "rollout_tp")
ITEMSIZE = {"bf16": 2, "fp32": 4}
MIB = 2**20


def main() -> int:
    """Parse the command line, make the plan, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder with a Hugging Face config.json")
    for name in SIZES:
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=1, help="as in osft")
    parser.add_argument("--pairs", action="store_true", help="one line for each usual pair instead")
    parser.add_argument("--vocab-multiple", type=int, default=64, help="as model.vocab_multiple")
    parser.add_argument("--dtype", choices=sorted(ITEMSIZE), default="bf16", help="of the weights")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    try:
        shape = read_model_shape(args.model)
        topologies = (
            list(layout_pairs(shape))
            if args.pairs
            else [Topology(**{name: vars(args)[name] for name in SIZES})]
        )
        count = partial(
            push_bytes, shape, vocab_multiple=args.vocab_multiple, itemsize=ITEMSIZE[args.dtype]
        )
        rows = [_as_json(topology, count(topology)) for topology in topologies]
    except OsftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    shown = rows if args.pairs else rows[0]
    print(json.dumps(shown) if args.json else _pairs(rows) if args.pairs else _ranks(rows[0]))
    return 0


def _as_json(topology: Topology, found: PlanBytes) -> dict[str, object]:
    totals = {name: getattr(found, name) for name in ("received", "least", "ratio", "imbalance")}
    return dataclasses.asdict(topology) | dataclasses.asdict(found) | totals


def _ranks(row: dict) -> str:
    names = ("sent", "received", "least", "local")
    lines = [f"{'rank':>5} " + " ".join(f"{name:>10}" for name in names) + "   (MiB)"]
    for at in row["ranks"]:
        lines.append(f"{at['rank']:5d} " + " ".join(f"{at[name] / MIB:10.1f}" for name in names))
    return "\n".join([*lines, _pairs([row])])


def _pairs(rows: list[dict]) -> str:
    names = (*SIZES, "num_copies")
    head = " ".join(f"{name:>10}" for name in (*names, "received", "least", "ratio", "imbalance"))
    return "\n".join([head, *(
        " ".join(f"{row[name]:10d}" for name in names)
        + f" {row['received'] / MIB:10.1f} {row['least'] / MIB:10.1f}"
        + f" {row['ratio']:10.2f} {row['imbalance']:10.2f}"
        for row in rows
    )])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

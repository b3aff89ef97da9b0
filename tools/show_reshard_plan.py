"""Print what a weight push moves for a model and two layouts; needs no weights and no GPU."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from osft_mcore.actor.megatron_layout import actor_layouts
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.errors import ConfigError, OsftError
from osft_mcore.parallel.topology import Topology
from osft_mcore.rollout.vllm_layout import engine_layouts
from osft_mcore.weights.bound import PlanBytes, plan_bytes
from osft_mcore.weights.plan import check_all_used, make_plan

ITEMSIZE = {"bf16": 2, "fp32": 4}
MIB = 2**20


def main() -> int:
    """Parse the command line, make the plan, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder with a Hugging Face config.json")
    for name in ("tp", "pp", "dp", "rollout-tp"):
        parser.add_argument(f"--{name}", type=int, default=1, help="as the option of that name")
    parser.add_argument("--vocab-multiple", type=int, default=128, help="as model.vocab_multiple")
    parser.add_argument("--dtype", choices=sorted(ITEMSIZE), default="bf16", help="of the weights")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    try:
        found = _plan_bytes(args)
    except OsftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(_as_json(found)) if args.json else _as_table(found))
    return 0


def _plan_bytes(args: argparse.Namespace) -> PlanBytes:
    topology = Topology(tp=args.tp, pp=args.pp, dp=args.dp, rollout_tp=args.rollout_tp)
    sizes = (args.tp, args.pp, args.dp, args.rollout_tp, args.vocab_multiple)
    if min(sizes) < 1 or topology.world_size % args.rollout_tp:
        raise ConfigError(
            f"--rollout-tp {args.rollout_tp} must divide the world of tp * pp * dp = "
            f"{topology.world_size} ranks, and every size must be at least 1"
        )
    shape = read_model_shape(args.model)
    sources = actor_layouts(
        shape, topology, vocab_multiple=args.vocab_multiple, transformer_engine=False
    )
    targets = engine_layouts(shape, topology)
    plan = make_plan(sources, targets)
    check_all_used(sources, plan)
    return plan_bytes(plan, sources, targets, itemsize=ITEMSIZE[args.dtype])


def _as_json(found: PlanBytes) -> dict[str, object]:
    total = {name: getattr(found, name) for name in ("received", "least", "ratio", "imbalance")}
    return dataclasses.asdict(found) | total


def _as_table(found: PlanBytes) -> str:
    lines = [f"{'rank':>5} {'sent':>10} {'received':>10} {'least':>10} {'local':>10}   (MiB)"]
    for at in found.ranks:
        sizes = (at.sent, at.received, at.least, at.local)
        lines.append(f"{at.rank:5d} " + " ".join(f"{size / MIB:10.1f}" for size in sizes))
    lines.append(
        f"{found.num_copies} copies; received {found.received / MIB:.1f} MiB, lower bound "
        f"{found.least / MIB:.1f} MiB, ratio {found.ratio:.2f}; busiest sender "
        f"{found.imbalance:.2f} times the mean"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

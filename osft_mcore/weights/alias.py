"""Which target parameters may be a rank's own source parameters, and why the others may not."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from osft_mcore.errors import WeightError
from osft_mcore.weights.layout import Layout, Layouts, merged
from osft_mcore.weights.params import EMBEDDING, OUTPUT

Mode = Literal["auto", "alias", "copy", "reload"]
OTHER_ORDER: Final = "the engine keeps the same rows in another order"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """On `rank`, the target parameter is the memory of the source parameter: no copy."""

    rank: int
    src_param: str
    dst_param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How parameters of one kind (the same name but for the layer) reach their targets."""

    kind: str
    reason: str
    """Why they are copied; empty: they are aliased."""
    num_parameters: int
    """Over all ranks."""
    elements: int

    @property
    def aliased(self) -> bool:
        """True if nothing is copied."""
        return not self.reason


def choose_aliases(
    mode: Mode, sources: Layouts, targets: Layouts, *, forbidden: str = ""
) -> tuple[Alias, ...]:
    """What `sync.mode` makes of a pair of layouts; none if `forbidden` says why not.

    Raises WeightError if the mode is `alias` and more would have to be copied than fused
    parameters whose rows the engine keeps in another order.
    """
    aliases = find_aliases(sources, targets) if mode in ("auto", "alias") and not forbidden else ()
    if mode == "alias":
        problems = [
            f"{delivery.kind}: {delivery.reason}"
            for delivery in deliveries(sources, targets, aliases, forbidden=forbidden)
            if delivery.reason not in ("", OTHER_ORDER)
        ]
        if problems:
            raise WeightError(
                "\n".join(
                    [
                        "sync.mode: alias needs actor and engine to lay parameters out alike, but "
                        "these would have to be copied; choose auto, or make them match "
                        "(parallel.tp = rollout.tp, parallel.pp = 1, model.vocab_multiple = 64):",
                        *problems,
                    ]
                )
            )
    return aliases


def find_aliases(sources: Layouts, targets: Layouts) -> tuple[Alias, ...]:
    """Every target parameter that its own rank holds, row for row, as one source parameter.

    Pure: the same on every rank. Both sides must have the same dtype.
    """
    found = []
    for rank in sorted(targets):
        by_content = {_content(layout): name for name, layout in sources.get(rank, {}).items()}
        for name, layout in targets[rank].items():
            source = by_content.get(_content(layout))
            if source is not None:
                found.append(Alias(rank=rank, src_param=source, dst_param=name))
    return tuple(found)


def deliveries(
    sources: Layouts, targets: Layouts, aliases: tuple[Alias, ...], *, forbidden: str
) -> tuple[Delivery, ...]:
    """One entry per kind of target parameter and reason, in the targets' order.

    `forbidden`: why no alias may be at all, for example because the user chose to copy; if it is
    empty, the reason is looked for in the layouts.
    """
    aliased = {(alias.rank, alias.dst_param) for alias in aliases}
    found: dict[tuple[str, str], list[int]] = {}
    for rank in sorted(targets):
        for name, layout in targets[rank].items():
            reason = ""
            if (rank, name) not in aliased:
                reason = forbidden or _why_not(layout, sources.get(rank, {}))
            entry = found.setdefault((kind_of(name), reason), [0, 0])
            entry[0] += 1
            entry[1] += layout.shape[layout.dim] * layout.row_elements
    return tuple(
        Delivery(kind=kind, reason=reason, num_parameters=number, elements=elements)
        for (kind, reason), (number, elements) in found.items()
    )


def delivery_lines(found: tuple[Delivery, ...]) -> list[str]:
    """For people: what is aliased, what is copied and why, as shares of the engines' elements."""
    sizes: Counter[str] = Counter()
    for delivery in found:
        sizes[delivery.reason] += delivery.elements
    lines = []
    # What is aliased first, then the largest part.
    for reason in sorted(sizes, key=lambda reason: (reason != "", -sizes[reason])):
        group = [delivery for delivery in found if delivery.reason == reason]
        share = sizes[reason] / sizes.total()
        kinds = _listed([delivery.kind for delivery in group])
        verb = "alias" if not reason else "reload" if reason == "sync.mode=reload" else "copy"
        lines.append(f"{verb} {share:.1%}: {kinds}" + (f" ({reason})" if reason else ""))
    return lines


def _listed(kinds: list[str]) -> str:
    return ", ".join(kind.removeprefix("model.").removesuffix(".weight") for kind in kinds)


def kind_of(name: str) -> str:
    """A parameter's name without the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _content(layout: Layout) -> tuple[object, ...]:
    return layout.shape, layout.dim, layout.intervals


def _why_not(wanted: Layout, held: Mapping[str, Layout]) -> str:
    """Why no parameter of `held`, all of one rank, can be `wanted`."""
    tensors = {interval.tensor for interval in wanted.intervals} - {None}
    near = [
        layout
        for layout in held.values()
        if tensors <= {interval.tensor for interval in layout.intervals}
    ]
    if not near:
        return "other pipeline stages hold it"
    if all(layout.shape != wanted.shape for layout in near):
        if tensors <= {EMBEDDING, OUTPUT}:
            return "the engine cuts or pads the vocabulary otherwise: rollout.tp, vocab_multiple"
        return "the engine's shards have another shape than the actor's: rollout.tp"
    if any(merged(layout.intervals) == merged(wanted.intervals) for layout in near):
        return OTHER_ORDER
    return "this rank's engine needs other rows than its actor holds"

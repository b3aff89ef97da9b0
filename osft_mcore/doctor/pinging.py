"""The ping between ranks: who takes part, over which backends, and what is said of it."""

import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from osft_mcore.doctor.facts import Finding, Section, fact, note, problem
from osft_mcore.doctor.versions import IMPORT_S
from osft_mcore.errors import ConfigError
from osft_mcore.files import nearest_existing
from osft_mcore.parallel.ping import PATIENCE_S, Backend, Meeting, Ping
from osft_mcore.parallel.world import local_world_size

LOOK_S: Final = IMPORT_S + PATIENCE_S
"""Until the slowest host has looked at itself, importing vLLM for instance."""
SLOW_NETWORK: Final = 1e9
"""Bytes a second between hosts; a push of the weights goes that way."""
_APART: Final = (
    "output_dir: {} is not the folder that rank 0 has under that name; all hosts have to share it: "
    "name a folder on a shared file system, or mount it here"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a rank tells rank 0 before they ping; JSON."""

    host: str
    can_nccl: bool
    problems: tuple[str, ...] = ()
    """Of its host, from the first rank there."""
    exit_code: int = 0
    blocks: bool = False
    """One of them keeps ranks from speaking to each other."""
    versions: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinged:
    """What every rank knows afterwards, and rank 0 alone the section."""

    section: Section
    exit_code: int
    """Of the first rank whose host has a problem; 0: none."""
    apart: str
    """Why this rank's run folder is not that of rank 0; empty if it is."""


def word(
    problems: Sequence[str], *, exit_code: int, blocks: bool, versions: Mapping[str, str] | None
) -> Word:
    """Of this rank."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Word(
        host=socket.gethostname(),
        can_nccl=gpus >= local_world_size(),
        problems=tuple(problems),
        exit_code=exit_code,
        blocks=blocks,
        versions=versions,
    )


def ping_ranks(meeting: Meeting, mine: Mapping[str, Any], folder: Path | None) -> Pinged:
    """Everybody's word, then each backend that all have. Every rank of the meeting must call.

    `mine`: a Word as plain values; `folder`: that all hosts have to share, None: not looked at.
    Raises ConfigError or DeadlinePassed on the ranks that notice.
    """
    words = [Word(**said) for said in meeting.gather("word", mine, within_s=LOOK_S)]
    backends: list[Backend] = meeting.tell(
        "backends", lambda: backends_for(words), within_s=2 * LOOK_S
    )
    pings = [meeting.ping(backend) for backend in backends]
    apart, told = _apart(meeting, words, folder)
    codes = [said.exit_code for said in words] + [ConfigError.exit_code * any(told)]
    code: int = meeting.tell("code", lambda: next(filter(None, codes), 0))
    meeting.leave()
    words = [
        replace(said, problems=(*said.problems, *filter(None, [text])))
        for said, text in zip(words, told or [""] * len(words), strict=True)
    ]
    return Pinged(section=ping_section(words, pings), exit_code=code, apart=apart)


def _apart(meeting: Meeting, words: Sequence[Word], folder: Path | None) -> tuple[str, list[str]]:
    """Why this rank's folder is not rank 0's, and on rank 0 everybody's answer to that.

    Rank 0 puts an empty file there, which the first rank of every other host has to see.
    """
    mark: Path | None = None

    def make() -> str:
        nonlocal mark
        if folder is not None and sum(said.versions is not None for said in words) > 1:
            # Where nothing can be written, that has been said.
            with suppress(OSError):
                handle, name = tempfile.mkstemp(
                    prefix=".osft-doctor-", dir=nearest_existing(folder)
                )
                os.close(handle)
                mark = Path(name)
        return "" if mark is None else mark.name

    name: str = meeting.tell("mark", make)
    if not name:
        return "", []
    try:
        seen = folder is None
        if folder is not None:
            with suppress(OSError):
                seen = (nearest_existing(folder) / name).exists()
        apart = "" if seen else _APART.format(folder)
        return apart, meeting.gather("apart", apart)
    finally:
        if mark is not None:
            mark.unlink(missing_ok=True)


def backends_for(words: Sequence[Word]) -> list[Backend]:
    """None where a host cannot speak: the others would wait for it."""
    if any(said.blocks for said in words):
        return []
    return ["gloo", "nccl"] if all(said.can_nccl for said in words) else ["gloo"]


def ping_section(words: Sequence[Word], pings: Sequence[Ping]) -> Section:
    """For people; nothing on ranks that were told nothing. Pure."""
    return Section(
        title="ping",
        findings=(
            *_hosts(words),
            *(finding for ping in pings for finding in _ping(words, ping)),
            *_absent(words, pings),
        ),
    )


def _hosts(words: Sequence[Word]) -> Iterator[Finding]:
    for host in _names(words):
        ranks = [at for at, said in enumerate(words) if said.host == host]
        yield fact(f"{host}: {_count(len(ranks), 'rank')} ({_span(ranks)})")
        # Rank 0's own were said before.
        told = [said for at, said in enumerate(words) if said.host == host and at]
        yield from (problem(f"{host}: {text}") for said in told for text in said.problems)
    versions = {said.host: said.versions for said in words if said.versions}
    first = versions.get(words[0].host) if words else None
    for host, found in versions.items():
        for name in sorted({*found, *(first or {})}):
            mine, theirs = (first or {}).get(name), found.get(name)
            if mine != theirs:
                yield note(f"{name}: {mine} on {words[0].host}, {theirs} on {host}")


def _ping(words: Sequence[Word], ping: Ping) -> Iterator[Finding]:
    name = {"gloo": "gloo", "nccl": "NCCL"}[ping.backend]
    if not ping.round_trips:
        yield fact(f"{name}: one rank, which spoke to itself")
        return
    for host in _names(words):
        trips = {
            at: ping.round_trips[at - 1]
            for at, said in enumerate(words)
            if at and said.host == host
        }
        if trips:
            slowest = max(trips, key=lambda rank: trips[rank])
            least = f"{1e3 * min(trips.values()):.3g} to " if len(trips) > 1 else ""
            yield fact(
                f"{name}, rank 0 to {host} and back: {least}{1e3 * trips[slowest]:.3g} ms "
                f"(rank {slowest})"
            )
    rate = ping.bus_bytes_per_s
    yield fact(
        f"{name}, sum of {ping.num_bytes / 2**20:g} MiB over {_count(len(words), 'rank')}: "
        f"{1e3 * ping.seconds:.3g} ms, {rate / 1e9:.3g} GB/s a rank"
    )
    if len(_names(words)) > 1 and rate < SLOW_NETWORK:
        yield note(
            f"{name} is slow between hosts; does {name.upper()}_SOCKET_IFNAME name the fastest "
            "network that they share?"
        )


def _absent(words: Sequence[Word], pings: Sequence[Ping]) -> Iterator[Finding]:
    if words and not pings:
        yield note("not tried: problems above come first")


def _names(words: Sequence[Word]) -> list[str]:
    return list(dict.fromkeys(said.host for said in words))


def _span(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

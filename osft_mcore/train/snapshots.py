"""What waits for the evaluator: a folder each, which counts once it has its READY file."""

# Files only. The process that trains makes entries and the evaluator removes them.

import hashlib
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from osft_mcore.config.schema import RunConfig
from osft_mcore.errors import ConfigError
from osft_mcore.files import flush, json_bytes, parse_json, replace_file

READY: Final = "READY"
"""Written last; says what is to be scored."""
FAILED: Final = "FAILED_"
"""Begins a file beside the entries; the rest of the name is the entry's, which cannot be scored."""
END: Final = "END"
"""Beside the entries, once there will be no more of them."""

At = tuple[int, float]
"""Which evaluation: after which step, at which temperature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One evaluation to make."""

    step: int
    temperature: float
    number: int
    """In the order of asking; decides among those of one step."""
    weights: str
    """A Hugging Face folder, as an absolute path; empty: what the run started from."""

    @property
    def at(self) -> At:
        """Which one it is."""
        return self.step, self.temperature


def snapshots_folder(config: RunConfig) -> Path:
    """Where entries are; runs that share evaluation.snapshots have a folder each."""
    run = Path(config.output_dir).resolve()
    if not config.evaluation.snapshots:
        return run / "snapshots"
    token = hashlib.sha256(str(run).encode()).hexdigest()[:12]
    return Path(config.evaluation.snapshots) / f"osft-{run.name}-{token}"


def entry_folder(queue: Path, at: At) -> Path:
    """Of one evaluation; also where its weights are, if they are for it alone."""
    step, temperature = at
    return queue / f"step_{step}_temperature_{temperature:g}"


def publish(queue: Path, entry: Entry) -> None:
    """Let the evaluator have it: what it names is there."""
    folder = entry_folder(queue, entry.at)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / READY, json_bytes(asdict(entry)))
    flush(queue)


def is_waiting(queue: Path, at: At) -> bool:
    """Published, and not removed yet."""
    return (entry_folder(queue, at) / READY).is_file()


def waiting(queue: Path) -> list[Entry]:
    """All of them, in the order in which they are to be scored."""
    read = map(_read, queue.glob(f"step_*/{READY}"))
    found = [entry for entry in read if isinstance(entry, Entry)]
    return sorted(found, key=lambda entry: (entry.step, entry.number))


def fail_damaged(queue: Path) -> list[str]:
    """Remove the entries that cannot be read, and leave word of each; returns what is wrong."""
    lines = []
    for marker in queue.glob(f"step_*/{READY}"):
        if isinstance(why := _read(marker), str):
            lines.append(f"{marker} cannot be read: {why}")
            replace_file(queue / (FAILED + marker.parent.name), lines[-1].encode(errors="replace"))
            _remove(marker.parent)
    return lines


def failure(queue: Path, at: At) -> str:
    """What is left of one that could not be read; empty if there is no word of it."""
    with suppress(OSError):
        return (queue / (FAILED + entry_folder(queue, at).name)).read_text(encoding="utf-8")
    return ""


def withdraw(queue: Path, at: At) -> None:
    """Remove an entry and the weights in it. Half removed it does not count any more."""
    _remove(entry_folder(queue, at))


def _remove(folder: Path) -> None:
    (folder / READY).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def clear(queue: Path, *, keep: Collection[At] = ()) -> list[Entry]:
    """Remove everything but whole entries in `keep`; returns the whole ones that are gone."""
    there = waiting(queue)
    kept = {entry_folder(queue, at) for at in keep if is_waiting(queue, at)}
    for word in (queue / END, *queue.glob(f"{FAILED}*")):
        word.unlink(missing_ok=True)
    for path in queue.glob("step_*_temperature_*"):
        if path not in kept:
            shutil.rmtree(path)
    with suppress(OSError):
        # Not empty, or not there.
        queue.rmdir()
    return [entry for entry in there if entry.at not in keep]


@contextmanager
def told(queue: Path) -> Iterator[None]:
    """An OSError inside is an error for users, which names the option."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"evaluation.snapshots: {queue}, which an earlier start may have left, cannot be "
            f"cleared and written again: {error.strerror}; remove it, or name another folder"
        ) from error


def announce_end(queue: Path) -> None:
    """No entry will be added."""
    queue.mkdir(parents=True, exist_ok=True)
    replace_file(queue / END, b"")


def end_announced(queue: Path) -> bool:
    """To be asked before `waiting`: what is there then is all that there will be."""
    return (queue / END).is_file()


def _read(marker: Path) -> Entry | str | None:
    """What is to be scored, or why nobody can tell; None if it has just been removed."""
    try:
        entry = Entry(**parse_json(marker.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        return str(error)
    types = (entry.step, int), (entry.temperature, int | float), (entry.number, int)
    if not all(isinstance(*one) for one in (*types, (entry.weights, str))):
        return f"found {entry}"
    if (name := entry_folder(marker.parent.parent, entry.at).name) != marker.parent.name:
        return f"it is that of {name}"
    return entry

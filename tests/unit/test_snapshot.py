"""What a writer reads while the tensors are changed under it."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from osft_mcore.checkpoint.snapshot import PIECE_BYTES, Snapshot
from osft_mcore.errors import CheckpointError

# Smaller than a piece, exactly one, several, none at all.
SIZES = (3, PIECE_BYTES // 4, PIECE_BYTES, 0, 7)


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator) for size in SIZES]


def later() -> float:
    return time.monotonic() + 60


def flat(values: Iterator[Iterator[memoryview]]) -> Iterator[tuple[int, bytes]]:
    for number, pieces in enumerate(values):
        for piece in pieces:
            yield number, bytes(piece)


def content(pieces: list[tuple[int, bytes]]) -> list[bytes]:
    return [b"".join(piece for at, piece in pieces if at == number) for number in range(len(SIZES))]


def test_changed_after_any_piece_the_old_values_are_read() -> None:
    expected = [tensor.numpy().tobytes() for tensor in tensors()]
    buffers: dict[int, Tensor] = {}
    num_pieces = len(list(flat(Snapshot(tensors(), {}).values())))
    assert num_pieces > len(SIZES)
    for cut in range(num_pieces + 1):
        live = tensors()
        snapshot = Snapshot(live, buffers)
        reader = flat(snapshot.values())
        pieces = [next(reader) for _ in range(cut)]
        snapshot.take(later())
        for tensor in live:
            tensor.zero_()
        snapshot.take(later())  # A second call must not copy what has changed by now.
        assert content(pieces + list(reader)) == expected, cut


def test_only_the_rest_is_copied() -> None:
    buffers: dict[int, Tensor] = {}
    snapshot = Snapshot(tensors(), buffers)
    reader = flat(snapshot.values())
    while next(reader)[0] < 2:
        pass
    snapshot.take(later())
    assert set(buffers) == {2, 3, 4}


def test_a_copy_that_fails_is_told_to_the_reader() -> None:
    snapshot = Snapshot(tensors(), {1: torch.zeros(2)})
    snapshot.take(later())
    with pytest.raises(CheckpointError, match="cannot copy the training state: RuntimeError"):
        list(flat(snapshot.values()))


def test_a_copy_that_is_broken_off_gives_no_older_values(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: dict[int, Tensor] = {}
    Snapshot(tensors(), buffers).take(later())
    snapshot = Snapshot(tensors(), buffers)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot, "_copy_rest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        snapshot.take(later())
    with pytest.raises(CheckpointError, match="broken off"):
        list(flat(snapshot.values()))


def test_given_up_nothing_is_copied() -> None:
    buffers: dict[int, Tensor] = {}
    snapshot = Snapshot(tensors(), buffers)
    snapshot.abandon()
    snapshot.take(later())
    assert buffers == {}


def test_who_changes_the_tensors_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osft_mcore.checkpoint.snapshot.LEAST_PATIENCE_S", 0.1)
    snapshot = Snapshot(tensors(), {})
    snapshot._lock.acquire()
    for deadline in (time.monotonic() + 0.2, time.monotonic() - 100):
        with pytest.raises(CheckpointError, match="timeout_minutes"):
            snapshot.take(deadline)


def test_a_piece_under_way_is_waited_for_after_the_deadline() -> None:
    snapshot = Snapshot(tensors(), {})
    snapshot._lock.acquire()
    threading.Timer(0.2, snapshot._lock.release).start()
    snapshot.take(time.monotonic() - 100)
    assert snapshot._taken


def test_changed_by_another_thread_at_any_time() -> None:
    expected = [tensor.numpy().tobytes() for tensor in tensors()]
    for attempt in range(30):
        live = tensors()
        snapshot = Snapshot(live, {})

        def train(live: list[Tensor], snapshot: Snapshot, delay_s: float) -> None:
            time.sleep(delay_s)
            snapshot.take(later())
            for tensor in live:
                tensor.zero_()

        trainer = threading.Thread(target=train, args=(live, snapshot, attempt * 1e-4))
        trainer.start()
        pieces = list(flat(snapshot.values()))
        trainer.join()
        assert content(pieces) == expected, attempt

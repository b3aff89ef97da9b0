"""Who pings, and what is said of it."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from osft_mcore.doctor.facts import section_lines
from osft_mcore.doctor.pinging import Word, backends_for, ping_section
from osft_mcore.errors import ConfigError, DeadlinePassed
from osft_mcore.parallel.ping import Meeting, Ping

TOLD = {"torch": "2.13.0", "vllm": "0.32.0"}
ONE = Word(host="one", can_nccl=True, versions=TOLD)
TWO = Word(host="two", can_nccl=True, versions=TOLD)
FAST = Ping(backend="nccl", round_trips=(2e-5, 5e-5, 9e-5), num_bytes=2**28, seconds=2**28 / 1e11)


def lines(words: list[Word], pings: list[Ping]) -> str:
    return "\n".join(section_lines(ping_section(words, pings)))


def test_backends() -> None:
    assert backends_for([ONE, TWO]) == ["gloo", "nccl"]
    assert backends_for([ONE, replace(TWO, can_nccl=False)]) == ["gloo"]
    assert backends_for([ONE, replace(TWO, blocks=True)]) == []


def test_bandwidth_is_what_each_rank_has_to_send() -> None:
    assert FAST.bus_bytes_per_s == 2 * 3 / 4 * 1e11
    alone = Ping(backend="gloo", round_trips=(), num_bytes=8, seconds=1.0)
    assert alone.bus_bytes_per_s == 0
    assert "gloo: one rank" in lines([ONE], [alone])


def test_each_host_has_its_round_trip() -> None:
    text = lines([ONE, replace(ONE, versions=None), TWO, TWO], [FAST])
    assert "one: 2 ranks (0, 1)" in text
    assert "NCCL, rank 0 to one and back: 0.02 ms (rank 1)" in text
    assert "NCCL, rank 0 to two and back: 0.05 to 0.09 ms (rank 3)" in text
    assert "sum of 256 MiB over 4 ranks: 2.68 ms, 150 GB/s a rank" in text
    assert "note" not in text


def test_a_slow_network_is_a_note() -> None:
    slow = replace(FAST, backend="gloo", round_trips=(1e-3,), seconds=1.0)
    assert "GLOO_SOCKET_IFNAME" in lines([ONE, TWO], [slow])
    assert "GLOO_SOCKET_IFNAME" not in lines([ONE, ONE], [slow])


def test_problems_and_versions_of_other_hosts_are_told() -> None:
    bad = replace(TWO, problems=("/dev/shm: small",), exit_code=2, blocks=True)
    own = replace(ONE, problems=("said before",), exit_code=2)
    text = lines([own, replace(bad, versions={**TOLD, "vllm": "0.31.0"})], [])
    assert "PROBLEM: two: /dev/shm: small" in text
    assert "said before" not in text
    assert "note: vllm: 0.32.0 on one, 0.31.0 on two" in text
    assert "torch" not in text
    assert "note: not tried" in text


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Meeting]:
    """A rank of three, of which not all come, at a launcher's store on a port."""

    def meeting(rank: int, port: int) -> Meeting:
        told = {
            "RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))
        return Meeting(patience_s=0.5)

    return meeting


def test_ranks_that_do_not_come_are_named(join: Callable[[int, int], Meeting]) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = join(0, server.port), join(1, server.port)
    assert second.gather("word", {"host": "two"}) == []
    with pytest.raises(DeadlinePassed, match=r"no word from rank 2 of 3 within 0\.5 s"):
        first.gather("word", {"host": "one"})
    with pytest.raises(DeadlinePassed, match="no word from rank 0"):
        second.tell("code", lambda: 0)
    told: Any = first.tell("code", lambda: [7])
    assert told == second.tell("code", lambda: 0) == [7]


def test_a_store_that_does_not_answer(join: Callable[[int, int], Meeting]) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9 does not answer rank 1"):
        join(1, 9)


def test_a_host_that_looks_at_itself_for_long_is_waited_for(
    join: Callable[[int, int], Meeting],
) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = join(0, server.port), join(1, server.port)
    late = threading.Timer(1.5, second.gather, args=("word", {"host": "two"}))
    late.start()
    join(2, server.port).gather("word", {"host": "three"})
    words = first.gather("word", {"host": "one"}, within_s=20.0)
    assert [word["host"] for word in words] == ["one", "two", "three"]
    late.join()
    late = threading.Timer(1.5, first.tell, args=("backends", lambda: ["gloo"]))
    late.start()
    assert second.tell("backends", list, within_s=20.0) == ["gloo"]
    late.join()

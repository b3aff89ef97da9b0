"""The process in which foreign code meets model output: JSON lines in, JSON lines out, no torch.

Run as `python -m osft_mcore.evaluation.grading_worker` by worker_process.py. It loads what it needs
once and forks a child that judges; a child that is late or has judged enough is killed and the next
forked, in milliseconds. Memory is capped here.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable

from osft_mcore.evaluation.judges import Judge, Reply, load_judge
from osft_mcore.evaluation.lines import read_line_by, write_by

MAX_JUDGED_PER_CHILD = 500
"""Then it is replaced: the algebra system's caches only grow."""


class Child:
    """A forked process that judges one question after another."""

    def __init__(self, judge: Judge, alarm_s: float, not_inherited: tuple[int, ...]) -> None:
        question_read, self._questions = os.pipe()
        self._replies, reply_write = os.pipe()
        self.num_judged = 0
        self._pid = os.fork()
        if self._pid == 0:
            try:
                # A group of its own: what a scorer starts ends with it.
                os.setpgid(0, 0)
                for descriptor in (self._questions, self._replies, *not_inherited):
                    os.close(descriptor)
                _judge_lines(judge, alarm_s, question_read, reply_write)
            finally:
                os._exit(0)
        os.close(question_read)
        os.close(reply_write)
        os.set_blocking(self._questions, False)

    def ask(self, line: bytes, deadline: float) -> Reply:
        """Its reply; `late` or `died` if there is none by the deadline."""
        self.num_judged += 1
        if write_by(deadline, self._questions, line):
            found = read_line_by(deadline, self._replies)
        else:
            found = b"" if self._is_dead() else None
        if found is None:
            return {"kind": "late"}
        reply: Reply = json.loads(found) if found else {"kind": "died"}
        return reply

    def _is_dead(self) -> bool:
        return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        """End it and what it started, whatever they are doing, and wait until it is gone."""
        # Itself as well: it may not have got as far as to have a group.
        os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._questions)
        os.close(self._replies)


def _judge_lines(judge: Judge, alarm_s: float, questions: int, replies: int) -> None:
    # Nobody kills this process if its parent is dead. Then it does so itself: the default action.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    own_pid = os.getpid()
    with os.fdopen(questions, "rb") as lines:
        for line in lines:
            signal.setitimer(signal.ITIMER_REAL, alarm_s)
            reply = judge(**json.loads(line))
            signal.setitimer(signal.ITIMER_REAL, 0)
            if os.getpid() != own_pid:
                # The function has forked and came back twice: one answer has one reply.
                return
            os.write(replies, _line(reply))


def main() -> None:
    """Answer questions until the parent closes the pipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scorer", required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (args.memory_bytes, args.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What a library prints must not end up between the replies; what it reads is nothing.
    replies, questions = os.dup(sys.stdout.fileno()), os.dup(sys.stdin.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())

    judge = load_judge(args.scorer, args.timeout_s)
    if isinstance(judge, str):
        os.write(replies, _line({"kind": "unusable", "reason": judge}))
        return
    _serve(
        lambda: Child(judge, 2 * args.timeout_s + 1, (replies, questions)),
        args.timeout_s,
        questions,
        replies,
    )


def _serve(new_child: Callable[[], Child], timeout_s: float, questions: int, replies: int) -> None:
    child = new_child()
    os.write(replies, _line({"kind": "ready"}))
    with os.fdopen(questions, "rb", closefd=False) as lines:
        for line in lines:
            reply = child.ask(line, time.monotonic() + timeout_s)
            spent = reply["kind"] in ("late", "died", "error")
            reply["last"] = spent or child.num_judged >= MAX_JUDGED_PER_CHILD
            os.write(replies, _line(reply))
            if reply["last"]:
                child.kill()
                child = new_child()
                os.write(replies, _line({"kind": "ready"}))
    child.kill()


def _line(reply: Reply) -> bytes:
    return json.dumps(reply).encode("ascii") + b"\n"


if __name__ == "__main__":
    main()

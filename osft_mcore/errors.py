"""Errors that a user can act on: what was found, what was expected, which option to change."""

from collections.abc import Sequence


class OsftError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class ConfigError(OsftError):
    """One or more options that cannot work; lists all of them at once."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__("\n".join(f"  - {problem}" for problem in self.problems))


class DataError(OsftError):
    """A data file that lacks what the run needs."""

    exit_code = 3


class WeightError(OsftError):
    """A weight that is missing, unknown, of the wrong shape, or did not arrive."""

    exit_code = 4


class AgreementError(OsftError):
    """The rollout engine and the actor disagree about the same tokens."""

    exit_code = 5


class GradingError(OsftError):
    """Grading that cannot be trusted: no worker, or too many answers left undecided."""

    exit_code = 6


class NonFiniteError(OsftError):
    """Loss or gradient that is NaN or infinite, update after update."""

    exit_code = 7


class CheckpointError(OsftError):
    """A checkpoint that cannot be written, or none that a run could go on from."""

    exit_code = 8


class HarnessError(OsftError):
    """lm-evaluation-harness ended without results."""

    exit_code = 9


class DeadlinePassed(OsftError):
    """A phase took longer than deadlines.* allows."""

    exit_code = 10


class Stopped(OsftError):
    """Told to stop, the run has saved; the same command goes on from there."""

    exit_code = 85


class NothingLeft(OsftError):
    """The run has done all its steps already."""

    exit_code = 86

"""What each command does, as far as options and files are concerned."""

from osft_mcore.config.schema import Phase


def trains(phase: Phase) -> bool:
    """True if it updates weights."""
    return phase in ("train", "sft")


def samples(phase: Phase) -> bool:
    """True if it has a rollout engine."""
    return phase != "sft"


def reads_training_data(phase: Phase) -> bool:
    """True if it needs data.train."""
    return phase != "evaluate"


def scores(phase: Phase) -> bool:
    """True if it reads evaluation.files."""
    return phase in ("train", "evaluate")

"""Where in the run folder an evaluation is."""


def answers_file(step: int, temperature: float) -> str:
    """Every answer, one a line."""
    return f"{_name(step, temperature)}.jsonl"


def result_file(step: int, temperature: float) -> str:
    """All figures, by benchmark."""
    return f"{_name(step, temperature)}.json"


def portions_folder(step: int, temperature: float) -> str:
    """What is graded so far, until all is."""
    return f"{_name(step, temperature)}.portions"


def portion_file(step: int, temperature: float, number: int) -> str:
    """Answers of one portion."""
    return f"{portions_folder(step, temperature)}/{number:05d}.jsonl"


def _name(step: int, temperature: float) -> str:
    return f"evaluations/step_{step}_temperature_{temperature:g}"

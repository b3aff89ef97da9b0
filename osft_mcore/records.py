"""The plain values that travel between the phases of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

GroundTruth = str | tuple[str, ...]
"""An expected answer, or several of which one has to be met."""


def ground_truth_of(kept: str | Sequence[str]) -> GroundTruth:
    """As a file gives it back, which has no tuples."""
    return kept if isinstance(kept, str) else tuple(map(str, kept))


def listed(golds: GroundTruth) -> list[str]:
    """For a column of lists."""
    return [golds] if isinstance(golds, str) else list(golds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, rendered and tokenised once at load time."""

    row: int
    """Index in the data set; identifies the prompt for sampling seeds."""
    prompt_id: str
    """Stable id for grouping results: the file's `id` column, or `<data_source>/<row>`."""
    data_source: str
    text: str
    """The rendered prompt, chat template applied."""
    token_ids: tuple[int, ...]
    ground_truth: GroundTruth
    messages: tuple[Message, ...] = ()
    """What `text` was rendered from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one call of the rollout engine samples."""

    temperature: float
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    num_samples: int = 1
    logprobs: bool = True
    """False leaves Response.token_logprobs empty, where nothing compares them."""
    max_tokens: int
    seed: int
    """Run seed; the seed of each sample is a function of (seed, step, row, sample)."""
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One sampled answer, with everything the gate needs to check it."""

    prompt: Prompt
    sample_index: int
    token_ids: tuple[int, ...]
    """First response token through the first EOS inclusive."""
    token_logprobs: tuple[float, ...]
    """log pi(token) as the rollout engine saw it, at rollout.engine.reported_temperature."""
    truncated: bool
    """True if the token limit ended it before an EOS."""
    weight_version: int
    replica: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One (prompt, response) pair to train on: sampled (OSFT) or given (SFT)."""

    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...] | None = None
    """Log-probabilities to hold the actor's against; None for given answers."""
    replica: int = 0
    """Rollout replica that sampled it."""
    trained: bool = True
    """False keeps it out of the loss (an answer cut off by the token limit, if so chosen)."""
    row: int | None = None
    """Where data.train has it; None for sampled answers."""

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt_token_ids) + len(self.response_token_ids)

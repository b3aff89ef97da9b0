"""Prompts and answers of random tokens, for models of random weights."""

import random

from osft_mcore.records import Example


def token_examples(
    num: int,
    vocab: int,
    *,
    responses: tuple[int, int] = (1, 12),
    seed: int = 5,
    untrained_every: int | None = None,
) -> list[Example]:
    """Prompts of 1 to 6 tokens; responses are as long as the two bounds say.

    `untrained_every`: the last of every so many is not trained on.
    """
    rng = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(rng.randint(low, high)))

    return [
        Example(
            prompt_token_ids=ids(1, 6),
            response_token_ids=ids(*responses),
            trained=not untrained_every or number % untrained_every != 0,
        )
        for number in range(1, num + 1)
    ]

"""The real vLLM engine for forked ranks, and independent answers to hold it against."""

import itertools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import transformers

# Importing costs more than everything else here. A forked rank imports nothing again, so the
# parts that vLLM imports only when an engine starts are imported here as well.
import vllm.v1.worker.cpu_model_runner
import vllm.v1.worker.cpu_worker  # noqa: F401
from torch_engine import processed_logprobs
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform

from osft_mcore.actor.actor import Actor
from osft_mcore.config.schema import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
)
from osft_mcore.data.tokenizer import ChatTokenizer
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock, MetricsLog
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.groups import ParallelContext, join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Example, Prompt, Response, Sampling
from osft_mcore.rollout.engine import sample_seed
from osft_mcore.rollout.vllm_cpu import prepare_environment
from osft_mcore.rollout.vllm_engine import VllmEngine
from osft_mcore.train.edge import StepEdge
from osft_mcore.train.loop import OsftLoop
from osft_mcore.train.scores import InlineScores
from osft_mcore.train.vllm import build_engine
from osft_mcore.weights.sync import WeightSync

if not current_platform.is_cpu():
    pytest.skip("these tests run vLLM's CPU build", allow_module_level=True)

SEED = 5
EOS_IDS = (1, 2)
BLOCK = 128
"""vLLM's CPU build caches prefixes in blocks of this many tokens; shorter ones never."""
MAX_PROMPT, MAX_RESPONSE = 160, 24


def random_prompts(count: int, *, vocab: int, prefix: int = 0) -> list[Prompt]:
    """Prompts of different lengths that share their first `prefix` tokens."""
    generator = torch.Generator().manual_seed(SEED)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab, (length,), generator=generator).tolist())

    shared = tokens(prefix)
    return [
        Prompt(
            row=row,
            prompt_id=f"random/{row}",
            data_source="random",
            text="",
            token_ids=shared + tokens(5 + row % 7),
            ground_truth="",
        )
        for row in range(count)
    ]


def sampling(temperature: float, *, step: int = 1, **options: Any) -> Sampling:
    return Sampling(
        temperature=temperature,
        seed=SEED,
        step=step,
        **{"max_tokens": MAX_RESPONSE, **options},
    )


def run_config(folder: Path, topology: Topology, **sections: Any) -> RunConfig:
    """fp32, sized for `random_prompts`."""
    return RunConfig(
        seed=SEED,
        model=ModelConfig(path=str(folder), dtype="fp32"),
        parallel=ParallelConfig(**topology.actor_sizes()),
        rollout=RolloutConfig(
            tp=topology.rollout_tp,
            max_prompt_tokens=MAX_PROMPT,
            max_response_tokens=MAX_RESPONSE,
            kv_cache_gib=0.05,
        ),
        data=DataConfig(train="never read"),
        **sections,
    )


def join(topology: Topology) -> ParallelContext:
    return join_groups(topology, device=torch.device("cpu"))


def start_engine(config: RunConfig, context: ParallelContext) -> VllmEngine:
    """As `osft train` does, but for a model without a tokenizer."""
    tokenizer = ChatTokenizer(
        eos_token_ids=frozenset(EOS_IDS), response_eos_id=EOS_IDS[0], hf_tokenizer=None
    )
    return build_engine(config, context, tokenizer)


class NoEdge:
    """Between two steps nothing is saved, and nobody asks to stop."""

    def listening(self) -> AbstractContextManager[None]:
        return nullcontext()

    def stop_before(self, _num_done: int) -> None:
        pass

    def passed(self, _step: int, **_state: Any) -> None:
        pass

    def finish(self) -> None:
        pass


def bare_loop(
    config: RunConfig,
    actor: Actor,
    engine: VllmEngine,
    sync: WeightSync,
    *,
    prompts: Sequence[Prompt],
    num_steps: int,
    out: Path,
) -> OsftLoop:
    """The real loop without files to read, evaluation or checkpoints. Collective."""
    folder = RunFolder(out, writer=actor.context.rank == 0)
    folder.create()
    dist.barrier()
    return OsftLoop(
        config=config,
        num_steps=num_steps,
        num_done=0,
        prompts=prompts,
        actor=actor,
        engine=engine,
        sync=sync,
        scores=InlineScores(None),
        decode=str,
        folder=folder,
        metrics=MetricsLog(folder, config.logging, {}),
        console=Console(enabled=False),
        clock=Clock(),
        edge=cast(StepEdge, NoEdge()),
    )


def examples_of(responses: Sequence[Response]) -> list[Example]:
    """What the loop would train on."""
    return [
        Example(
            prompt_token_ids=response.prompt.token_ids,
            response_token_ids=response.token_ids,
            rollout_logprobs=response.token_logprobs,
            replica=response.replica,
        )
        for response in responses
    ]


def stock_answers(
    _rank: int, folder: Path, prompts: Sequence[Prompt], asked: Sequence[Sampling]
) -> list[list[tuple[list[int], list[float]]]]:
    """Token ids and log-probabilities from vLLM as it comes, loaded from `folder`; by `asked`.

    Neither VllmEngine nor its view of the weights takes part: packed kernels, vLLM's own loader.
    """
    prepare_environment()
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=MAX_PROMPT + MAX_RESPONSE,
        kv_cache_memory_bytes=50 * 2**20,
        enable_prefix_caching=False,
        enforce_eager=True,
        logprobs_mode="processed_logprobs",
    )
    answers = []
    for how in asked:
        # Saves seconds of compiling two functions that touch no log-probability.
        with torch.compiler.set_stance("force_eager"):
            outputs = llm.generate(
                [TokensPrompt(prompt_token_ids=list(prompt.token_ids)) for prompt in prompts],
                [_stock_params(how, prompt) for prompt in prompts],
                use_tqdm=False,
            )
        answers.append([_ids_and_logprobs(output.outputs[0]) for output in outputs])
    return answers


def _stock_params(how: Sampling, prompt: Prompt) -> SamplingParams:
    return SamplingParams(
        temperature=how.temperature,
        max_tokens=how.max_tokens,
        seed=sample_seed(seed=how.seed, step=how.step, row=prompt.row, sample=0),
        stop_token_ids=list(EOS_IDS),
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )


def _ids_and_logprobs(completion: Any) -> tuple[list[int], list[float]]:
    token_ids = list(completion.token_ids)
    positions = zip(token_ids, completion.logprobs, strict=True)
    return token_ids, [position[token].logprob for token, position in positions]


def largest_difference(folder: Path, responses: Sequence[Response], how: Sampling) -> float:
    """max |response.token_logprobs - transformers'| for the weights in `folder`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    texts = [[*r.prompt.token_ids, *r.token_ids] for r in responses]
    longest = max(map(len, texts))
    tokens_BS = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    with torch.no_grad():
        logits_BSV = model(tokens_BS).logits
    return largest(
        abs(float(processed_logprobs(logits_BSV[i, at], how)[token]) - logprob)
        for i, response in enumerate(responses)
        for at, token, logprob in zip(
            itertools.count(len(response.prompt.token_ids) - 1),
            response.token_ids,
            response.token_logprobs,
            strict=False,
        )
    )


def largest(differences: Iterable[float]) -> float:
    """The largest, or NaN if any is NaN: max() passes over a NaN that does not come first."""
    return float(torch.tensor(list(differences), dtype=torch.float64).max())

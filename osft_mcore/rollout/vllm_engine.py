"""vLLM in the ranks of the actor: tensor parallel over consecutive ranks, replicas beside."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Read by vLLM while it is imported: quiet start, no telemetry, the engine in this process.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from osft_mcore.config.schema import RolloutConfig
from osft_mcore.errors import ConfigError, WeightError
from osft_mcore.parallel.groups import ParallelContext, all_gather_json
from osft_mcore.records import Prompt, Response, Sampling
from osft_mcore.rollout.engine import sample_seed, samples_whole_vocabulary
from osft_mcore.rollout.vllm_cpu import (
    eager_sampling,
    live_weights,
    prepare_environment,
    private_shared_memory,
)


class VllmEngine:
    """The `RolloutEngine` protocol on vLLM's external launcher. Starts with dummy weights."""

    def __init__(
        self,
        model_path: str,
        *,
        rollout: RolloutConfig,
        dtype: torch.dtype,
        seed: int,
        stop_token_ids: Sequence[int],
        context: ParallelContext,
    ) -> None:
        prepare_environment()
        self.context = context
        self.stop_token_ids = sorted(stop_token_ids)
        self.enforce_eager = rollout.enforce_eager
        self.weight_version: int | None = None
        on_cpu = context.device.type == "cpu"
        memory: dict[str, Any] = (
            {"kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30)}
            if on_cpu
            else {"gpu_memory_utilization": rollout.gpu_memory_utilization}
        )
        run_token = all_gather_json(secrets.token_hex(4), context)[0]
        timeout_s = int(60 * context.timeout_minutes)
        with live_weights(), private_shared_memory(run_token), _refusal_as_config_error():
            self.llm = LLM(
                model_path,
                # Real weights arrive through the bridge; nothing is read from disk twice.
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=dtype,
                tensor_parallel_size=rollout.tp,
                data_parallel_size=context.topology.num_replicas,
                distributed_executor_backend="external_launcher",
                max_model_len=rollout.max_prompt_tokens + rollout.max_response_tokens,
                max_num_seqs=rollout.max_num_seqs,
                enforce_eager=rollout.enforce_eager,
                enable_prefix_caching=True,
                logprobs_mode=_logprobs_mode(rollout),
                disable_log_stats=True,
                distributed_timeout_seconds=timeout_s,
                cpu_distributed_timeout_seconds=timeout_s,
                seed=seed,
                **memory,
            )

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
        """Sample answers; replica r takes every num_replicas-th prompt, starting at r."""
        if self.weight_version is None:
            raise WeightError(
                "rollout: asked to generate while the engine's weights are incomplete; "
                "a push must finish first"
            )
        topology, place = self.context.topology, self.context.coordinates
        mine = [
            (position, sample)
            for position in range(place.replica, len(prompts), topology.num_replicas)
            for sample in range(sampling.num_samples)
        ]
        with eager_sampling(enforce_eager=self.enforce_eager):
            outputs = self.llm.generate(
                [TokensPrompt(prompt_token_ids=list(prompts[p].token_ids)) for p, _ in mine],
                [self._params(sampling, prompts[p].row, sample) for p, sample in mine],
                use_tqdm=False,
            )
        answers = []
        if place.rollout_tp_rank == 0:
            answers = [
                [*key, *_answer(output.outputs[0])]
                for key, output in zip(mine, outputs, strict=True)
            ]
        gathered = all_gather_json([self.weight_version, answers], self.context)
        responses = [
            Response(
                prompt=prompts[position],
                sample_index=sample,
                token_ids=tuple(token_ids),
                token_logprobs=tuple(logprobs),
                truncated=truncated,
                weight_version=version,
                replica=rank // topology.rollout_tp,
            )
            for rank, (version, part) in enumerate(gathered)
            for position, sample, token_ids, logprobs, truncated in part
        ]
        order = {id(prompt): position for position, prompt in enumerate(prompts)}
        return sorted(responses, key=lambda r: (order[id(r.prompt)], r.sample_index))

    def begin_update(self) -> dict[str, Tensor]:
        """Close the engine for sampling; returns the live parameters, by vLLM name."""
        self.weight_version = None
        worker = self.llm.llm_engine.model_executor.driver_worker.worker
        return {name: p.data for name, p in worker.get_model().named_parameters()}

    def finish_update(self, version: int) -> None:
        """Open the engine at `version`; prefixes cached under other weights are forgotten."""
        if not self.llm.reset_prefix_cache():
            raise WeightError(
                f"rollout: vLLM still holds requests while weight version {version} arrives; their "
                "cached prefixes belong to older weights"
            )
        self.weight_version = version

    def close(self) -> None:
        """Stop vLLM. It takes torch.distributed's world down with it, so this comes last."""
        self.llm.llm_engine.engine_core.shutdown()

    def _params(self, sampling: Sampling, row: int, sample: int) -> SamplingParams:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=sample_seed(seed=sampling.seed, step=sampling.step, row=row, sample=sample),
            stop_token_ids=self.stop_token_ids,
            # The end-of-text ids are in stop_token_ids; vLLM has no tokenizer to know them from.
            ignore_eos=True,
            logprobs=0 if sampling.logprobs else None,
            detokenize=False,
        )


@contextlib.contextmanager
def _refusal_as_config_error() -> Iterator[None]:
    """vLLM raises ValueError where a model or the memory does not suit it."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(
            f"rollout: vLLM cannot start: {error} (options: rollout.gpu_memory_utilization on GPU, "
            "rollout.kv_cache_gib on CPU, rollout.max_prompt_tokens, rollout.max_response_tokens, "
            "rollout.max_num_seqs, model.path)"
        ) from error


def _logprobs_mode(rollout: RolloutConfig) -> str:
    """vLLM's name for what `reported_temperature` says; it leaves temperature out by default."""
    whole = samples_whole_vocabulary(top_p=rollout.top_p, top_k=rollout.top_k)
    return "processed_logprobs" if whole else "raw_logprobs"


def _answer(completion: Any) -> tuple[list[int], list[float], bool]:
    token_ids = list(completion.token_ids)
    logprobs = []
    if completion.logprobs is not None:
        pairs = zip(token_ids, completion.logprobs, strict=True)
        logprobs = [position[token].logprob for token, position in pairs]
    return token_ids, logprobs, completion.finish_reason == "length"

"""vLLM in the ranks of the actor: tensor parallel over consecutive ranks, replicas beside."""

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Read by vLLM while it is imported: quiet start, no telemetry, the engine in this process.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import RolloutConfig
from osft_mcore.errors import ConfigError, WeightError
from osft_mcore.parallel.groups import ParallelContext, all_gather_json
from osft_mcore.records import Prompt, Response, Sampling
from osft_mcore.rollout.engine import sample_seed, samples_whole_vocabulary
from osft_mcore.rollout.vllm_cpu import (
    cpu_options,
    eager_sampling,
    live_parameters,
    prepare_environment,
    private_shared_memory,
    return_freed_memory,
)
from osft_mcore.rollout.vllm_layout import engine_layouts
from osft_mcore.rollout.vllm_reload import reload_model
from osft_mcore.weights.layout import Layouts


class VllmEngine:
    """The `RolloutEngine` protocol on vLLM's external launcher. Starts with dummy weights.

    `live_weights`: parameters keep their plain layout, to be written in place or shared. Without,
    vLLM packs them as it likes, and `reload` is the only way in.
    """

    def __init__(
        self,
        model_path: str,
        *,
        rollout: RolloutConfig,
        dtype: torch.dtype,
        seed: int,
        stop_token_ids: Sequence[int],
        context: ParallelContext,
        live_weights: bool,
        trust_remote_code: bool,
    ) -> None:
        prepare_environment()
        self.shape = read_model_shape(model_path)
        self.context = context
        self.live_weights = live_weights
        self.stop_token_ids = sorted(stop_token_ids)
        self.enforce_eager = rollout.enforce_eager
        self.weight_version: int | None = None
        self.refusal: str | None = None
        run_token = all_gather_json(secrets.token_hex(4), context)[0]
        timeout_s = int(60 * context.timeout_minutes)
        max_model_len = rollout.max_prompt_tokens + rollout.max_response_tokens
        own: dict[str, Any] = {"gpu_memory_utilization": rollout.gpu_memory_utilization}
        if context.device.type == "cpu":
            own = cpu_options(kv_cache_gib=rollout.kv_cache_gib, max_model_len=max_model_len)
        layout = live_parameters() if live_weights else contextlib.nullcontext()
        with layout, private_shared_memory(run_token), _refusal_as_config_error():
            self.llm = LLM(
                model_path,
                # Real weights arrive through the bridge; nothing is read from disk twice.
                load_format="dummy",
                skip_tokenizer_init=True,
                trust_remote_code=trust_remote_code,
                dtype=dtype,
                tensor_parallel_size=rollout.tp,
                data_parallel_size=context.topology.num_replicas,
                distributed_executor_backend="external_launcher",
                max_model_len=max_model_len,
                max_num_seqs=rollout.max_num_seqs,
                enforce_eager=rollout.enforce_eager,
                enable_prefix_caching=True,
                logprobs_mode=_logprobs_mode(rollout),
                disable_log_stats=True,
                distributed_timeout_seconds=timeout_s,
                cpu_distributed_timeout_seconds=timeout_s,
                seed=seed,
                **own,
            )

    @property
    def layouts(self) -> Layouts:
        """Of vLLM's parameters, by global rank."""
        return engine_layouts(self.shape, self.context.topology)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
        """Sample answers; replica r takes every num_replicas-th prompt, starting at r."""
        if self.weight_version is None:
            raise WeightError(
                f"rollout: {self.refusal}; a push must succeed first"
                if self.refusal
                else "rollout: asked to generate while the engine's weights are incomplete; "
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
        """Close the engine for sampling; returns the live parameters, by vLLM name.

        Without `live_weights` they are not for writing: what vLLM multiplies by is elsewhere.
        """
        self.weight_version = None
        return {name: p.data for name, p in self._model.named_parameters()}

    def share(self, memory: Mapping[str, Tensor]) -> None:
        """Make `memory` the parameters of these vLLM names; what they held before is freed.

        A tied head follows its embedding: the two are one parameter. Raises WeightError, before
        anything is changed, for a name, shape, dtype, device or stride that does not fit, and
        where vLLM has fixed the place of its weights.
        """
        if not self.live_weights:
            raise WeightError(
                "rollout: sync.mode=reload lets vLLM pack weights: none can be shared"
            )
        if not self.enforce_eager:
            raise WeightError(
                "rollout: CUDA graphs would go on reading what a shared weight replaces; expected "
                "rollout.enforce_eager=true or sync.mode=copy"
            )
        params = dict(self._model.named_parameters())
        problems = [
            problem
            for name, tensor in memory.items()
            if (problem := _misfit(name, params.get(name), tensor))
        ]
        if problems:
            raise WeightError("\n".join(problems))
        changed = [name for name in memory if params[name].data_ptr() != memory[name].data_ptr()]
        for name in changed:
            params[name].data = memory[name].detach()
        if changed:
            return_freed_memory()

    def reload(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take every Hugging Face tensor through vLLM's own loader.

        Raises WeightError, after the last one, if a tensor is missing, unknown, of another shape
        or came twice, or if a tied head did not follow its embedding.
        """
        problems = reload_model(self._worker, tensors, self.shape)
        if problems:
            raise WeightError("\n".join(problems))

    def finish_update(self, version: int) -> None:
        """Open the engine at `version`; prefixes cached under other weights are forgotten."""
        if not self.llm.reset_prefix_cache():
            raise WeightError(
                f"rollout: vLLM still holds requests while weight version {version} arrives; their "
                "cached prefixes belong to older weights"
            )
        self.weight_version, self.refusal = version, None

    def refuse(self, reason: str) -> None:
        """Stay closed, and give `reason` when asked to generate, until an update finishes."""
        self.weight_version, self.refusal = None, reason

    def close(self) -> None:
        """Stop vLLM. It takes torch.distributed's world down with it, so this comes last."""
        self.llm.llm_engine.engine_core.shutdown()

    @property
    def _worker(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker

    @property
    def _model(self) -> nn.Module:
        model: nn.Module = self._worker.get_model()
        return model

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


def _misfit(name: str, held: Tensor | None, offered: Tensor) -> str | None:
    """Why `offered` cannot become the parameter, in words."""
    if held is None:
        return f"asked to share {name!r}, which vLLM does not have"
    expected, found = _form(held), _form(offered)
    if found != expected:
        return f"asked to share {name!r} as {found}, but vLLM's parameter is {expected}"
    return None


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, stride {tensor.stride()}"


def _answer(completion: Any) -> tuple[list[int], list[float], bool]:
    token_ids = list(completion.token_ids)
    logprobs = []
    if completion.logprobs is not None:
        pairs = zip(token_ids, completion.logprobs, strict=True)
        logprobs = [position[token].logprob for token, position in pairs]
    return token_ids, logprobs, completion.finish_reason == "length"

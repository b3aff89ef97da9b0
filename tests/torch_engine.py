"""A rollout engine that can be checked by eye: a whole transformers model on every rank."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import transformers
from torch import Tensor

from osft_mcore.config.model_shape import model_shape
from osft_mcore.config.schema import RunConfig
from osft_mcore.data.tokenizer import ChatTokenizer
from osft_mcore.errors import WeightError
from osft_mcore.parallel.groups import ParallelContext, all_gather_json
from osft_mcore.records import Prompt, Response, Sampling
from osft_mcore.rollout.engine import sample_seed, samples_whole_vocabulary
from osft_mcore.weights.layout import Layouts
from osft_mcore.weights.params import hf_layouts


def build_torch_engine(
    config: RunConfig, context: ParallelContext, tokenizer: ChatTokenizer
) -> "TorchEngine":
    """In vLLM's place, for `run_osft`."""
    stop = sorted(tokenizer.eos_token_ids)
    return TorchEngine(config.model.path, stop_token_ids=stop, context=context)


class TorchEngine:
    """The `RolloutEngine` protocol, token by token. The weights are NaN until the first push."""

    def __init__(
        self, model_path: str, *, stop_token_ids: Sequence[int], context: ParallelContext
    ) -> None:
        config = transformers.AutoConfig.from_pretrained(model_path)
        self.model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for parameter in self.model.parameters():
            parameter.data.fill_(torch.nan)
        self.stop_token_ids = frozenset(stop_token_ids)
        self.context = context
        self.weight_version: int | None = None
        self.refusal: str | None = None

    @property
    def layouts(self) -> Layouts:
        """Every rank holds every Hugging Face tensor, whole."""
        shape = model_shape(self.model.config.to_dict(), source="config")
        return dict.fromkeys(range(self.context.topology.world_size), hf_layouts(shape))

    def close(self) -> None:
        """Nothing to free."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
        """Replica r takes prompts r, r + num_replicas, ...; the ranks of a replica all sample."""
        if self.weight_version is None:
            if self.refusal:
                raise WeightError(f"rollout: {self.refusal}; a push must succeed first")
            raise WeightError("rollout: the weights are incomplete; a push must finish first")
        topology, place = self.context.topology, self.context.coordinates
        mine = [
            (position, sample)
            for position in range(place.replica, len(prompts), topology.num_replicas)
            for sample in range(sampling.num_samples)
        ]
        answers = self._sample([(prompts[position], sample) for position, sample in mine], sampling)
        told = list(zip(mine, answers, strict=True)) if place.rollout_tp_rank == 0 else []
        responses = {
            (position, sample): Response(
                prompt=prompts[position],
                sample_index=sample,
                token_ids=tuple(token_ids),
                token_logprobs=tuple(logprobs),
                truncated=token_ids[-1] not in self.stop_token_ids,
                weight_version=version,
                replica=rank // topology.rollout_tp,
            )
            for rank, (version, part) in enumerate(
                all_gather_json([self.weight_version, told], self.context)
            )
            for (position, sample), (token_ids, logprobs) in part
        }
        return [responses[key] for key in sorted(responses)]

    def begin_update(self) -> dict[str, Tensor]:
        self.weight_version = None
        return {name: parameter.data for name, parameter in self.model.named_parameters()}

    def share(self, memory: Mapping[str, Tensor]) -> None:
        params = dict(self.model.named_parameters())
        for name, tensor in memory.items():
            held = params.get(name)
            if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
                raise WeightError(f"rank {self.context.rank}: {name!r} cannot be shared")
        for name, tensor in memory.items():
            params[name].data = tensor.detach()

    def reload(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        params = dict(self.model.named_parameters())
        arrived = set()
        for name, tensor in tensors:
            if name not in params or params[name].shape != tensor.shape:
                raise WeightError(f"reload: tensor {name!r} does not fit")
            params[name].data.copy_(tensor)
            arrived.add(name)
        missing = [name for name in params if name not in arrived]
        if missing:
            raise WeightError(f"reload: tensors {missing} are missing")

    def finish_update(self, version: int) -> None:
        self.weight_version, self.refusal = version, None

    def refuse(self, reason: str) -> None:
        self.weight_version, self.refusal = None, reason

    @torch.no_grad()
    def _sample(
        self, asked: Sequence[tuple[Prompt, int]], sampling: Sampling
    ) -> list[tuple[list[int], list[float]]]:
        """Token ids and their log-probabilities; the whole text is read again for every token."""
        generators = [
            torch.Generator().manual_seed(
                sample_seed(seed=sampling.seed, step=sampling.step, row=prompt.row, sample=sample)
            )
            for prompt, sample in asked
        ]
        answers: list[tuple[list[int], list[float]]] = [([], []) for _ in asked]
        running = list(range(len(asked)))
        for _ in range(sampling.max_tokens):
            if not running:
                break
            texts = [[*asked[i][0].token_ids, *answers[i][0]] for i in running]
            for i, logits_V in zip(running, self._next_logits(texts), strict=True):
                logprobs_V = processed_logprobs(logits_V, sampling)
                token = draw(logprobs_V, generators[i])
                answers[i][0].append(token)
                if not samples_whole_vocabulary(top_p=sampling.top_p, top_k=sampling.top_k):
                    logprobs_V = logits_V.double().log_softmax(-1)
                answers[i][1].append(float(logprobs_V[token]))
            running = [i for i in running if answers[i][0][-1] not in self.stop_token_ids]
        return answers

    def _next_logits(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Padding stands on the right, where a causal model does not look."""
        longest = max(len(text) for text in texts)
        tokens_BS = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        logits_BSV = self.model(tokens_BS, use_cache=False).logits
        return [logits_BSV[i, len(text) - 1] for i, text in enumerate(texts)]


def processed_logprobs(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """log pi after temperature, top-k and top-p, in float64; at temperature 0 all on the best."""
    if sampling.temperature == 0:
        best_V = torch.full_like(logits_V, -torch.inf, dtype=torch.float64)
        best_V[logits_V.argmax()] = 0.0
        return best_V
    scaled_V = logits_V.double() / sampling.temperature
    order_V = scaled_V.argsort(descending=True, stable=True)
    probs_V = scaled_V[order_V].softmax(-1)
    kept_V = probs_V.cumsum(-1) - probs_V < sampling.top_p
    if sampling.top_k:
        kept_V &= torch.arange(len(kept_V)) < sampling.top_k
    return scaled_V.index_fill(0, order_V[~kept_V], -torch.inf).log_softmax(-1)


def draw(logprobs_V: Tensor, generator: torch.Generator) -> int:
    """Inverse of the cumulative distribution: one uniform number a token, on any machine."""
    cumulative_V = logprobs_V.exp().cumsum(-1)
    uniform = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative_V[-1]
    return int(torch.searchsorted(cumulative_V, uniform, right=True))

"""Every option and every default, once. YAML in conf/ states choices; this file decides."""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Final, Literal

from pydantic import Field, with_config

from osft_mcore.config.schema_evaluation import EvaluationConfig

Phase = Literal["train", "sft", "generate", "evaluate"]
"""Which command: `osft train` samples the answers that it learns, to `osft sft` they are given,
`osft generate` only samples them, and `osft evaluate` only scores. See config/phases.py."""

Recompute = Literal["none", "selective", "full"]
"""See `TrainConfig.recompute`."""

Offload = Literal["none", "optimizer", "all"]
"""See `TrainConfig.offload`."""

MAX_LOGPROB_DIFF: Final = MappingProxyType({"fp32": 1e-3, "bf16": 2.0})
MEAN_LOGPROB_DIFF: Final = MappingProxyType({"fp32": 1e-4, "bf16": 0.05})
"""`SyncConfig` where it leaves them to the dtype, in nats. One bf16 rounding moves a single rare
token by whole tenths, so in bf16 the mean is the sharp criterion."""


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model to train, as a Hugging Face folder."""

    path: str = ""
    """Folder with config.json, tokenizer and safetensors."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` needs only config.json and the tokenizer; weights come from `seed`."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype of actor and rollout; the optimizer always keeps fp32 copies."""
    vocab_multiple: int = 64
    """The actor's vocabulary is padded to a multiple of this and of parallel.tp. 64 is what vLLM
    does, so that the two can share the embedding."""
    trust_remote_code: bool = False
    """Let Python files in the model's folder run, as some tokenizers need. No model that can be
    trained here does."""


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """The actor's layout. world = tp * cp * pp * dp."""

    tp: int = 1
    """Tensor parallel size."""
    pp: int = 1
    """Pipeline parallel size."""
    vpp: int = 1
    """Model chunks per pipeline stage (interleaved schedule); more than 1 needs pp > 1."""
    dp: int = 1
    """Data parallel size."""
    cp: int = 1
    """Context parallel size: each sequence is cut over so many ranks, all layers through. It is
    padded to a multiple of 2 * cp, and sequences are always packed."""
    sequence_parallel: bool = False
    """Shard activations along the sequence between tensor-parallel regions; needs tp > 1."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the ranks that hold the same weights (dp * cp)."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.pp * self.dp


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class AnnealingConfig:
    """Sampling temperature over the run: rollout.tau_sample -> end_tau."""

    mode: Literal["off", "linear", "cosine"] = "off"
    end_tau: float = 1.0
    epochs: int = 2
    """Length in epochs, unless `steps` is given."""
    steps: int | None = None
    """Length in steps; overrides `epochs`."""


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How answers are sampled."""

    tp: int = 1
    """Tensor parallel size of the rollout engine; replicas = world / tp."""
    tau_sample: float = 0.6
    """Sampling temperature of the training answers."""
    annealing: AnnealingConfig = field(default_factory=AnnealingConfig)
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    num_samples: int = 1
    """Answers per prompt (G)."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted."""
    max_response_tokens: int = 3072
    max_num_seqs: int = 256
    """Sequences that the engine runs at once, per replica."""
    gpu_memory_utilization: float = 0.5
    """Share of GPU memory for the rollout engine (weights and KV cache)."""
    kv_cache_gib: float = 0.5
    """KV cache per rank on CPU, in GiB."""
    enforce_eager: bool = True
    """False lets vLLM capture CUDA graphs."""


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    """What an update minimises, over the tokens of the model's own answers."""

    objective: Literal["cross_entropy", "entropy"] = "cross_entropy"
    """`cross_entropy`: of the answers' tokens. `entropy` (EM-FT): of the model where it predicts
    them, whichever token was sampled there."""
    entropy_coef: float = 1.0
    """Multiplies the objective `entropy`."""
    tau_train: float = 1.0
    """Temperature of the loss. Independent of rollout.tau_sample, unless follow_tau_sample."""
    follow_tau_sample: bool = False
    """The temperature of the loss is the sampling temperature of the step, annealed or not;
    tau_train is then left out."""
    aggregation: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    normalization: Literal["global", "per_microbatch"] = "global"
    """`global`: over the whole optimizer batch, independent of the layout.
    `per_microbatch`: mean of micro-batch means, as the reference systems do."""
    train_on_truncated: bool = True
    """Train on answers that hit rollout.max_response_tokens."""
    kl_coef: float = 0.0
    """Adds this times an estimate of KL(model || reference) at each token, both at tau_train. 0: no
    reference model is built. `osft train` only."""
    kl_kind: Literal["k1", "abs", "k2", "k3"] = "k3"
    """The estimate; formulas: `kl_estimate` in loss/objectives.py. With the objective cross_entropy
    k1 has the gradient of that loss itself, times -kl_coef: it holds nothing back."""
    reference: str = ""
    """Folder of the reference model, which has the shape of model.path. Empty: the starting
    model."""


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Batches, optimizer, schedule, length of the run."""

    steps: int | None = None
    """Rollout batches to train on; None: `epochs` passes over the data. `osft generate` makes one
    pass, of at most this many batches."""
    epochs: int = 1
    prompts_per_step: int = 128
    """Prompts per rollout batch."""
    prompts_per_update: int = 64
    """Prompts per optimizer update; prompts_per_step / prompts_per_update updates a step."""
    micro_batch_size: int = 4
    """Sequences per forward pass and data-parallel rank."""
    max_tokens_per_micro_batch: int | None = None
    """Instead of micro_batch_size: sequences packed end to end share a forward pass, as many as fit
    into this many tokens. Results are the same, without padding, but for what cp and sequence
    parallelism need. The tokens are those of the whole row: with cp > 1 a rank computes 1 / cp of
    them. Not in fp32 where layers are Transformer Engine's."""
    recompute: Recompute = "none"
    """Activations that the backward pass computes again instead of keeping them: of `selective` the
    MLPs, of `full` whole layers. Changes memory and speed, not results."""
    recompute_loss: bool = False
    """The backward pass computes the logits again. Otherwise gradients of hidden states and output
    weight are kept from the loss on, in fp32; this helps where a second such gradient of the output
    weight (vocabulary / tp * hidden) is too much. Changes memory and speed, not results."""
    offload: Offload = "none"
    """What is in host memory while nobody needs it. `optimizer`: fp32 master weights and Adam's
    moments, but for the optimizer's step; gradient buffers exist during updates alone. `all`: also
    the weights, while answers are sampled. Changes memory and speed, not results."""
    lr: float = 1e-7
    lr_schedule: Literal["constant", "cosine"] = "constant"
    lr_warmup_steps: int = 10
    lr_min_ratio: float = 0.0
    """Cosine ends at lr * lr_min_ratio."""
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    max_skipped_updates: int = 3
    """Updates whose loss or gradient is not finite are skipped; this many in a row stop the run."""


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Training data and how prompts are rendered."""

    folder: str = "data"
    """Where benchmarks lie that evaluation.files names."""
    train: str = ""
    """Parquet file. `osft train` and `osft generate`: prompt, data_source,
    reward_model.ground_truth. `osft sft`: prompt_key and response_key."""
    prompt_key: str = "prompt"
    """Column with the prompt: text or messages; for `osft sft` token ids, too."""
    response_key: str = "response"
    """Column with the given answer: text, or token ids, which are taken as they are (no
    end-of-answer token is added). `osft sft` only."""
    shuffle: bool = True
    system_prompt: str = ""
    """Put before the user turn, if not empty."""
    prompt_suffix: str = ""
    """Appended to the user turn."""
    chat_template: str | None = None
    """File with a Jinja chat template; None: the tokenizer's own. Not for prompts that are token
    ids."""


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlinesConfig:
    """Minutes that a phase may take, on any rank. Then the run ends, and names the ranks that it
    waited for; collectives fail a little later by themselves."""

    slack: float = 10.0
    """Once a rollout, an update or a push is over, the next ones may take this many times their
    longest so far, at least 5 minutes, and never more than below; 0: always what is below."""
    start: float = 30.0
    """Building actor and engine; also what comes between phases, until the first update."""
    rollout: float = 60.0
    """The answers of one step."""
    train: float = 60.0
    """The updates of one step."""
    sync: float = 10.0
    """One push of the weights."""
    evaluate: float = 120.0
    """One evaluation at one temperature; of `osft evaluate`, one portion."""
    save: float = 30.0
    """Waiting for a checkpoint, or the final export."""


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Training checkpoints, from which a run resumes exactly, and the export at its end."""

    every: int = 0
    """Save after every this many steps and after the last; 0: only when the run is told to stop. A
    run that is killed before its first checkpoint begins anew."""
    async_: Annotated[bool, Field(alias="async")] = True
    """Written as `async`. Files are written by a thread while training goes on; what it has not
    read when the optimizer comes is copied to host memory first."""
    keep_last: int = 2
    """The newest checkpoints that stay; older ones are deleted, but see keep_every."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are never deleted; 0: none."""
    resume: str = "auto"
    """`auto`: go on from the newest checkpoint of output_dir whose files are whole, if a run is
    there; `osft generate` goes on after its last batch. `never`: refuse a folder that holds a run.
    Else the path of a checkpoint, or of a run."""
    verify: bool = True
    """Before resuming, hold the SHA-256 of every file against the manifest; false: its size."""
    stop_after: str | None = None
    """Save and stop in time for this much running time, as in `3h50m`. SLURM_JOB_END_TIME is
    heeded in any case."""
    timeout_minutes: float = 20.0
    """A save that takes longer has failed."""
    max_failures: int = 3
    """This many failed saves in a row stop the run."""
    final: bool = True
    """Export the final model as a Hugging Face folder, hf/."""
    max_shard_gib: float = 4.0
    """Largest safetensors file of that export."""

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_gib` in bytes."""
        return int(self.max_shard_gib * 2**30)


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class SyncConfig:
    """The weight bridge and the agreement gate."""

    mode: Literal["auto", "alias", "copy", "reload"] = "auto"
    """How weights reach the engine. `copy`: into memory of its own. `alias`: it reads the actor's
    memory; an error if more than reordered attention weights would have to be copied. `auto`: per
    parameter `alias` where it can be, else `copy`. `reload`: through vLLM's own loader, for engines
    that repack weights."""
    verify: Literal["off", "sample", "full"] = "sample"
    """Compare digests of both sides after every push: of some elements of every copy (other ones
    each time), or of all."""
    bucket_mib: int = 256
    """Buffers of a push, per rank; larger tensors are sent in parts. `reload` also needs room for
    the largest tensor whole, and for what vLLM holds of one layer."""
    max_logprob_diff: float | None = None
    """Stop when any token's log-probability differs by more. None: `MAX_LOGPROB_DIFF`."""
    mean_logprob_diff: float | None = None
    """Stop when the mean difference is larger. None: `MEAN_LOGPROB_DIFF`."""

    @property
    def bucket_bytes(self) -> int:
        """`bucket_mib` in bytes."""
        return self.bucket_mib * 2**20


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """What a run prints and keeps."""

    progress: bool = True
    """Progress bar on a terminal; plain lines otherwise."""
    every: int = 1
    """Print one console line every this many steps."""
    rollouts: bool = True
    """Keep rollouts/step_N.jsonl."""
    wandb: bool = False
    wandb_project: str = "osft-mcore"


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """report.html in output_dir, written by a process of its own."""

    at_end: bool = True
    """When the run ends, and when it was told to stop."""
    every_minutes: float = 10.0
    """Also while it runs, at most so often; 0: no."""


@with_config(extra="forbid")
@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run. Modules receive their own section, never the whole."""

    output_dir: str = "runs/default"
    seed: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    deadlines: DeadlinesConfig = field(default_factory=DeadlinesConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

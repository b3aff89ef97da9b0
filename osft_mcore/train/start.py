"""The beginning of a run: its folder, its manifest, and what the console says."""

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from osft_mcore.actor.actor import Actor
from osft_mcore.config.load import to_yaml
from osft_mcore.config.model_shape import ModelShape, read_model_shape
from osft_mcore.config.schema import RunConfig
from osft_mcore.log.console import Console
from osft_mcore.log.manifest import manifest
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.model.build import kernels_in_use
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.train.inputs import data_hashes


def build_actor(
    config: RunConfig, context: ParallelContext, checkpoint: Path | None = None
) -> Actor:
    """The actor of this rank, weights loaded; `checkpoint`: from there. Every rank must call."""
    return Actor(
        read_model_shape(config.model.path),
        context,
        model=config.model,
        parallel=config.parallel,
        train=config.train,
        algorithm=config.algorithm,
        max_response_tokens=config.rollout.max_response_tokens,
        seed=config.seed,
        checkpoint=checkpoint,
    )


def open_folder(
    config: RunConfig, context: ParallelContext, data_files: Sequence[str]
) -> RunFolder:
    """Create the run folder with config.yaml and manifest.json. Collective over the world.

    Raises ConfigError on every rank if the folder is in use.
    """
    folder = RunFolder(config.output_dir, writer=context.rank == 0)
    folder.check_unused()
    # Rank 0 must not create the folder before the others have looked.
    dist.barrier(group=context.world_group)
    folder.create()
    folder.write_text("config.yaml", to_yaml(config))
    if folder.writer:
        details = {"kernels": kernels_in_use(), **data_hashes(data_files)}
        world_size = context.topology.world_size
        folder.write_json(
            "manifest.json", manifest(seed=config.seed, world_size=world_size, details=details)
        )
    return folder


def say_start(console: Console, config: RunConfig, shape: ModelShape, *, num_steps: int) -> None:
    """What runs here: model, layouts, kernels, temperatures, length."""
    parallel, rollout = config.parallel, config.rollout
    console.say(f"run folder: {config.output_dir}")
    console.say(
        f"model: {shape.model_type}, {shape.num_parameters / 1e6:.2f}M parameters, "
        f"{config.model.dtype}, from {config.model.path} ({config.model.init})"
    )
    console.say(
        f"actor: Megatron-Core tp={parallel.tp} pp={parallel.pp} dp={parallel.dp}"
        f"{f' vpp={parallel.vpp}' if parallel.vpp > 1 else ''}"
        f"{' +sp' if parallel.sequence_parallel else ''};  rollout: vLLM tp={rollout.tp}"
    )
    kernels = ", ".join(f"{part}: {kernel}" for part, kernel in kernels_in_use().items())
    console.say(f"kernels: {kernels}")
    console.say(
        f"tau_sample {rollout.tau_sample:g} (annealing {rollout.annealing.mode}), "
        f"tau_train {config.algorithm.tau_train:g}, lr {config.train.lr:g}, {num_steps} steps"
    )

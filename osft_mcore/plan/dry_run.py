"""What `--dry-run` prints: options, ranks, batches and the first push of the weights."""

from pathlib import Path

from osft_mcore.config.check import absent_files, model_is_here
from osft_mcore.config.describe import describe
from osft_mcore.config.dimensions import dimensions_file, known_shape
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.phases import reads_training_data
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.data.parquet import count_rows
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.weight_plan import weight_lines


def dry_run(config: RunConfig, phase: Phase, topology: Topology, config_dir: Path | None) -> str:
    """The text, from options alone: what is not on this machine is said, not asked for."""
    num_rows = count_rows(config.data.train) if reads_training_data(phase) else None
    places = topology.all_coordinates()
    text = describe(config, phase=phase, ranks=places, num_prompts=num_rows) + "\n"
    path = config.model.path
    here = model_is_here(config)
    shape = read_model_shape(path) if here else known_shape(path, config_dir)
    if phase == "train" and shape is not None:
        lines = weight_lines(config, shape, topology)
        text += "# Weights to vLLM\n" + "".join(f"{line}\n" for line in lines)
    if absent := absent_files(config, phase):
        text += "# Not here, so not checked\n" + "".join(f"{problem}\n" for problem in absent)
        if shape is not None and not here:
            text += f"the model's dimensions are those of {dimensions_file(path, config_dir)}\n"
    return text

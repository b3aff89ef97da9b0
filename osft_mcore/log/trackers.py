"""Services that show metrics: what wandb, TensorBoard, SwanLab and trackio have in common."""

import importlib.util
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol, get_args

from osft_mcore.errors import ConfigError
from osft_mcore.log.redact import redacted

TrackerName = Literal["wandb", "tensorboard", "swanlab", "trackio"]
TRACKERS: Final = get_args(TrackerName)


class Tracker(Protocol):
    """One run as a service sees it. Every method may raise whatever the service's package does."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures of one step; the same step may come again."""

    def close(self) -> None:
        """Send what is left."""


def open_tracker(
    name: TrackerName,
    *,
    project: str,
    run: str,
    folder: Path,
    options: Mapping[str, Any],
    patience_s: float = 0.0,
) -> Tracker:
    """A new run in `project`; files go into `folder`, options without secrets go along.

    wandb gives up waiting for its service after `patience_s`; 0: it waits. Raises ConfigError if
    the package is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"{name}: the package {name} is not installed; install it (pip install {name})"
        )
    shown = redacted(options)
    if name == "wandb":
        return _wandb(project, run, folder, shown, patience_s)
    if name == "tensorboard":
        return _tensorboard(folder)
    if name == "swanlab":
        return _swanlab(project, run, folder, shown)
    return _trackio(project, run, shown)


@dataclass(frozen=True, slots=True)
class _Wandb:
    run: Any

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({"step": step, **metrics})

    def close(self) -> None:
        self.run.finish()


def _wandb(
    project: str, run: str, folder: Path, options: Mapping[str, Any], patience_s: float
) -> Tracker:
    import wandb

    settings = wandb.Settings(
        # Without a key and on a terminal it would ask for one, and a run would wait.
        login_timeout=patience_s or None,
        finish_timeout=patience_s,
        finish_timeout_raises=True,
        # It gets options and figures, and nothing else that it would take by itself: not the
        # console, the command line, the source, or the address of the repository.
        console="off",
        disable_code=True,
        disable_git=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    opened = wandb.init(
        project=project, name=run, dir=folder, config=dict(options), settings=settings
    )
    # A step may be scored several times, which wandb's own step counter cannot express.
    opened.define_metric("*", step_metric="step")
    return _Wandb(opened)


@dataclass(frozen=True, slots=True)
class _TensorBoard:
    writer: Any

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def _tensorboard(folder: Path) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    return _TensorBoard(SummaryWriter(log_dir=str(folder / "tensorboard")))


@dataclass(frozen=True, slots=True)
class _Module:
    """SwanLab and trackio log to the run that their module has open."""

    module: types.ModuleType

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def _swanlab(project: str, run: str, folder: Path, options: Mapping[str, Any]) -> Tracker:
    import swanlab

    swanlab.init(
        project=project,
        experiment_name=run,
        logdir=str(folder / "swanlog"),
        config=dict(options),
    )
    return _Module(swanlab)


def _trackio(project: str, run: str, options: Mapping[str, Any]) -> Tracker:
    import trackio

    trackio.init(project=project, name=run, config=dict(options))
    return _Module(trackio)

"""Rows of the public hub, through the optional package `datasets`."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from data_preparation.catalog import DataSet
from data_preparation.sources import Source
from osft_mcore.errors import DataError

MISSING_PACKAGE = (
    "the package datasets, which reads the public hub, is not installed; install it with "
    "pip install -e '.[data]', or name a local copy (--from)"
)


class Rows(Protocol):
    """What this module needs of a `datasets.Dataset`."""

    @property
    def column_names(self) -> list[str]:
        """All of them."""

    def select_columns(self, column_names: list[str]) -> "Rows":
        """The same rows with fewer columns."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...


Fetch = Callable[[DataSet, str, str | None], tuple[str, Rows]]
"""From data set, split and revision to the commit that was read, and the rows."""


def fetch_if_installed() -> Fetch | None:
    """The function that reads from the hub, or None without the package for it."""
    return None if importlib.util.find_spec("datasets") is None else _fetch


def _fetch(data_set: DataSet, split: str, revision: str | None) -> tuple[str, Rows]:
    """Download a split, or take it from the hub's own cache. Raises DataError.

    Loaded by commit: what the report says is what was read, whatever is uploaded meanwhile.
    """
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        commit = HfApi().dataset_info(data_set.hub, revision=revision).sha
        rows = datasets.load_dataset(
            data_set.hub, data_set.hub_config, split=split, revision=commit
        )
    except (OSError, ValueError, HTTPError, DatasetsError) as error:
        raise DataError(
            f"{data_set.hub} could not be loaded from the hub "
            f"({type(error).__name__}: {error}); without network name a local copy (--from)"
        ) from error
    return str(commit), rows


def hub_sources(
    data_set: DataSet, revision: str | None, fetch: Fetch
) -> dict[str, Source] | list[str]:
    """A source for every split of the data set, or why it could not be loaded."""
    try:
        got = {split: fetch(data_set, split, revision) for split in data_set.splits}
    except DataError as error:
        return [str(error)]
    return {split: _source(data_set, split, commit, rows) for split, (commit, rows) in got.items()}


def _source(data_set: DataSet, split: str, commit: str, rows: Rows) -> Source:
    return Source(
        split=split,
        columns=tuple(rows.column_names),
        rows=lambda wanted: iter(
            rows.select_columns([name for name in wanted if name in rows.column_names])
        ),
        origin={"hub": data_set.hub, "config": data_set.hub_config, "revision": commit},
    )

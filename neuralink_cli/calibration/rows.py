"""Rows of a calibration dataset: of a local file, or of a hub id through the `datasets` library."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from neuralink_cli.calibration.local_rows import (
    SUFFIXES,
    PlacedRow,
    csv_columns,
    file_type,
    parquet_columns,
    read_csv,
    read_json,
    read_lines,
    read_parquet,
)
from neuralink_cli.checkpoint.hub import DatasetSource, find_dataset
from neuralink_cli.errors import InputError, NeuralinkError, UnsupportedError, first_line
from neuralink_cli.files.input_file import require_reachable, require_regular
from neuralink_cli.files.text_files import require_content
from neuralink_cli.models.hf_packages import quiet_datasets, require_hf_packages

HUB_ID = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")


@dataclass(frozen=True)
class Rows:
    """The rows of a dataset, each with its place in words, read from the start at every iteration.

    `name` is what the trace calls the dataset: the name of a local file without its folder, or the hub id. `lines`
    tells that the rows are the lines of one text. `split` and `revision`, the commit, are None for local files, which
    have only one. `columns` are None where only the rows tell. `added_nulls`: the objects within a row have each
    other's keys, null where they were not given.
    """

    name: str
    where: str
    lines: bool
    split: str | None
    revision: str | None
    columns: tuple[str, ...] | None
    added_nulls: bool
    read: Callable[[], Iterator[PlacedRow]]

    def __iter__(self) -> Iterator[PlacedRow]:
        with _explained(self.where):
            yield from self.read()


def open_rows(dataset: str, split: str = "train", wanted: Sequence[str] = ("text",)) -> Rows:
    """Open a dataset: a local .txt, .json, .jsonl, .parquet or .csv file, or else the hub's `id[:config][@revision]`.

    Of a hub dataset it is logged where its rows come from, see `find_dataset`.

    Args:
        wanted: The columns that are going to be used; others may be left out of the rows.

    Raises:
        InputError: There is no such file, dataset, config or split, or it cannot be read.
        UnsupportedError: A local file of another type.
        MissingDependencyError: `datasets`, or what unpacks a compressed file, is not installed.
    """
    require_hf_packages("datasets")
    path = Path(dataset)
    require_reachable(path)
    if path.is_dir():
        raise InputError("is a directory", where=dataset, fix="pass its files instead")
    if path.exists():
        require_regular(path)
        return _open_file(path, wanted)
    parts = HUB_ID.fullmatch(dataset)
    if parts is None or file_type(path) in SUFFIXES:
        raise InputError("no such file", where=dataset, fix="check its path")
    return _open_hub(dataset, parts["id"], parts["config"], parts["revision"], split, wanted)


def _open_file(path: Path, wanted: Sequence[str]) -> Rows:
    if not path.is_file():
        raise InputError("is not a regular file", where=path)
    columns: tuple[str, ...] | None = None
    match file_type(path):
        case ".txt":
            read, columns = partial(read_lines, path), ("text",)
        case ".json" | ".jsonl":
            read = partial(read_json, path)
        case ".csv":
            read, columns = partial(read_csv, path, wanted), tuple(csv_columns(path, wanted))
        case ".parquet":
            read, columns = partial(read_parquet, path, wanted), tuple(parquet_columns(path))
        case _:
            types = ", ".join(SUFFIXES)
            raise UnsupportedError(
                f"is not one of the calibration data types {types}", where=path, fix="convert or rename it"
            )
    require_content(path)
    return Rows(
        local_name(path), str(path), file_type(path) == ".txt", None, None, columns, file_type(path) == ".parquet", read
    )


def local_name(path: Path) -> str:
    """What a trace calls a local file: a name of bytes that are no UTF-8 could not be written into it."""
    return os.fsencode(path.name).decode(errors="replace")


def streamed_table(builder: str, where: str, pattern: str, **options: Any) -> Any:
    """The rows of local files that match a pattern, read by a builder of `datasets`.

    Raises:
        InputError: The files cannot be read.
    """
    from datasets import load_dataset

    # The library leaves a lock file per dataset in its cache, even when it caches nothing.
    with _explained(where), tempfile.TemporaryDirectory() as cache:
        return load_dataset(builder, data_files=[pattern], split="train", streaming=True, cache_dir=cache, **options)


def numbered(table: Iterable[Mapping[str, Any]]) -> Iterator[PlacedRow]:
    """Rows with their places, counted from 1."""
    return ((f"row {number}", row) for number, row in enumerate(table, start=1))


def _open_hub(
    dataset: str, hub_id: str, config: str | None, revision: str | None, split: str, wanted: Sequence[str]
) -> Rows:
    from datasets import concatenate_datasets, load_dataset

    source = find_dataset(hub_id, revision)
    # Older versions of the library read no sum of splits as a stream.
    splits = [part.strip() for part in split.split("+")]
    # A separate cache: from the usual one, the library would serve another revision if this one cannot be had.
    with _explained(dataset), tempfile.TemporaryDirectory() as cache:
        try:
            tables = [
                load_dataset(
                    source.location, config, revision=source.revision, split=each, streaming=True, cache_dir=cache
                )
                for each in splits
            ]
            table = tables[0] if len(tables) == 1 else concatenate_datasets(tables)
        except FileNotFoundError as error:
            if source.location == hub_id:
                raise
            raise InputError(
                "is only partly in the local cache of the Hugging Face hub",
                where=dataset,
                fix=f"run `hf download --repo-type dataset {hub_id} --revision {source.revision}` with a connection",
            ) from error
        except ValueError:
            _explain_choice(dataset, source, config, split)
            raise
    names = getattr(table, "column_names", None)
    if names is not None and any(name in wanted for name in names):
        table = table.select_columns([name for name in names if name in wanted])
    columns = None if names is None else tuple(names)
    return Rows(dataset, dataset, False, split, source.revision, columns, True, lambda: numbered(table))


def _explain_choice(dataset: str, source: DatasetSource, config: str | None, split: str) -> None:
    """If the config or split does not exist, raise an error that lists the existing ones."""
    from datasets import get_dataset_config_names, get_dataset_default_config_name, get_dataset_split_names

    configs = get_dataset_config_names(source.location, revision=source.revision)
    if config is None:
        config = get_dataset_default_config_name(source.location, revision=source.revision)
    if config not in configs:
        wrong = "several configs:" if config is None else f"no config {config!r}, only"
        raise InputError(f"has {wrong} {', '.join(configs)}", where=dataset, fix="choose one as NAME:CONFIG")
    splits = get_dataset_split_names(source.location, config, revision=source.revision)
    if split not in splits:
        raise InputError(
            f"has no split {split!r}, only {', '.join(splits)}", where=dataset, fix="choose one with --split"
        )


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn any error of the library and the formats below it into one line."""
    try:
        with quiet_datasets():
            yield
    except NeuralinkError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte {error.object[error.start]:#04x})", where=where) from None
    except Exception as error:
        raise InputError(f"cannot be read as a dataset ({first_line(error)})", where=where) from error

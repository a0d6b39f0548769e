"""Rows of a calibration dataset, local file or hub id, streamed through the `datasets` library."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from neuralink_cli.checkpoint.hub import DatasetSource, find_dataset
from neuralink_cli.errors import InputError, NeuralinkError, UnsupportedError, first_line
from neuralink_cli.files.input_file import require_reachable, require_regular
from neuralink_cli.models.hf_packages import quiet_datasets, require_hf_packages

# What a local file ends in, the `datasets` builder that reads it, and how: nothing is guessed into another type.
_BUILDERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".txt": ("text", {"keep_linebreaks": True}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {"keep_default_na": False}),
}
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")
_SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class Rows:
    """The rows of a dataset, read from the start at every iteration.

    `name` is what the trace calls the dataset: the name of a local file without its folder, or the hub id. `lines`
    tells that the rows are the lines of one text. `split` and `revision`, the commit, are None for local files, which
    have only one.
    """

    name: str
    where: str
    lines: bool
    split: str | None
    revision: str | None
    table: Any

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        with _explained(self.where):
            yield from self.table

    def shuffled(self, seed: int) -> Rows:
        """The same rows in an order that only the seed decides (a buffer of 10,000 rows, drawn from at random)."""
        table = self.table.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        return Rows(self.name, self.where, False, self.split, self.revision, table)


def open_rows(dataset: str, split: str = "train") -> Rows:
    """Open a dataset: a local .txt, .json, .jsonl, .parquet or .csv file, or else the hub's `id[:config][@revision]`.

    Nothing is written outside a temporary folder for local files. Of a hub dataset it is logged where its rows come
    from, see `find_dataset`.

    Raises:
        InputError: There is no such file, dataset, config or split, or it cannot be read.
        UnsupportedError: A local file of another type.
        MissingDependencyError: `datasets` is not installed.
    """
    require_hf_packages("datasets")
    path = Path(dataset)
    require_reachable(path)
    if path.is_dir():
        raise InputError("is a directory", where=dataset, fix="name the dataset's files")
    if path.exists():
        require_regular(path)
        return _open_file(path)
    parts = _HUB_ID.fullmatch(dataset)
    if parts is None or path.suffix.lower() in _BUILDERS:
        raise InputError("no such file", where=dataset)
    return _open_hub(dataset, parts["id"], parts["config"], parts["revision"], split)


def _open_file(path: Path) -> Rows:
    suffix = path.suffix.lower()
    if suffix not in _BUILDERS:
        raise UnsupportedError(
            f"is none of the calibration data types {', '.join(_BUILDERS)}", where=path, fix="convert or rename it"
        )
    if path.stat().st_size == 0:
        raise InputError("is empty", where=path)
    builder, options = _BUILDERS[suffix]
    table = streamed_table(builder, str(path), escape(str(path.absolute())), **options)
    # A name of bytes that are no UTF-8 could not be written into the trace.
    name = re.sub(r"[\x00-\x1f\x7f]", "\ufffd", os.fsencode(path.name).decode(errors="replace"))
    return Rows(name, str(path), builder == "text", None, None, table)


def streamed_table(builder: str, where: str, pattern: str, **options: Any) -> Any:
    """The rows of local files, given by a pattern, as a builder of `datasets` reads them.

    Raises:
        InputError: They cannot be read.
    """
    from datasets import load_dataset

    # The library leaves a lock file per dataset in its cache, even when it caches nothing.
    with _explained(where), tempfile.TemporaryDirectory() as cache:
        return load_dataset(builder, data_files=[pattern], split="train", streaming=True, cache_dir=cache, **options)


def _open_hub(dataset: str, hub_id: str, config: str | None, revision: str | None, split: str) -> Rows:
    from datasets import load_dataset

    source = find_dataset(hub_id, revision)
    # A cache of its own: from the usual one the library would serve any revision, if it could not have this one.
    with _explained(dataset), tempfile.TemporaryDirectory() as cache:
        try:
            table = load_dataset(
                source.location, config, revision=source.revision, split=split, streaming=True, cache_dir=cache
            )
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
    return Rows(dataset, dataset, False, split, source.revision, table)


def _explain_choice(dataset: str, source: DatasetSource, config: str | None, split: str) -> None:
    """Say which configs or splits there are, if the one asked for is not among them."""
    from datasets import get_dataset_config_names, get_dataset_default_config_name, get_dataset_split_names

    configs = get_dataset_config_names(source.location, revision=source.revision)
    if config is None:
        config = get_dataset_default_config_name(source.location, revision=source.revision)
    if config not in configs:
        wrong = "several configs" if config is None else f"no config {config!r}"
        raise InputError(f"has {wrong}, there are {', '.join(configs)}", where=dataset, fix="name one as NAME:CONFIG")
    splits = get_dataset_split_names(source.location, config, revision=source.revision)
    if split not in splits:
        raise InputError(
            f"has no split {split!r}, there are {', '.join(splits)}", where=dataset, fix="name one with --split"
        )


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn whatever the library and the formats below it raise into one line."""
    try:
        with quiet_datasets():
            yield
    except NeuralinkError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte {error.object[error.start]:#04x})", where=where) from None
    except Exception as error:
        raise InputError(f"cannot be read as a dataset ({first_line(error)})", where=where) from error

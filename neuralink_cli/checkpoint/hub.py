"""Models and datasets of the Hugging Face hub: finds the exact commit, and fetches model files into the local cache.

If the hub cannot be reached or refuses access, files in the cache are used instead, with a warning. The library
huggingface_hub is imported to look up a hub name, never for a local path.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from neuralink_cli import __version__
from neuralink_cli.checkpoint.checkpoint import read_weight_map
from neuralink_cli.checkpoint.companions import left_out_files
from neuralink_cli.checkpoint.config import read_config
from neuralink_cli.checkpoint.contents import missing_config, missing_weights, refuse_adapter
from neuralink_cli.checkpoint.file_names import (
    CONFIG_FILE,
    QUANTISED_CONFIG,
    SHARD_INDEX,
    SINGLE_FILE,
)
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.errors import InputError, MissingDependencyError, NeuralinkError, OptionError, first_line
from neuralink_cli.files.durable import require_space
from neuralink_cli.files.input_file import require_reachable

logger = logging.getLogger(__name__)

_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.))(?:{_NAME}/)?{_NAME}", re.ASCII)
# Seconds to wait for the first answer before the hub counts as unreachable.
_TIMEOUT = 20.0
# Errors of the cache's disk (full or read-only), not of the hub.
_DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES))


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint's directory, and where it came from (None for a local directory)."""

    directory: Path
    origin: Origin | None


@dataclass(frozen=True)
class DatasetSource:
    """A dataset at a commit: `location` is its hub id, or the folder of its files in the local cache."""

    location: str
    revision: str


@dataclass(frozen=True)
class _Wanted:
    """A hub name to look up: `kind` is "model" or "dataset", `revision` is None for main."""

    kind: str
    id: str
    revision: str | None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    @property
    def page(self) -> str:
        """Its page on the hub."""
        from huggingface_hub.constants import ENDPOINT

        return f"{ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"

    @property
    def download_command(self) -> str:
        """The command that downloads it into the local cache."""
        kind = "--repo-type dataset " if self.kind == "dataset" else ""
        return f"hf download {kind}{self.id}" + ("" if self.revision is None else f" --revision {self.revision}")


def find_model(model: str | Path, revision: str | None = None, *, all_files: bool = False) -> ModelSource:
    """The directory of a checkpoint: a local directory, or a hub model fetched into the local cache.

    Args:
        model: A directory or a hub id, `org/name` or `name`. A `Path` is always local; an existing local path wins.
        revision: Branch, tag or commit of a hub model; None for main.
        all_files: Fetch every file, also those that do not accompany the weights (see `left_out_files`).

    Raises:
        OptionError: A revision is given for a local path.
        InputError: The hub has no such model or revision, refuses access, or cannot be reached, and it is not cached.
        UnsupportedError: The model has no safetensors weights, or is quantised; it is not fetched.
        OutputError: The disk of the cache has too little room.
        MissingDependencyError: huggingface_hub is not installed.
    """
    require_reachable(Path(model))
    if isinstance(model, Path) or Path(model).exists() or not _HUB_ID.fullmatch(model):
        if revision is not None:
            raise OptionError(f"--revision is for models of the Hugging Face hub, and {model} is a local path")
        return ModelSource(Path(model), None)
    wanted = _Wanted("model", model, revision)
    _require_library(wanted)
    try:
        with quiet_hub():
            info = _ask(wanted)
    except Exception as error:
        folder = _cached_instead(wanted, error)
    else:
        folder = _fetch(wanted, info, all_files)
    return ModelSource(folder, Origin(wanted.id, folder.name))


def find_dataset(hub_id: str, revision: str | None = None) -> DatasetSource:
    """A hub dataset at an exact commit. Fetches nothing. If the hub fails, the local cache decides.

    Raises:
        InputError: The hub has no such dataset or revision, refuses access, or cannot be reached, and it is not cached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    wanted = _Wanted("dataset", hub_id, revision)
    if not _HUB_ID.fullmatch(hub_id):
        raise InputError("is neither a local file nor an id of the Hugging Face hub", where=hub_id)
    _require_library(wanted)
    try:
        with quiet_hub():
            commit = str(_ask(wanted).sha)
    except Exception as error:
        folder = _cached_instead(wanted, error)
        return DatasetSource(str(folder), folder.name)
    logger.warning("%s: streaming the dataset at commit %s from the Hugging Face hub", wanted, commit)
    return DatasetSource(hub_id, commit)


def _require_library(wanted: _Wanted) -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"is not a local path, and looking it up on the hub needs the Python package huggingface_hub ({error})",
            where=str(wanted),
            fix="pip install 'neuralink-cli[hf]'",
        ) from None


def _ask(wanted: _Wanted) -> Any:
    """The hub's answer: the commit and, for a model, its files and their sizes."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="neuralink", library_version=__version__)
    if wanted.kind == "dataset":
        info: Any = api.dataset_info(wanted.id, revision=wanted.revision, timeout=_TIMEOUT)
    else:
        info = api.model_info(wanted.id, revision=wanted.revision, timeout=_TIMEOUT, files_metadata=True)
    # The hub tells anybody about a gated repository, but only users with access get its files.
    if getattr(info, "gated", False):
        api.auth_check(wanted.id, repo_type=wanted.kind)
    return info


def _fetch(wanted: _Wanted, info: Any, all_files: bool) -> Path:
    """Fetch the files that are not cached, and return the folder of the commit."""
    from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache

    try:
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        cached = {name for name in sizes if isinstance(try_to_load_from_cache(wanted.id, name, revision=info.sha), str)}
        with quiet_hub():
            refuse_adapter(sizes, str(wanted))
            if CONFIG_FILE in sizes:
                # The config comes first: it may rule out the model.
                if QUANTISED_CONFIG in sizes:
                    hf_hub_download(wanted.id, QUANTISED_CONFIG, revision=info.sha)
                read_config(Path(hf_hub_download(wanted.id, CONFIG_FILE, revision=info.sha)).parent)
            names = sorted(sizes)
            weights = _weight_files(wanted, names, info.sha)
            if not all_files:
                left_out = left_out_files(names, weights)
                names = [name for name in names if name not in left_out]
        missing = [sizes[name] for name in names if name not in cached]
        _announce(wanted, info.sha, missing)
        # With the revision as the user wrote it, so that the cache also knows it without the hub.
        with quiet_hub(bars=bool(missing)):
            folder = Path(
                snapshot_download(wanted.id, revision=wanted.revision, allow_patterns=[escape(name) for name in names])
            )
        # If the hub falls silent only now, the library is content with what is in the cache.
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise InputError(
                f"was not fetched completely ({absent[0]} is missing)",
                where=str(wanted),
                fix="run it again: fetched files are kept",
            )
        return folder
    except NeuralinkError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        raise _refusal(wanted, error) or InputError(
            f"was not fetched completely ({first_line(error)})",
            where=str(wanted),
            fix="run it again: fetched files are kept",
        ) from error


def _announce(wanted: _Wanted, commit: str, missing: Sequence[int]) -> None:
    """Log what is about to be fetched, files of the sizes `missing`, and check that the disk has room."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if not missing:
        logger.info("%s: commit %s is in the local cache", wanted, commit)
        return
    size = f"{len(missing)} files, {sum(missing):,} bytes"
    logger.warning("%s: fetching commit %s from the Hugging Face hub: %s", wanted, commit, size)
    cache = Path(HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    require_space(cache / f"models--{wanted.id.replace('/', '--')}", sum(missing))


def _weight_files(wanted: _Wanted, names: Sequence[str], commit: str) -> list[str]:
    """The weights of a checkpoint and their index, among the names of its files."""
    from huggingface_hub import hf_hub_download

    if CONFIG_FILE not in names:
        raise missing_config(names, str(wanted))
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    if SHARD_INDEX in names:
        index = Path(hf_hub_download(wanted.id, SHARD_INDEX, revision=commit))
        shards = set(read_weight_map(index).values())
        if not shards <= set(names):
            raise InputError(f"shard {min(shards - set(names))} is missing", where=str(wanted))
        return [SHARD_INDEX, *sorted(shards)]
    raise missing_weights(names, str(wanted))


def _cached_instead(wanted: _Wanted, error: Exception) -> Path:
    """The folder in the local cache, after the hub failed with `error`."""
    refusal = _refusal(wanted, error)
    reason = _silence(error) if refusal is None else refusal.what
    folder = _cached_folder(wanted)
    if folder is not None:
        logger.warning("%s: %s; using commit %s from the local cache", wanted, reason, folder.name)
        return folder
    raise refusal or InputError(
        f"is neither a local path nor completely in the local cache of the Hugging Face hub, and {reason}",
        where=str(wanted),
        fix=f"check the name, or run `{wanted.download_command}` with a connection",
    ) from error


def _cached_folder(wanted: _Wanted) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with quiet_hub():
            folder = snapshot_download(
                wanted.id,
                repo_type=wanted.kind,
                revision=wanted.revision,
                local_files_only=True,
                # For models, only the files of the checkpoint were fetched.
                allow_patterns=[CONFIG_FILE] if wanted.kind == "model" else None,
            )
    except LocalEntryNotFoundError:
        return None
    # Other tools may have fetched only the tokenizer, say. Opening the checkpoint reports missing shards.
    whole = wanted.kind == "dataset" or all(any(Path(folder).glob(name)) for name in (CONFIG_FILE, "*.safetensors"))
    return Path(folder) if whole else None


def _refusal(wanted: _Wanted, error: Exception) -> InputError | None:
    """The error for a clear refusal by the hub, else None."""
    from huggingface_hub import errors

    # The order matters: GatedRepoError is a subclass of RepositoryNotFoundError.
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            "is gated, and you have no access",
            where=str(wanted),
            fix=f"accept its licence on {wanted.page}, then run `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"has no revision {wanted.revision!r}", where=wanted.id, fix=f"see {wanted.page}/commits")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"is neither a local path nor a {wanted.kind} of the Hugging Face hub",
            where=str(wanted),
            fix="check the name; if it is private, run `hf auth login`",
        )
    return None


def _silence(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return f"the hub cannot be reached ({first_line(error)})"


@contextlib.contextmanager
def quiet_hub(*, bars: bool = False) -> Iterator[None]:
    """Silence the warnings of huggingface_hub within the block: our own messages say what matters.

    Args:
        bars: Show its download progress, if stderr is a terminal and warnings are shown.
    """
    from huggingface_hub import utils

    verbosity = utils.logging.get_verbosity()
    shown = bars and logger.isEnabledFor(logging.WARNING) and sys.stderr is not None and sys.stderr.isatty()
    hide = not shown and not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    if hide:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if hide:
            utils.enable_progress_bars()

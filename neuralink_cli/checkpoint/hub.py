"""Models and datasets of the Hugging Face hub: an exact commit for a name, and the files of a model in the local cache.

What the hub does not give, because it is out of reach or says no, is taken from the cache if it is there, with a
remark. The library huggingface_hub is imported when a name is looked up, never for a local path.
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
from neuralink_cli.checkpoint.config import read_config
from neuralink_cli.checkpoint.file_names import (
    CONFIG_FILE,
    SHARD_INDEX,
    SINGLE_FILE,
    is_module_file,
    is_small_file,
    missing_weights,
)
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.errors import InputError, MissingDependencyError, NeuralinkError, OptionError, first_line
from neuralink_cli.files.durable import require_space
from neuralink_cli.files.input_file import require_reachable

logger = logging.getLogger(__name__)

_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.))(?:{_NAME}/)?{_NAME}", re.ASCII)
# Seconds for the first answer, after which the hub counts as out of reach.
_TIMEOUT = 20.0
# A cache on a full or read-only disk is no fault of the hub.
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
    """What is looked up; `kind` is "model" or "dataset", and `revision` None for main."""

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
        """What brings all of it into the local cache."""
        kind = "--repo-type dataset " if self.kind == "dataset" else ""
        return f"hf download {kind}{self.id}" + ("" if self.revision is None else f" --revision {self.revision}")


def find_model(model: str | Path, revision: str | None = None) -> ModelSource:
    """The directory of a checkpoint: a local one, or else that of a model of the hub, fetched into the local cache.

    Args:
        model: A directory or a hub id, `org/name` or `name`. A `Path` is always local, and what exists locally wins.
        revision: Branch, tag or commit of a hub model; None for main.

    Raises:
        OptionError: A revision of a local directory.
        InputError: The hub has no such model or revision, does not give it, or is out of reach and it is not cached.
        UnsupportedError: The model has no safetensors weights, or is quantised; it is not fetched.
        OutputError: The disk of the cache is too small.
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
        folder = _fetch(wanted, info)
    return ModelSource(folder, Origin(wanted.id, folder.name))


def find_dataset(hub_id: str, revision: str | None = None) -> DatasetSource:
    """A dataset of the hub at an exact commit. Nothing is fetched; without the hub it is that of the local cache.

    Raises:
        InputError: The hub has no such dataset or revision, does not give it, or is out of reach and it is not cached.
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
            f"is no local path, and the Python package huggingface_hub is needed to look it up on the hub ({error})",
            where=str(wanted),
            fix="pip install 'neuralink-cli[hf]'",
        ) from None


def _ask(wanted: _Wanted) -> Any:
    """What the hub says of it: its commit, and of a model its files and their sizes."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="neuralink", library_version=__version__)
    if wanted.kind == "dataset":
        info: Any = api.dataset_info(wanted.id, revision=wanted.revision, timeout=_TIMEOUT)
    else:
        info = api.model_info(wanted.id, revision=wanted.revision, timeout=_TIMEOUT, files_metadata=True)
    # Anybody may know what there is, but not have its files.
    if getattr(info, "gated", False):
        api.auth_check(wanted.id, repo_type=wanted.kind)
    return info


def _fetch(wanted: _Wanted, info: Any) -> Path:
    """Bring what is not in the cache into it, and return the folder of the commit."""
    from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache

    try:
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        cached = {name for name in sizes if isinstance(try_to_load_from_cache(wanted.id, name, revision=info.sha), str)}
        with quiet_hub():
            if CONFIG_FILE in sizes:
                # First of all: what it rules out need not be fetched.
                read_config(Path(hf_hub_download(wanted.id, CONFIG_FILE, revision=info.sha)).parent)
            names = _files_of_checkpoint(wanted, sorted(sizes), info.sha)
        missing = [sizes[name] for name in names if name not in cached]
        _announce(wanted, info.sha, missing)
        # By the name that was asked for, so that the cache knows it without the hub, too.
        with quiet_hub(bars=bool(missing)):
            folder = snapshot_download(
                wanted.id, revision=wanted.revision, allow_patterns=[escape(name) for name in names]
            )
        return Path(folder)
    except NeuralinkError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        raise _refusal(wanted, error) or InputError(
            f"was not fetched completely ({first_line(error)})",
            where=str(wanted),
            fix="run it again: what was fetched is kept",
        ) from error


def _announce(wanted: _Wanted, commit: str, missing: Sequence[int]) -> None:
    """Say what is about to be fetched, files of the sizes `missing`, and check that there is room for it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if not missing:
        logger.info("%s: commit %s is in the local cache", wanted, commit)
        return
    size = f"{len(missing)} files, {sum(missing):,} bytes"
    logger.warning("%s: fetching commit %s from the Hugging Face hub: %s", wanted, commit, size)
    cache = Path(HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    require_space(cache / f"models--{wanted.id.replace('/', '--')}", sum(missing))


def _files_of_checkpoint(wanted: _Wanted, names: Sequence[str], commit: str) -> list[str]:
    """What a checkpoint consists of: its safetensors weights, once, and the small files beside them."""
    from huggingface_hub import hf_hub_download

    if CONFIG_FILE not in names:
        raise InputError(f"has no {CONFIG_FILE}, so it is not a HuggingFace checkpoint", where=str(wanted))
    if SINGLE_FILE in names:
        weights = [SINGLE_FILE]
    elif SHARD_INDEX in names:
        index = Path(hf_hub_download(wanted.id, SHARD_INDEX, revision=commit))
        shards = set(read_weight_map(index).values())
        if not shards <= set(names):
            raise InputError(f"shard {min(shards - set(names))} is missing", where=str(wanted))
        weights = [SHARD_INDEX, *sorted(shards)]
    else:
        raise missing_weights(names, str(wanted))
    small = [name for name in names if is_module_file(name) or ("/" not in name and is_small_file(name))]
    return [*small, *weights]


def _cached_instead(wanted: _Wanted, error: Exception) -> Path:
    """The folder of the local cache, after the hub failed with `error`."""
    refusal = _refusal(wanted, error)
    reason = _silence(error) if refusal is None else refusal.what
    folder = _cached_folder(wanted)
    if folder is not None:
        logger.warning("%s: %s; taking commit %s from the local cache", wanted, reason, folder.name)
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
                # Of a model only what makes the checkpoint was fetched.
                allow_patterns=[CONFIG_FILE] if wanted.kind == "model" else None,
            )
    except LocalEntryNotFoundError:
        return None
    # Others may have fetched only the tokenizer, say. A shard that is missing is named when the checkpoint is opened.
    whole = wanted.kind == "dataset" or all(any(Path(folder).glob(name)) for name in (CONFIG_FILE, "*.safetensors"))
    return Path(folder) if whole else None


def _refusal(wanted: _Wanted, error: Exception) -> InputError | None:
    """What the hub's answer means, if it was a clear one."""
    from huggingface_hub import errors

    # The order matters: the first is of the kind of the last.
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            "is gated, and you have no access",
            where=str(wanted),
            fix=f"accept its licence on {wanted.page}, then `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"has no revision {wanted.revision!r}", where=wanted.id, fix=f"see {wanted.page}/commits")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"is neither a local path nor a {wanted.kind} of the Hugging Face hub",
            where=str(wanted),
            fix="check the name; if it is private, `hf auth login`",
        )
    return None


def _silence(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return f"the hub cannot be reached ({first_line(error)})"


@contextlib.contextmanager
def quiet_hub(*, bars: bool = False) -> Iterator[None]:
    """Silence the warnings of huggingface_hub within the block: what matters of them we say ourselves.

    Args:
        bars: Let it show what it downloads, if stderr is a terminal and our own remarks are wanted.
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

"""What a folder holds instead of a checkpoint that can be used, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.checkpoint.file_names import CONFIG_FILE, SHARD, SHARD_INDEX, SINGLE_FILE, VARIANT
from neuralink_cli.errors import InputError, NeuralinkError, UnsupportedError

_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\b.*")
_PICKLE = re.compile(r"(?!training_args|optimizer|scheduler|rng_state).*\.(bin|pt|pth|ckpt|pkl)(\.index\.json)?")
_FOREIGN = re.compile(r".*\.(onnx|h5|msgpack|ot|tflite|pte|npz|keras)")
_CONVERT = "convert them to safetensors, for example with `save_pretrained` of transformers"
# How many files a message names.
_SHOWN = 3


@dataclass(frozen=True)
class _Kind:
    """Weights in a form that is not read: which files they are, what they are called, and what to do."""

    fits: Callable[[str], object]
    called: str
    fix: str
    error: type[NeuralinkError] = UnsupportedError


# The first kind that is there is the one that a message names.
_KINDS = (
    _Kind(
        VARIANT.fullmatch,
        "a variant of the weights",
        f"rename its files to {SINGLE_FILE} (or {SHARD_INDEX} and the shards that it names), or load it with "
        "`from_pretrained(..., variant=...)` and save it with `save_pretrained`",
    ),
    _Kind(
        re.compile(r"consolidated.*\.safetensors").fullmatch,
        "weights in the format of its makers",
        f"get the checkpoint for transformers, whose weights are called {SINGLE_FILE} or model-*.safetensors",
    ),
    _Kind(
        SHARD.fullmatch,
        "shards without their index",
        f"download {SHARD_INDEX} too",
        InputError,
    ),
    _Kind(
        lambda name: name.endswith(".safetensors"),
        "safetensors files of other names",
        "if these are the weights, load them and save them with `save_pretrained` of transformers",
        InputError,
    ),
    _Kind(_PICKLE.fullmatch, "pickled weights", _CONVERT),
    _Kind(
        lambda name: name.endswith(".gguf"),
        "GGUF weights",
        "get the checkpoint that they were converted from: a folder with config.json and *.safetensors",
    ),
    _Kind(_FOREIGN.fullmatch, "weights for another program", _CONVERT),
)


def refuse_adapter(names: Iterable[str], where: str | Path) -> None:
    """Check that no adapter (LoRA) lies beside the weights: whether it is applied depends on what is installed.

    Raises:
        UnsupportedError: There is one.
    """
    found = sorted(name for name in names if _ADAPTER.fullmatch(name))
    if found:
        raise UnsupportedError(
            f"holds an adapter ({_shown(found)}), which transformers applies to the weights if peft is installed, "
            "and otherwise does not",
            where=where,
            fix="merge it into the weights (`merge_and_unload` of peft, then `save_pretrained`), or if it is merged "
            "already, or not wanted, take its files out of the folder",
        )


def refuse_dangling_link(path: Path) -> None:
    """Check that a path is not a link to something that does not exist.

    Raises:
        InputError: It is.
    """
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"is a link to {path.readlink()}, which does not exist",
            where=path,
            fix="download it again, or copy the folder with `cp -rL` where the links work",
        )


def missing_config(names: Collection[str], where: str | Path) -> NeuralinkError:
    """What is wrong with a folder that has no config.json.

    Args:
        names: The files that it does have.
    """
    what = f"has no {CONFIG_FILE}, so it is not a HuggingFace checkpoint"
    if SINGLE_FILE in names or SHARD_INDEX in names:
        return InputError(f"{what}, though it has weights", where=where, fix=f"download {CONFIG_FILE} too")
    found, nested = _find_kind(names), _nested(where)
    if found is None or nested is not None:
        fix = nested or "pass the directory of a checkpoint, or the id of one on the hub"
        return InputError(f"{what}; it holds {_shown(sorted(names)) or 'nothing'}", where=where, fix=fix)
    kind, files = found
    return InputError(f"{what}; it holds {kind.called} ({_shown(files)})", where=where, fix=kind.fix)


def missing_weights(names: Collection[str], where: str | Path) -> NeuralinkError:
    """What is wrong with a checkpoint that has neither a weight file nor an index of shards.

    Args:
        names: The files that it does have.

    Returns:
        An UnsupportedError if it has weights in another form, an InputError if it has none.
    """
    found = _find_kind(names)
    if found is None:
        return InputError(
            f"has neither {SINGLE_FILE} nor {SHARD_INDEX}; it holds {_shown(sorted(names))}",
            where=where,
            fix="download the checkpoint completely",
        )
    kind, files = found
    if kind.called == "pickled weights":
        what = f"has only pickled weights ({_shown(files)}), which can run code when loaded and are never opened"
    elif kind.error is InputError:
        what = f"has neither {SINGLE_FILE} nor {SHARD_INDEX}, but {kind.called} ({_shown(files)})"
    else:
        what = f"has only {kind.called} ({_shown(files)})"
    return kind.error(what, where=where, fix=kind.fix)


def _find_kind(names: Collection[str]) -> tuple[_Kind, list[str]] | None:
    for kind in _KINDS:
        files = sorted(name for name in names if kind.fits(name))
        if files:
            return kind, files
    return None


def _nested(where: str | Path) -> str | None:
    """Which folder below was probably meant."""
    if not isinstance(where, Path):
        return None
    for pattern in (f"*/{CONFIG_FILE}", f"snapshots/*/{CONFIG_FILE}"):
        for config in sorted(where.glob(pattern)):
            return f"pass the folder {config.parent}, which has one"
    return None


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

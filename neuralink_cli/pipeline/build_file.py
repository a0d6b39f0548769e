"""Build files: what is to be built, as TOML. The keys are the options of the commands, checked by a schema."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from neuralink_cli.activations.options import ProfileOptions, ThresholdOptions
from neuralink_cli.architectures.choice import ArchitectureChoice
from neuralink_cli.calibration.options import CalibrationOptions
from neuralink_cli.clustering.cluster import ClusterOptions
from neuralink_cli.clustering.dask_cluster import DaskOptions
from neuralink_cli.devices.device import builtin_devices
from neuralink_cli.errors import InputError, MissingDependencyError, OptionError, advising
from neuralink_cli.evaluation.forward_check import ForwardOptions
from neuralink_cli.files.input_file import read_input, require_reachable
from neuralink_cli.files.json_text import why_malformed
from neuralink_cli.files.schema import Schema, check_document
from neuralink_cli.layout.plan import RelayoutOptions
from neuralink_cli.models.execution import ExecutionOptions
from neuralink_cli.pipeline.options import BuildOptions, build_device
from neuralink_cli.sizes import parse_size
from neuralink_cli.storage.budget import parse_budget

BUILD_SCHEMA = Schema("build file", __package__, "build_file.schema.json")
# As `profile` has them.
DEFAULT_SAMPLES = 1024
DEFAULT_TOKENS = 131072


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        output: Where; None if the file does not say.
        fail_below: The least gain of every layout on its device; None for any.
    """

    model: str
    output: Path | None
    options: BuildOptions
    fail_below: float | None


def read_build_file(path: Path) -> BuildRequest:
    """Read a build file. Paths in it are relative to its folder.

    Raises:
        InputError: It cannot be read, is no TOML, or has unknown or malformed keys.
        OptionError: Options in it do not go together.
        MissingDependencyError: Python is older than 3.11, and tomli is not installed.
    """
    with advising("pass a build file in TOML, written like examples/neuralink.toml"):
        try:
            document = _toml().loads(read_input(path).decode(), parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not valid TOML ({why_malformed(error)})", where=path) from None
        try:
            return parse_build(document, path, path.absolute().parent)
        except OptionError as error:
            raise OptionError(error.what, where=error.where or path, fix=error.fix) from None


def parse_build(document: dict[str, Any], where: str | Path, folder: Path) -> BuildRequest:
    """What a build file says.

    Args:
        where: The file, for messages.
        folder: What paths are relative to.

    Raises:
        InputError, OptionError: As `read_build_file`.
    """
    for complaint in _unknown_keys(document, BUILD_SCHEMA.read()):
        raise InputError(complaint, where=where)
    check_document(document, BUILD_SCHEMA, where)
    model, recorded = document["model"], document["profile"]
    cluster, relayout, bench = (document.get(name, {}) for name in ("cluster", "relayout", "bench"))
    dram = parse_budget(bench.get("dram", "5%"))
    devices = tuple(
        build_device(
            _path_or_name(folder, each["device"]),
            each.get("name"),
            parse_budget(each["dram"]) if "dram" in each else None,
        )
        for each in document["device"]
    )
    options = BuildOptions(
        data=CalibrationOptions(
            datasets=tuple(_path_or_name(folder, name) for name in recorded["dataset"]),
            text_columns=tuple(recorded.get("text-column", ("text",))),
            num_samples=recorded.get("num-samples", DEFAULT_SAMPLES) or None,
            max_tokens=recorded.get("max-tokens", DEFAULT_TOKENS) or None,
            **_given(recorded, "split", "max-seq-length", "packing", "batch-size", "seed"),
        ),
        devices=devices,
        profile=ProfileOptions(
            thresholds=ThresholdOptions(
                trace=_path(folder, recorded.get("thresholds-from")),
                **_given(recorded, "active-ratio", "calibration-tokens"),
            ),
            execution=ExecutionOptions(
                max_memory=parse_size(recorded["max-memory"]) if "max-memory" in recorded else None,
                **_given(recorded, "device", "dtype"),
                **_given(model, "trust-remote-code", "ignore-remote-code"),
            ),
            architecture=ArchitectureChoice(
                _path(folder, model.get("architecture")), model.get("infer-architecture", False)
            ),
            **_given(recorded, "signal"),
            **_given(model, "revision", "allow-uncovered"),
        ),
        cluster=ClusterOptions(
            device=devices[0].device,
            order_from=_path(folder, cluster.get("order-from")),
            **_given(cluster, "order", "effort", "bundle-bytes", "pin-hot", "held-out", "jobs"),
            **({"fewest_tokens": cluster["min-tokens"]} if "min-tokens" in cluster else {}),
            dask=_dask(cluster, folder),
        ),
        relayout=RelayoutOptions(**_given(relayout, *(key for key in relayout if not key.startswith("recall-")))),
        recall_text=_path(folder, relayout.get("recall-text")),
        **_given(relayout, "recall-tokens"),
        forward=_forward(document.get("verify", {}), model, folder),
        **_given(bench, "real"),
        dram=dram,
    )
    output = _path(folder, document.get("output"))
    return BuildRequest(_path_or_name(folder, model["path"]), output, options, bench.get("fail-below"))


def _forward(table: Mapping[str, Any], model: Mapping[str, Any], folder: Path) -> ForwardOptions | None:
    if not table.get("forward", False):
        return None
    return ForwardOptions(
        text=_path(folder, table.get("text")),
        **({"tokens": table["forward-tokens"]} if "forward-tokens" in table else {}),
        **_given(table, "tolerance", "max-perplexity-increase", "max-kl"),
        **_given(model, "trust-remote-code", "ignore-remote-code"),
    )


def _dask(table: Mapping[str, Any], folder: Path) -> DaskOptions | None:
    scheduler, workers = table.get("scheduler"), table.get("workers")
    if scheduler is None and workers is None:
        if table.get("send-trace", False):
            raise OptionError("`send-trace` needs `scheduler` or `workers` in [cluster]")
        return None
    if scheduler is not None:
        scheduler = scheduler if "://" in scheduler else str(folder / scheduler)
    return DaskOptions(scheduler, workers, table.get("send-trace", False))


def _given(table: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of some keys that a table has, as names of fields."""
    return {name.replace("-", "_"): table[name] for name in names if name in table}


def _path(folder: Path, text: str | None) -> Path | None:
    return None if text is None else folder / text


def _path_or_name(folder: Path, text: str) -> str:
    """The path that a text is relative to a folder if there is one; else the text, if it may be a name.

    Raises:
        InputError: The system has no such paths, as those that are too long.
    """
    if text.partition(":")[0] in builtin_devices():
        return text
    local = text if folder == Path() else str(folder / text)
    for each in (local, text):
        require_reachable(Path(each))
    # What is here by chance and not beside the file is not meant.
    return local if Path(local).exists() or Path(text).exists() or text.startswith((".", "/")) else text


def _unknown_keys(document: Any, schema: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Complaints about keys that a schema does not know, with the nearest one that it does."""
    tables = {name: each for name, each in schema["properties"].items() if "properties" in each.get("items", each)}
    known = schema["properties"]
    for key, value in document.items():
        inside = f" in [{place}]" if place else ""
        if key not in known:
            yield f"unknown key {key!r}{inside}{_instead(key, known, BUILD_SCHEMA.read(), place)}"
        elif key in tables:
            if isinstance(value, dict) and tables[key].get("type") == "array":
                yield f"[{key}] is one table of a list: write [[{key}]]"
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, dict):
                    yield from _unknown_keys(each, tables[key].get("items", tables[key]), key)


def _instead(key: str, known: Mapping[str, Any], whole: Mapping[str, Any], place: str) -> str:
    near = difflib.get_close_matches(key.replace("_", "-"), known, n=1, cutoff=0.6)
    others = [
        name
        for name, table in whole["properties"].items()
        if name != place and key in table.get("items", table).get("properties", {})
    ]
    if near and near[0] == key.replace("_", "-"):
        return f"; did you mean {near[0]!r}?"
    if others:
        return f"; it belongs in [{others[0]}]"
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _toml() -> Any:
    """Python's reader of TOML, which came with 3.11, or the package that it was before."""
    name = next((name for name in ("tomllib", "tomli") if find_spec(name) is not None), None)
    if name is None:
        raise MissingDependencyError(
            "build files need Python 3.11 or newer, or the package tomli", fix="pip install tomli"
        )
    return importlib.import_module(name)

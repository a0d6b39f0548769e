"""What the stages of a build are made from, apart from each other: the model, the data and the options."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.activations.trace import Trace
from neuralink_cli.architectures.choice import ArchitectureChoice, choose_architecture
from neuralink_cli.calibration.identity import identify_dataset
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.file_names import SHARD_INDEX
from neuralink_cli.checkpoint.hub import find_model
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.clustering.cluster import check_options
from neuralink_cli.clustering.dask_cluster import require_dask, scheduler_address
from neuralink_cli.devices.device import device_record
from neuralink_cli.errors import OptionError
from neuralink_cli.files.input_file import digest_of
from neuralink_cli.files.json_text import canonical
from neuralink_cli.layout.companions import companions_to_copy
from neuralink_cli.layout.names import MODEL_CARD
from neuralink_cli.ordering.own_orders import IMPORTED, load_order
from neuralink_cli.pipeline.options import BuildDevice, BuildOptions
from neuralink_cli.placement.placement import ORDER_NAMES

# Files that no stage but `relayout` looks at.
_PROSE = (".md", ".png", ".jpg", ".svg", ".pdf")


@dataclass(frozen=True)
class ModelInput:
    """The model of a build.

    Attributes:
        model: As the stages take it: its directory, or its hub id.
        revision: The exact commit of a hub model.
        fingerprint: Of its weights.
        files_sha256: Of the names and digests of all files beside the weights.
        code_sha256: The same without prose and pictures: what decides what the model computes.
    """

    model: str | Path
    directory: Path
    origin: Origin | None
    fingerprint: str
    files_sha256: str
    code_sha256: str

    @property
    def revision(self) -> str | None:
        """The commit of a hub model."""
        return None if self.origin is None else self.origin.revision

    def record(self, files_sha256: str) -> dict[str, Any]:
        """What a stage that depends on some of its files is made from."""
        origin = None if self.origin is None else asdict(self.origin)
        return {"fingerprint": self.fingerprint, "origin": origin, "files_sha256": files_sha256}


def read_model(model: str | Path, options: BuildOptions) -> ModelInput:
    """Find a model, fetching it if need be, and what identifies it.

    Raises:
        InputError, UnsupportedError, OptionError, MissingDependencyError: As `find_model` and `Checkpoint`.
    """
    all_files = options.relayout.all_files
    source = find_model(model, options.profile.revision, all_files=all_files)
    with Checkpoint(source.directory, source.origin) as checkpoint:
        names = [file.name for file in companions_to_copy(checkpoint, all_files=all_files).companions]
        names += [name for name in (MODEL_CARD, SHARD_INDEX) if (checkpoint.directory / name).is_file()]
        files = [[name, digest_of(checkpoint.directory / name)] for name in sorted(names)]
        weights = [
            [file.path.name, file.size, hashlib.sha256(file.header.prelude).hexdigest()] for file in checkpoint.files
        ]
        code = [file for file in files if not file[0].lower().endswith(_PROSE)]
        return ModelInput(
            model=model,
            directory=checkpoint.directory,
            origin=source.origin,
            fingerprint=checkpoint.fingerprint,
            files_sha256=_digest([*files, *weights]),
            code_sha256=_digest(code),
        )


def profile_inputs(model: ModelInput, options: BuildOptions) -> dict[str, Any]:
    """What the trace is made from. Memory and the folders that the data lies in decide nothing.

    Raises:
        InputError: A dataset cannot be read, or the trace with the thresholds.
    """
    data = asdict(options.data)
    datasets: Sequence[str] = data.pop("datasets")
    profile, execution = options.profile, options.profile.execution
    return {
        "model": model.record(model.code_sha256),
        "datasets": [identify_dataset(dataset) for dataset in datasets],
        "options": {
            **data,
            "text_columns": list(options.data.text_columns),
            "signal": profile.signal,
            "active_ratio": profile.thresholds.active_ratio,
            "calibration_tokens": profile.thresholds.calibration_tokens,
            "thresholds_from": _trace_digest(profile.thresholds.trace),
            "device": execution.device,
            "dtype": execution.dtype,
            "trust_remote_code": execution.trust_remote_code,
            "ignore_remote_code": execution.ignore_remote_code,
            **_blocks(profile.architecture, profile.allow_uncovered),
        },
    }


def cluster_inputs(options: BuildOptions, device: BuildDevice) -> dict[str, Any]:
    """What a placement is made from beside the trace. Who orders the blocks decides nothing.

    Raises:
        OptionError: An option is out of range, or options do not go together.
        InputError: The file with an order, or that of a scheduler, cannot be read.
        MissingDependencyError: Blocks are to be ordered on Dask, which is not installed.
    """
    cluster = options.cluster
    check_options(cluster)
    if cluster.dask is not None:
        # Now, not after hours of recording.
        require_dask()
        scheduler_address(cluster.dask)
    own = None
    if cluster.order_from is not None:
        own = digest_of(cluster.order_from)
    elif cluster.order not in (*ORDER_NAMES, IMPORTED):
        own = load_order(cluster.order).origin
    return {
        "options": {
            "device": device_record(device.device),
            "order": cluster.order,
            "own_order": own,
            "held_out": cluster.held_out,
            "bundle_bytes": cluster.bundle_bytes,
            "weights": options.relayout.weights,
            "resident": options.relayout.resident,
            "pin_hot": cluster.pin_hot,
            "effort": cluster.effort,
            "min_tokens": cluster.fewest_tokens,
        }
    }


def relayout_inputs(model: ModelInput, options: BuildOptions) -> dict[str, Any]:
    """What a layout is made from beside the placement."""
    profile = options.profile
    return {
        "model": model.record(model.files_sha256),
        "options": {**asdict(options.relayout), **_blocks(profile.architecture, profile.allow_uncovered)},
        **_recall(options),
    }


def _recall(options: BuildOptions) -> dict[str, Any]:
    """What measures recall; nothing if it is not measured."""
    if options.recall_text is None:
        return {}
    return {"recall": {"text": digest_of(options.recall_text), "tokens": options.recall_tokens}}


def forward_inputs(model: ModelInput, options: BuildOptions) -> dict[str, Any]:
    """What the comparison of what two models compute is made from beside the layout; nothing if they are not run.

    Raises:
        OptionError: The model needs a text to run on.
        InputError: The text cannot be read.
    """
    forward = options.forward
    if forward is None:
        return {}
    architecture = options.profile.architecture
    if forward.text is None:
        with Checkpoint(model.directory, model.origin) as checkpoint:
            task = choose_architecture(describe(checkpoint), architecture).task
        if task != "image-encoder":
            raise OptionError("`forward` needs text to run on", fix="add `text` to [verify]")
    text = None if forward.text is None else digest_of(forward.text)
    # What the text decides does not depend on where it lies.
    settings = {**asdict(forward), "text": text, **_blocks(architecture, options.profile.allow_uncovered)}
    return {"model": model.record(model.files_sha256), "options": settings}


def bench_inputs(options: BuildOptions, device: BuildDevice) -> dict[str, Any]:
    """What the figures of a device are made from beside the trace and the layouts."""
    return {"options": {"device": device_record(device.device), "dram": asdict(options.dram_of(device))}}


def _blocks(architecture: ArchitectureChoice, allow_uncovered: bool) -> dict[str, Any]:
    file = None if architecture.file is None else digest_of(architecture.file)
    return {"architecture": file, "infer_architecture": architecture.infer, "allow_uncovered": allow_uncovered}


def _trace_digest(path: Path | None) -> str | None:
    if path is None:
        return None
    with Trace(path) as trace:
        return trace.content_sha256


def _digest(document: Any) -> str:
    return hashlib.sha256(canonical(document).encode()).hexdigest()

"""What a profiling run is asked for, and what it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.errors import OptionError

SIGNALS = ("gate", "intermediate")


@dataclass(frozen=True)
class ProfileRequest:
    """One run: `datasets` through `model` into the trace `output`.

    None stands for a default that depends on the input: `packing` for causal language models only, sequences of 512
    tokens or what the model has positions for; for the others it means without limit. `num_samples` and `max_tokens`
    hold for every dataset. `part` (i, n) runs the i-th of n contiguous parts of all batches. `architecture_file`
    describes a model type that is not built in, `infer_architecture` finds its blocks by names and shapes. A `model`
    that is a string may be a hub id, of which `revision` is a branch, tag or commit, see `find_model`.
    `max_memory` is in bytes, of the CPU's memory for weights.
    """

    model: str | Path
    output: Path
    datasets: tuple[str, ...]
    signal: str = "gate"
    active_ratio: float | None = None
    calibration_tokens: int = 4096
    thresholds_from: Path | None = None
    text_columns: tuple[str, ...] = ("text",)
    split: str = "train"
    num_samples: int | None = None
    max_tokens: int | None = None
    max_seq_length: int | None = None
    packing: bool | None = None
    batch_size: int = 8
    seed: int | None = None
    part: tuple[int, int] | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_memory: int | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    architecture_file: Path | None = None
    infer_architecture: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class BlockSummary:
    """What came out for a block; `active_ratio` is that of the recorded tokens that it ran on."""

    id: str
    neurons: int
    threshold: float
    tokens: int
    active_ratio: float


@dataclass(frozen=True)
class SourceSummary:
    """What was recorded of a dataset."""

    name: str
    sequences: int
    tokens: int


@dataclass(frozen=True)
class ProfileSummary:
    """What a profiling run recorded; `calibration` is that of the trace."""

    content_sha256: str
    origin: Origin | None
    tokens: int
    signal: str
    calibration: Mapping[str, Any] | None
    blocks: tuple[BlockSummary, ...]
    sources: tuple[SourceSummary, ...]


def check_request(request: ProfileRequest) -> None:
    """Check what can be checked without looking at any file.

    Raises:
        OptionError: A value is out of range, or two options contradict each other.
    """
    if not request.datasets:
        raise OptionError("no calibration data", fix="name some with --dataset")
    if not request.text_columns:
        raise OptionError("no text column", fix="name one with --text-column")
    if request.signal not in SIGNALS:
        raise OptionError(f"signal {request.signal!r} is not one of {', '.join(SIGNALS)}")
    if request.active_ratio is not None:
        if request.thresholds_from is not None:
            raise OptionError("--active-ratio and --thresholds-from both decide the thresholds", fix="drop one of them")
        if not 0 < request.active_ratio < 1:
            raise OptionError(f"--active-ratio {request.active_ratio} is not between 0 and 1")
    for name in ("calibration_tokens", "num_samples", "max_tokens", "max_seq_length", "batch_size"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} {value} is not at least 1")
    if request.part is not None and not 1 <= request.part[0] <= request.part[1]:
        raise OptionError(f"--part {request.part[0]}/{request.part[1]} is not a part", fix="count them from 1/N to N/N")

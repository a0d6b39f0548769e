"""The options of a profiling run, and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.architectures.choice import BUILT_IN, ArchitectureChoice
from neuralink_cli.architectures.coverage import Coverage
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.errors import OptionError
from neuralink_cli.models.execution import ExecutionOptions

SIGNALS = ("gate", "intermediate")


@dataclass(frozen=True)
class ThresholdOptions:
    """What makes a neuron fire. By default, it fires where the activation is not zero (ReLU).

    Attributes:
        active_ratio: Calibrate each block's threshold so that this share of its neurons fires.
        calibration_tokens: Calibrate on at least this many tokens, taken from all datasets in proportion.
        trace: Take the thresholds of this trace.

    Raises:
        OptionError: A value is out of range, or options contradict each other.
    """

    active_ratio: float | None = None
    calibration_tokens: int = 4096
    trace: Path | None = None

    def __post_init__(self) -> None:
        if self.active_ratio is not None:
            if self.trace is not None:
                raise OptionError(
                    "--active-ratio and --thresholds-from both decide the thresholds", fix="drop one of them"
                )
            if not 0 < self.active_ratio < 1:
                raise OptionError(f"--active-ratio {self.active_ratio} is not between 0 and 1")
        if self.calibration_tokens < 1:
            raise OptionError(f"--calibration-tokens {self.calibration_tokens} is not at least 1")


@dataclass(frozen=True)
class ProfileOptions:
    """How a model is profiled, apart from the data.

    Attributes:
        signal: What decides firing: "gate", the activated gate (or up projection), or "intermediate", the input of the
            down projection.
        thresholds: What makes a neuron fire.
        execution: Where and in which precision the model runs.
        part: (i, n) runs the i-th of n contiguous parts of all batches.
        revision: Branch, tag or commit of a hub model.
        architecture: Where the description of the model's blocks comes from.
        allow_uncovered: Continue even if no block covers some of the FFNs.

    Raises:
        OptionError: An unknown signal, or an impossible part.
    """

    signal: str = "gate"
    thresholds: ThresholdOptions = ThresholdOptions()
    execution: ExecutionOptions = ExecutionOptions()
    part: tuple[int, int] | None = None
    revision: str | None = None
    architecture: ArchitectureChoice = BUILT_IN
    allow_uncovered: bool = False

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise OptionError(f"signal {self.signal!r} is not one of {', '.join(SIGNALS)}")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise OptionError(f"--part {self.part[0]}/{self.part[1]} is not a part", fix="count them from 1/N to N/N")


@dataclass(frozen=True)
class BlockSummary:
    """The result for a block; `active_ratio` is over the recorded tokens that it ran on."""

    id: str
    neurons: int
    threshold: float
    tokens: int
    active_ratio: float


@dataclass(frozen=True)
class SourceSummary:
    """What was recorded of a dataset; `active_ratio` is the share of all neurons that fired, where it was measured."""

    name: str
    sequences: int
    tokens: int
    active_ratio: float | None = None


@dataclass(frozen=True)
class ProfileSummary:
    """What a profiling run recorded; `calibration` is as in the trace."""

    content_sha256: str
    origin: Origin | None
    tokens: int
    signal: str
    calibration: Mapping[str, Any] | None
    blocks: tuple[BlockSummary, ...]
    sources: tuple[SourceSummary, ...]
    coverage: Coverage

"""A profiling run as one flat record, so that tests can say what they change in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.activations.options import ProfileOptions, ProfileSummary, ThresholdOptions
from neuralink_cli.architectures.choice import ArchitectureChoice
from neuralink_cli.calibration.options import CalibrationOptions
from neuralink_cli.models.execution import ExecutionOptions
from neuralink_cli.profiling import profile as library
from neuralink_cli.profiling.ranks import ALONE, Ranks
from neuralink_cli.progress import Progress, no_progress


@dataclass(frozen=True)
class ProfileRequest:
    """All that `profile` can be told."""

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

    @property
    def data(self) -> CalibrationOptions:
        """What it is calibrated on."""
        return CalibrationOptions(
            self.datasets,
            self.text_columns,
            self.split,
            self.num_samples,
            self.max_tokens,
            self.max_seq_length,
            self.packing,
            self.batch_size,
            self.seed,
        )

    @property
    def execution(self) -> ExecutionOptions:
        """How the model runs."""
        return ExecutionOptions(self.device, self.dtype, self.max_memory, self.trust_remote_code)

    @property
    def options(self) -> ProfileOptions:
        """All the rest."""
        return ProfileOptions(
            self.signal,
            ThresholdOptions(self.active_ratio, self.calibration_tokens, self.thresholds_from),
            self.execution,
            self.part,
            self.revision,
            ArchitectureChoice(self.architecture_file, self.infer_architecture),
        )


def profile(request: ProfileRequest, progress: Progress = no_progress, ranks: Ranks = ALONE) -> ProfileSummary:
    """Run it."""
    return library.profile(
        request.model,
        request.output,
        request.data,
        request.options,
        overwrite=request.overwrite,
        progress=progress,
        ranks=ranks,
    )

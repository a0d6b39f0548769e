"""What a build makes: one trace, and a layout for each class of devices."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from neuralink_cli.activations.options import ProfileOptions
from neuralink_cli.calibration.options import CalibrationOptions
from neuralink_cli.clustering.cluster import ClusterOptions
from neuralink_cli.devices.device import DeviceModel, builtin_devices, default_device, find_device
from neuralink_cli.errors import OptionError
from neuralink_cli.evaluation.forward_check import ForwardOptions
from neuralink_cli.layout.names import BUNDLED
from neuralink_cli.layout.plan import RelayoutOptions
from neuralink_cli.storage.budget import DramBudget
from neuralink_cli.weight_formats.formats import SOURCE

# Names of folders: no separators, nothing hidden, no dot at the end.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
# What lies beside the folders of the devices.
LOCK_FILE = "neuralink.lock.json"
TRACE_FILE = "trace.safetensors"
SUMMARY_FILE = "summary.json"
_TAKEN = frozenset((LOCK_FILE, TRACE_FILE, SUMMARY_FILE))


@dataclass(frozen=True)
class BuildDevice:
    """A class of devices that a layout is made for.

    Attributes:
        name: Names the folder of what is made for it.
        device: Its storage.
        dram: DRAM for bundles when layouts are replayed on it; None for the build's `dram`.

    Raises:
        OptionError: The name cannot be that of a folder.
    """

    name: str
    device: DeviceModel
    dram: DramBudget | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name.lower() in _TAKEN:
            raise OptionError(
                f"{self.name!r} cannot be the name of a device's folder",
                fix="use letters, digits, dots, _ and -",
            )


def build_device(device: str, name: str | None = None, dram: DramBudget | None = None) -> BuildDevice:
    """A class of devices by the name of a built-in profile or the path of a profile, as `cluster --device` takes them.

    Args:
        name: By default that of the built-in profile, or of the file without its ending.

    Raises:
        OptionError, InputError: As `find_device`, and `BuildDevice`.
    """
    model = find_device(device)
    if name is None:
        built_in = device.partition(":")[0] in builtin_devices()
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", device if built_in else Path(device).stem).strip(".-")
    return BuildDevice(name, model, dram)


def _default_cluster() -> ClusterOptions:
    return ClusterOptions(device=default_device())


@dataclass(frozen=True)
class BuildOptions:
    """Options of `build`, which are those of its stages.

    Attributes:
        data: Calibration data of the one trace.
        devices: What a layout is made for, and what every layout is replayed on.
        profile: How the trace is made; `part` must be None.
        cluster: How the orders are made; `device` is each of `devices`, `weights` and `resident` are those of
            `relayout`.
        relayout: How the layouts are written.
        dram: DRAM for bundles when layouts are replayed.
        recall_text: Text to run the model on before a layout is written, so that its index states how rounding the rows
            that decide firing changes what fires; None not to measure that.
        recall_tokens: How many tokens of it.
        forward: What the model and every layout are run on, to compare what they compute; None not to run them.
        real: Whether to time reads of every layout from the storage it lies on, in addition to modelling them.

    Raises:
        OptionError: Options that do not go together.
    """

    data: CalibrationOptions
    devices: tuple[BuildDevice, ...]
    profile: ProfileOptions = ProfileOptions()
    cluster: ClusterOptions = field(default_factory=_default_cluster)
    relayout: RelayoutOptions = RelayoutOptions()  # noqa: RUF009 - it is frozen
    dram: DramBudget = field(default_factory=lambda: DramBudget(fraction=0.05))
    recall_text: Path | None = None
    recall_tokens: int = 1024
    forward: ForwardOptions | None = None
    real: bool = False

    def __post_init__(self) -> None:
        if not self.devices:
            raise OptionError("no device to make a layout for", fix="pass one with --device")
        names = [device.name.lower() for device in self.devices]
        twice = next((name for k, name in enumerate(names) if name in names[:k]), None)
        if twice is not None:
            raise OptionError(f"two devices have the name {twice!r}", fix="give each a name of its own in a build file")
        if self.profile.part is not None:
            raise OptionError("a build records all of its data, so it takes no --part")
        if self.real and self.relayout.layout != BUNDLED:
            raise OptionError(f"a {self.relayout.layout} layout has no bundles, so `real` cannot read them")
        if self.forward is not None and self.forward.limited and not self.rounded:
            raise OptionError("`max-perplexity-increase` and `max-kl` are for layouts with rounded weights")
        for device in self.devices:
            share = self.dram_of(device).fraction
            if share is not None and 0 < share < self.cluster.pin_hot:
                raise OptionError(
                    f"--dram {share:.3g} of the bundles has no room for the pinned {self.cluster.pin_hot:.3g}",
                    fix="raise --dram or lower --pin-hot",
                )

    @property
    def rounded(self) -> bool:
        """Whether layouts have rounded weights.

        Raises:
            OptionError: A format of weights is none.
        """
        return {*self.relayout.formats.values(), self.relayout.dense_format} != {SOURCE}

    def dram_of(self, device: BuildDevice) -> DramBudget:
        """DRAM for bundles when layouts are replayed on a device."""
        return self.dram if device.dram is None else device.dram

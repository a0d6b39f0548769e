"""The stages of a build, in the order in which they run: what each makes, from what, and how."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuralink_cli.files.durable import new_file, write_all
from neuralink_cli.files.json_text import readable
from neuralink_cli.pipeline.fleet import bench_document, summary_document
from neuralink_cli.pipeline.inputs import (
    ModelInput,
    bench_inputs,
    cluster_inputs,
    forward_inputs,
    profile_inputs,
    relayout_inputs,
)
from neuralink_cli.pipeline.lock import TOOL
from neuralink_cli.pipeline.options import SUMMARY_FILE, TRACE_FILE, BuildDevice, BuildOptions
from neuralink_cli.progress import Progress

if TYPE_CHECKING:
    from neuralink_cli.layout.recall import MeasureRecall

# The packages that may change what a stage makes.
_NUMERIC = ("numpy", "numba")
_MODELS = ("numpy", "tokenizers", "torch", "transformers")


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage.

    Attributes:
        output: What it makes, relative to the build: a file, or the folder of a layout.
        after: The outputs of other stages that it is made from.
        inputs: What else it is made from.
        make: Makes it; what is there is replaced.
        packages: Those whose versions are noted.
        repeatable: Whether the same inputs give the same bytes: not if it measures this machine.
    """

    name: str
    device: str | None
    output: str
    after: tuple[str, ...]
    inputs: Mapping[str, Any]
    make: Callable[[Progress], object]
    packages: tuple[str, ...] = field(default=_NUMERIC)
    repeatable: bool = True

    @property
    def title(self) -> str:
        """How it is called in messages."""
        return self.name if self.device is None else f"{self.name} {self.device}"

    def made_from(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """Everything that decides what comes out, given the digests of the outputs of earlier stages."""
        return {"tool": TOOL, **self.inputs, "stages": {output: digests[output] for output in self.after}}

    def versions(self) -> dict[str, str]:
        """The versions of the packages that would make it now."""
        return {name: version(name) for name in self.packages if find_spec(name) is not None}


def placement_of(device: str) -> str:
    """The placement of a device, relative to the build."""
    return f"{device}/placement.safetensors"


def layout_of(device: str) -> str:
    """The layout of a device, relative to the build."""
    return f"{device}/layout"


def bench_of(device: str) -> str:
    """The figures of all layouts on a device, relative to the build."""
    return f"{device}/bench.json"


def forward_of(device: str) -> str:
    """How far the layout of a device computes something else than the model, relative to the build."""
    return f"{device}/forward.json"


def real_of(device: str) -> str:
    """What reading the layout of a device takes on the storage it lies on, relative to the build."""
    return f"{device}/real.json"


def build_stages(model: ModelInput, output: Path, options: BuildOptions) -> tuple[Stage, ...]:
    """All stages of a build, those first that others need.

    Raises:
        InputError: A dataset, or another file that a stage is made from, cannot be read.
    """
    names = [device.name for device in options.devices]
    stages = [
        Stage(
            "profile", None, TRACE_FILE, (), profile_inputs(model, options),
            partial(_profile, model, output, options), _MODELS,
        )
    ]  # fmt: skip
    for device in options.devices:
        stages += _stages_of(model, output, options, device)
    for device in options.devices:
        after = (TRACE_FILE, *(layout_of(name) for name in names))
        make = partial(_bench, output, options, device)
        stages.append(Stage("bench", device.name, bench_of(device.name), after, bench_inputs(options, device), make))
    if options.real:
        stages += [_real_stage(output, options, device) for device in options.devices]
    after = tuple(bench_of(name) for name in names)
    stages.append(Stage("summary", None, SUMMARY_FILE, after, {}, partial(_summary, output, names), ()))
    return tuple(stages)


def _stages_of(model: ModelInput, output: Path, options: BuildOptions, device: BuildDevice) -> Iterator[Stage]:
    name = device.name
    placement, layout = placement_of(name), layout_of(name)
    make = partial(_cluster, output, options, device)
    yield Stage("cluster", name, placement, (TRACE_FILE,), cluster_inputs(options, device), make)
    make = partial(_relayout, model, output, options, name)
    # Measuring recall runs the model.
    packages = _NUMERIC if options.recall_text is None else _MODELS
    yield Stage("relayout", name, layout, (placement,), relayout_inputs(model, options), make, packages)
    inputs = {"model": model.record(model.files_sha256)}
    yield Stage("verify", name, f"{name}/verify.json", (layout,), inputs, partial(_verify, model, output, name))
    if options.forward is not None:
        make = partial(_forward, model, output, options, name)
        yield Stage("forward", name, forward_of(name), (layout,), forward_inputs(model, options), make, _MODELS)


def _real_stage(output: Path, options: BuildOptions, device: BuildDevice) -> Stage:
    make, after = partial(_real, output, options, device), (TRACE_FILE, layout_of(device.name))
    inputs = bench_inputs(options, device)
    return Stage("real", device.name, real_of(device.name), after, inputs, make, repeatable=False)


def _profile(model: ModelInput, output: Path, options: BuildOptions, progress: Progress) -> None:
    from neuralink_cli.profiling.profile import profile

    recorded = replace(options.profile, revision=model.revision)
    profile(model.model, output / TRACE_FILE, options.data, recorded, overwrite=True, progress=progress)


def _cluster(output: Path, options: BuildOptions, device: BuildDevice, progress: Progress) -> None:
    from neuralink_cli.clustering.cluster import cluster

    relayout = options.relayout
    of_device = replace(options.cluster, device=device.device, weights=relayout.weights, resident=relayout.resident)
    placement = output / placement_of(device.name)
    cluster(output / TRACE_FILE, placement, of_device, overwrite=True, progress=progress)


def _relayout(model: ModelInput, output: Path, options: BuildOptions, device: str, progress: Progress) -> None:
    from neuralink_cli.layout.index import is_layout
    from neuralink_cli.rewriting.relayout import relayout

    layout = output / layout_of(device)
    if layout.is_dir() and not is_layout(layout):
        # It is the build's and has lost its index, without which it would not be replaced.
        shutil.rmtree(layout)
    relayout(
        model.model,
        output / placement_of(device),
        layout,
        options.relayout,
        revision=model.revision,
        architecture=options.profile.architecture,
        allow_uncovered=options.profile.allow_uncovered,
        measure_recall=_recall_of(options, progress),
        resume=True,
        overwrite=True,
        progress=progress,
    )


def _recall_of(options: BuildOptions, progress: Progress) -> MeasureRecall | None:
    if options.recall_text is None:
        return None
    from neuralink_cli.evaluation.recall_text import recall_on_text

    return recall_on_text(options.recall_text, options.recall_tokens, progress)


def _verify(model: ModelInput, output: Path, device: str, progress: Progress) -> None:
    from neuralink_cli.rewriting.verify import verify

    report = verify(model.directory, output / layout_of(device), progress=progress)
    _write(output / device / "verify.json", {"verified": True, **asdict(report)})


def _forward(model: ModelInput, output: Path, options: BuildOptions, device: str, _progress: Progress) -> None:
    from neuralink_cli.evaluation.forward_check import prepare_forward

    assert options.forward is not None
    layout = output / layout_of(device)
    run = prepare_forward(model.directory, layout, options.forward, options.profile.architecture)
    _write(output / forward_of(device), run())


def _real(output: Path, options: BuildOptions, device: BuildDevice, progress: Progress) -> None:
    from neuralink_cli.bench.bench import BenchOptions, bench_layouts

    layout = output / layout_of(device.name)
    settings = BenchOptions(devices=(device.device,), dram=options.dram_of(device), real=True)
    report = bench_layouts([layout], output / TRACE_FILE, settings, progress=progress)
    _write(output / real_of(device.name), bench_document(report, {device.name: layout}))


def _bench(output: Path, options: BuildOptions, device: BuildDevice, progress: Progress) -> None:
    from neuralink_cli.bench.bench import BenchOptions, bench_layouts

    # Its own first: what the baselines need to know is taken from there.
    names = sorted((each.name for each in options.devices), key=lambda name: name != device.name)
    layouts = {name: output / layout_of(name) for name in names}
    settings = BenchOptions(devices=(device.device,), dram=options.dram_of(device))
    report = bench_layouts(list(layouts.values()), output / TRACE_FILE, settings, progress=progress)
    _write(output / bench_of(device.name), bench_document(report, layouts))


def _summary(output: Path, devices: list[str], _progress: Progress) -> None:
    _write(output / SUMMARY_FILE, summary_document({name: output / bench_of(name) for name in devices}))


def _write(path: Path, document: dict[str, Any]) -> None:
    with new_file(path, overwrite=True) as handle:
        write_all(handle, readable(document).encode())

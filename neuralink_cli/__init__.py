"""neuralink: co-activation-ordered flash layouts for sparse LLM inference.

The Python API: the stages of the pipeline as functions, its files, and what a runtime needs (docs/python.md). Names are
imported when they are first used, so that `import neuralink_cli` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuralink_cli.activations.merge import MergeSummary as MergeSummary
    from neuralink_cli.activations.merge import merge_traces as merge_traces
    from neuralink_cli.activations.options import ProfileOptions as ProfileOptions
    from neuralink_cli.activations.options import ProfileSummary as ProfileSummary
    from neuralink_cli.activations.options import ThresholdOptions as ThresholdOptions
    from neuralink_cli.activations.trace import Trace as Trace
    from neuralink_cli.architectures.architecture import Architecture as Architecture
    from neuralink_cli.architectures.architecture import builtin_architectures as builtin_architectures
    from neuralink_cli.architectures.architecture import find_architecture as find_architecture
    from neuralink_cli.architectures.architecture import parse_architecture as parse_architecture
    from neuralink_cli.architectures.architecture import read_architecture as read_architecture
    from neuralink_cli.architectures.choice import ArchitectureChoice as ArchitectureChoice
    from neuralink_cli.architectures.choice import choose_architecture as choose_architecture
    from neuralink_cli.architectures.find_blocks import find_blocks as find_blocks
    from neuralink_cli.bench.bench import BenchOptions as BenchOptions
    from neuralink_cli.bench.bench import BenchReport as BenchReport
    from neuralink_cli.bench.bench import bench_layouts as bench_layouts
    from neuralink_cli.calibration.options import CalibrationOptions as CalibrationOptions
    from neuralink_cli.checkpoint.checkpoint import Checkpoint as Checkpoint
    from neuralink_cli.checkpoint.hub import find_model as find_model
    from neuralink_cli.clustering.cluster import ClusterOptions as ClusterOptions
    from neuralink_cli.clustering.cluster import ClusterSummary as ClusterSummary
    from neuralink_cli.clustering.cluster import cluster as cluster
    from neuralink_cli.clustering.dask_cluster import DaskOptions as DaskOptions
    from neuralink_cli.devices.device import DeviceModel as DeviceModel
    from neuralink_cli.devices.device import builtin_devices as builtin_devices
    from neuralink_cli.devices.device import find_device as find_device
    from neuralink_cli.errors import InputError as InputError
    from neuralink_cli.errors import MismatchError as MismatchError
    from neuralink_cli.errors import MissingDependencyError as MissingDependencyError
    from neuralink_cli.errors import NeuralinkError as NeuralinkError
    from neuralink_cli.errors import OptionError as OptionError
    from neuralink_cli.errors import OutputError as OutputError
    from neuralink_cli.errors import UnsupportedError as UnsupportedError
    from neuralink_cli.errors import VerificationError as VerificationError
    from neuralink_cli.errors import WorkerError as WorkerError
    from neuralink_cli.evaluation.forward_check import ForwardOptions as ForwardOptions
    from neuralink_cli.inspection.diff import DiffReport as DiffReport
    from neuralink_cli.inspection.diff import diff as diff
    from neuralink_cli.inspection.drift import DriftReport as DriftReport
    from neuralink_cli.inspection.drift import drift as drift
    from neuralink_cli.inspection.estimate import estimate as estimate
    from neuralink_cli.inspection.estimate_report import EstimateOptions as EstimateOptions
    from neuralink_cli.inspection.estimate_report import EstimateReport as EstimateReport
    from neuralink_cli.inspection.inspect import Inspection as Inspection
    from neuralink_cli.inspection.inspect import inspect as inspect
    from neuralink_cli.layout.open_layout import open_layout as open_layout
    from neuralink_cli.layout.plan import RelayoutOptions as RelayoutOptions
    from neuralink_cli.models.execution import ExecutionOptions as ExecutionOptions
    from neuralink_cli.pipeline.build import BuildSummary as BuildSummary
    from neuralink_cli.pipeline.build import build as build
    from neuralink_cli.pipeline.build_file import BuildRequest as BuildRequest
    from neuralink_cli.pipeline.build_file import read_build_file as read_build_file
    from neuralink_cli.pipeline.options import BuildDevice as BuildDevice
    from neuralink_cli.pipeline.options import BuildOptions as BuildOptions
    from neuralink_cli.placement.placement import Placement as Placement
    from neuralink_cli.profiling.profile import profile as profile
    from neuralink_cli.report.measurements import ReportOptions as ReportOptions
    from neuralink_cli.report.report import WrittenReport as WrittenReport
    from neuralink_cli.report.report import write_report as write_report
    from neuralink_cli.rewriting.relayout import RelayoutSummary as RelayoutSummary
    from neuralink_cli.rewriting.relayout import relayout as relayout
    from neuralink_cli.rewriting.restore import RestoreSummary as RestoreSummary
    from neuralink_cli.rewriting.restore import restore as restore
    from neuralink_cli.rewriting.verify import VerifyReport as VerifyReport
    from neuralink_cli.rewriting.verify import verify as verify
    from neuralink_cli.sparse_models.loading import load_flash_model as load_flash_model
    from neuralink_cli.storage.budget import DramBudget as DramBudget
    from neuralink_cli.storage.budget import parse_budget as parse_budget
    from neuralink_cli.storage.cache import NeuronCache as NeuronCache
    from neuralink_cli.storage.probe import Probe as Probe
    from neuralink_cli.storage.probe import fio_profile as fio_profile
    from neuralink_cli.storage.probe import probe_profile as probe_profile
    from neuralink_cli.storage.probe import probe_storage as probe_storage
    from neuralink_cli.storage.probe import write_profile as write_profile
    from neuralink_cli.storage.read_planning import ReadPlan as ReadPlan
    from neuralink_cli.storage.read_planning import plan_cheapest as plan_cheapest
    from neuralink_cli.storage.read_planning import plan_with_gap as plan_with_gap
    from neuralink_cli.storage.reader import FlashReader as FlashReader

__version__ = "0.1.0"

# Every exported name and the module that defines it.
_HOMES = {
    "Architecture": "architectures.architecture",
    "ArchitectureChoice": "architectures.choice",
    "BenchOptions": "bench.bench",
    "BenchReport": "bench.bench",
    "BuildDevice": "pipeline.options",
    "BuildOptions": "pipeline.options",
    "BuildRequest": "pipeline.build_file",
    "BuildSummary": "pipeline.build",
    "CalibrationOptions": "calibration.options",
    "Checkpoint": "checkpoint.checkpoint",
    "ClusterOptions": "clustering.cluster",
    "ClusterSummary": "clustering.cluster",
    "DaskOptions": "clustering.dask_cluster",
    "DeviceModel": "devices.device",
    "DiffReport": "inspection.diff",
    "DramBudget": "storage.budget",
    "DriftReport": "inspection.drift",
    "EstimateOptions": "inspection.estimate_report",
    "EstimateReport": "inspection.estimate_report",
    "ExecutionOptions": "models.execution",
    "FlashReader": "storage.reader",
    "ForwardOptions": "evaluation.forward_check",
    "InputError": "errors",
    "Inspection": "inspection.inspect",
    "MergeSummary": "activations.merge",
    "MismatchError": "errors",
    "MissingDependencyError": "errors",
    "NeuralinkError": "errors",
    "NeuronCache": "storage.cache",
    "OptionError": "errors",
    "OutputError": "errors",
    "Placement": "placement.placement",
    "Probe": "storage.probe",
    "ProfileOptions": "activations.options",
    "ProfileSummary": "activations.options",
    "ReadPlan": "storage.read_planning",
    "RelayoutOptions": "layout.plan",
    "RelayoutSummary": "rewriting.relayout",
    "ReportOptions": "report.measurements",
    "RestoreSummary": "rewriting.restore",
    "ThresholdOptions": "activations.options",
    "Trace": "activations.trace",
    "UnsupportedError": "errors",
    "VerificationError": "errors",
    "VerifyReport": "rewriting.verify",
    "WorkerError": "errors",
    "WrittenReport": "report.report",
    "bench_layouts": "bench.bench",
    "build": "pipeline.build",
    "builtin_architectures": "architectures.architecture",
    "builtin_devices": "devices.device",
    "choose_architecture": "architectures.choice",
    "cluster": "clustering.cluster",
    "diff": "inspection.diff",
    "drift": "inspection.drift",
    "estimate": "inspection.estimate",
    "find_architecture": "architectures.architecture",
    "find_blocks": "architectures.find_blocks",
    "find_device": "devices.device",
    "find_model": "checkpoint.hub",
    "fio_profile": "storage.probe",
    "inspect": "inspection.inspect",
    "load_flash_model": "sparse_models.loading",
    "merge_traces": "activations.merge",
    "open_layout": "layout.open_layout",
    "parse_architecture": "architectures.architecture",
    "parse_budget": "storage.budget",
    "plan_cheapest": "storage.read_planning",
    "plan_with_gap": "storage.read_planning",
    "probe_profile": "storage.probe",
    "probe_storage": "storage.probe",
    "profile": "profiling.profile",
    "read_architecture": "architectures.architecture",
    "read_build_file": "pipeline.build_file",
    "relayout": "rewriting.relayout",
    "restore": "rewriting.restore",
    "verify": "rewriting.verify",
    "write_profile": "storage.probe",
    "write_report": "report.report",
}

__all__ = [
    "Architecture",
    "ArchitectureChoice",
    "BenchOptions",
    "BenchReport",
    "BuildDevice",
    "BuildOptions",
    "BuildRequest",
    "BuildSummary",
    "CalibrationOptions",
    "Checkpoint",
    "ClusterOptions",
    "ClusterSummary",
    "DaskOptions",
    "DeviceModel",
    "DiffReport",
    "DramBudget",
    "DriftReport",
    "EstimateOptions",
    "EstimateReport",
    "ExecutionOptions",
    "FlashReader",
    "ForwardOptions",
    "InputError",
    "Inspection",
    "MergeSummary",
    "MismatchError",
    "MissingDependencyError",
    "NeuralinkError",
    "NeuronCache",
    "OptionError",
    "OutputError",
    "Placement",
    "Probe",
    "ProfileOptions",
    "ProfileSummary",
    "ReadPlan",
    "RelayoutOptions",
    "RelayoutSummary",
    "ReportOptions",
    "RestoreSummary",
    "ThresholdOptions",
    "Trace",
    "UnsupportedError",
    "VerificationError",
    "VerifyReport",
    "WorkerError",
    "WrittenReport",
    "bench_layouts",
    "build",
    "builtin_architectures",
    "builtin_devices",
    "choose_architecture",
    "cluster",
    "diff",
    "drift",
    "estimate",
    "find_architecture",
    "find_blocks",
    "find_device",
    "find_model",
    "fio_profile",
    "inspect",
    "load_flash_model",
    "merge_traces",
    "open_layout",
    "parse_architecture",
    "parse_budget",
    "plan_cheapest",
    "plan_with_gap",
    "probe_profile",
    "probe_storage",
    "profile",
    "read_architecture",
    "read_build_file",
    "relayout",
    "restore",
    "verify",
    "write_profile",
    "write_report",
]


# Type checkers see the imports above; with this function they would accept any name as exported.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import an exported name from its module."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"neuralink_cli.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

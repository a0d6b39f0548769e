"""Loads a flash layout as a transformers model: FFN blocks compute sparsely, the rest is the model's own code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.choice import BUILT_IN, ArchitectureChoice, choose_architecture
from neuralink_cli.devices.device import find_device
from neuralink_cli.errors import InputError, NeuralinkError, UnsupportedError, first_line
from neuralink_cli.files.free_memory import resident_bytes
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.open_layout import describe_source, open_layout
from neuralink_cli.models.hf_packages import quiet_transformers, require_hf_packages
from neuralink_cli.sparse_models.flash_weights import FlashWeights
from neuralink_cli.sparse_models.settings import RunSettings, compute_dtype, dense_entries, require_runnable
from neuralink_cli.storage.budget import parse_budget
from neuralink_cli.storage.policies import DEFAULT_POLICY
from neuralink_cli.weight_formats.formats import SOURCE

if TYPE_CHECKING:
    from neuralink_cli.sparse_models.stored_weights import StoredWeights


def load_flash_model(
    directory: str | Path,
    *,
    dram: str = "20%",
    cache: str = DEFAULT_POLICY,
    device_profile: str | None = None,
    direct: bool | None = None,
    queue_depth: int = 32,
    dtype: str = "float32",
    architecture: ArchitectureChoice = BUILT_IN,
    ignore_remote_code: bool = False,
) -> Any:
    """Load a bundled layout with resident gate rows as a transformers model whose other FFN weights stay in flash.

    Use the model as a context manager, or call its `close`. What fetching took is in `model.flash` (`FlashWeights`).

    >>> with load_flash_model("model-flash", dram="10%") as model:
    ...     model.generate(**tokenizer("Hello", return_tensors="pt"), do_sample=False)

    Args:
        dram: Memory for cached bundles, as `5%` (of all bundles), `64MB` or `1.5GiB`.
        cache: One of `neuralink_cli.storage.policies.POLICY_NAMES`.
        device_profile: Name or file of the device profile that reads are planned for.
        direct: Whether reads go past the page cache; by default if the file system supports it.
        dtype: Precision to compute in; "float32" is exact for checkpoints of any usual dtype, "auto" is the dtype of
            the checkpoint's dense weights, which are then mapped from the file instead of converted.
        architecture: Where the description of the model's blocks comes from.
        ignore_remote_code: Run what transformers has for the model's type instead of the code that comes with it.

    Raises:
        InputError: Not a layout, or a damaged one; a weight is missing.
        VerificationError: Index and file do not fit each other.
        OptionError: A layout without resident rows; a DRAM budget that is too small; an unknown cache or device.
        UnsupportedError: A layout of another kind, a model that transformers does not have, or with code of its own.
        MissingDependencyError: The packages of the extra `hf` are not installed.
    """
    settings = RunSettings(
        dram=parse_budget(dram),
        cache=cache,
        device=None if device_profile is None else find_device(device_profile),
        direct=direct,
        queue_depth=queue_depth,
        dtype=dtype,
        ignore_remote_code=ignore_remote_code,
    )
    with open_layout(Path(directory)) as opened:
        layout = require_runnable(opened)
        return _load(layout, settings, choose_architecture(describe_source(layout), architecture))


def load_with_settings(directory: Path, settings: RunSettings, architecture: Architecture) -> Any:
    """As `load_flash_model`, with settings and an architecture that are already checked.

    Raises:
        As `load_flash_model`.
    """
    with open_layout(directory) as opened:
        return _load(require_runnable(opened), settings, architecture)


def _load(layout: BundledLayout, settings: RunSettings, architecture: Architecture) -> Any:
    from neuralink_cli.models.own_code import settle_own_code

    layout.check_small_tensors()
    require_hf_packages("torch", "transformers")
    settle_own_code(layout.directory, architecture, ignore=settings.ignore_remote_code, may_run=False)
    settings = replace(settings, dtype=compute_dtype(settings.dtype, layout))
    with quiet_transformers(), _explained(layout.directory):
        kind = _model_class(layout.directory, architecture)
    weights = FlashWeights(layout.directory, settings)
    try:
        # The libraries and the kernels are loaded by now, and of the layout no more than the cache.
        weights.programs_bytes = resident_bytes() - weights.cache_bytes
        with quiet_transformers():
            return _build(layout, architecture, weights, settings, *kind)
    except BaseException:
        weights.close()
        raise


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Whatever transformers raises within the block is an error of the layout."""
    try:
        yield
    except NeuralinkError:
        raise
    except Exception as error:
        raise InputError(f"transformers cannot build its model ({first_line(error)})", where=directory) from error


def _build(
    layout: BundledLayout,
    architecture: Architecture,
    weights: FlashWeights,
    settings: RunSettings,
    config: Any,
    model_class: Any,
) -> Any:
    import torch

    from neuralink_cli.models.loading_report import require_loaded
    from neuralink_cli.models.model_class import activate_up_projections
    from neuralink_cli.sparse_models.block_replacement import Attach, block_weights, replace_blocks
    from neuralink_cli.sparse_models.stored_weights import resident_in, with_equals_shared

    replaced: list[Attach] = []

    def put_in_place(model: Any) -> None:
        replaced[:] = replace_blocks(model, layout.index.blocks, architecture)

    with _explained(layout.directory):
        sparse_class = _closing_class(model_class, put_in_place)
        # Randomly drawn weights are refused below; the seed fixes the weights that a checkpoint may lack.
        torch.manual_seed(0)
        model, report = sparse_class.from_pretrained(
            None,
            config=config,
            state_dict=with_equals_shared(_dense_weights(layout)),
            dtype=getattr(torch, settings.dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        _load_generation_config(model, layout.directory)
    # What it is called in errors of its code; it came from no folder that transformers knows.
    model.config._name_or_path = str(layout.directory)
    require_loaded(report, model, architecture, layout.directory)
    weights.dense_bytes = resident_in((*model.parameters(), *model.buffers()))
    for attach, store in zip(replaced, weights.stores, strict=True):
        attach(block_weights(layout, weights, store, settings))
    if architecture.up_activation:
        activate_up_projections(model, architecture, config.hidden_act)
    _pack_states_for_the_head(model)
    model.flash = weights
    return model.eval().requires_grad_(False)


def _pack_states_for_the_head(model: Any) -> None:
    """Have the head see states without gaps between them, though it may be asked for those of the last token alone.

    Else torch multiplies by a copy of all its weights, if it is in half precision on a processor with AMX or FP16.
    """
    import torch

    def packed(_: Any, states: tuple[Any, ...]) -> tuple[Any, ...]:
        return (states[0].clone(memory_format=torch.contiguous_format), *states[1:])

    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(packed)


def _model_class(directory: Path, architecture: Architecture) -> tuple[Any, Any]:
    """The config of a layout and the transformers class of its model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoConfig

    from neuralink_cli.models.model_class import stand_in_config

    config = stand_in_config(directory, architecture)
    if config is None:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    # A layout of a quantised checkpoint has its weights rounded, with nothing left to scale.
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if architecture.task == "causal-lm" else MODEL_MAPPING
    if type(config) not in mapping:
        raise UnsupportedError(f"transformers has no {architecture.task} model {config.model_type!r}", where=directory)
    found = mapping[type(config)]
    return config, found[0] if isinstance(found, tuple) else found


class _InFlash:
    """What differs in a model with weights in flash: it can be closed, but not saved."""

    flash: FlashWeights

    def close(self) -> None:
        """Close the layout; harmless when closed already. The model cannot run afterwards."""
        self.flash.close()

    def save_pretrained(self, *_arguments: Any, **_options: Any) -> None:
        """Refuse: the saved model would lack the FFN weights.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "a model whose FFN weights are in flash cannot be saved", fix="get its checkpoint with `neuralink restore`"
        )

    def __enter__(self) -> _InFlash:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _closing_class(model_class: Any, put_in_place: Any) -> Any:
    """The model's class, with its FFN modules replaced before any weight is allocated."""

    def build(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        model_class.__init__(self, config, *arguments, **options)
        put_in_place(self)

    # transformers looks at the module of a model's class.
    return type(
        model_class.__name__,
        (_InFlash, model_class),
        {"__init__": build, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__},
    )


def _dense_weights(layout: BundledLayout) -> Iterator[tuple[str, StoredWeights]]:
    """The tensors of the source that are not part of a block, under their names in the source."""
    from neuralink_cli.sparse_models.stored_weights import StoredWeights

    for entry in dense_entries(layout):
        weights = layout.dense[entry.name].weights if entry.name in layout.dense else SOURCE
        yield entry.name, StoredWeights(layout.file, entry.name, entry.dtype, entry.shape, weights)


def _load_generation_config(model: Any, directory: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(directory), local_files_only=True)

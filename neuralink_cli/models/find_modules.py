"""Finds the modules of a transformers model that compute an FFN block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import BlockPart, ExpertPlace, module_of
from neuralink_cli.errors import UnsupportedError

# The axis of a weight along which the outputs of its module run.
_OUTPUT_AXIS = {"Linear": 0, "Conv1D": 1}


def find_module(model: Any, part: BlockPart, shape: Sequence[int], architecture: Architecture) -> Any:
    """The module that holds a part, even if the model drops or adds a prefix of the tensor names.

    Args:
        shape: The shape of its weight in the checkpoint.

    Raises:
        UnsupportedError: There is no such module, its weight has another shape, or neurons run along its other axis.
    """

    def fits(module: Any) -> bool:
        weight = getattr(module, "weight", None)
        return weight is not None and tuple(weight.shape) == tuple(shape)

    module = _find(model, module_of(part), f"with a weight of shape {list(shape)}", architecture, fits)
    _require_axis(module, part, architecture)
    return module


def _require_axis(module: Any, part: BlockPart, architecture: Architecture) -> None:
    """Check that neurons are what a module gives (gate, up) or takes (down). Shapes tell only if they differ."""
    kind = type(module).__name__
    if kind not in _OUTPUT_AXIS:
        return
    axis = _OUTPUT_AXIS[kind] if part.role != "down" else 1 - _OUTPUT_AXIS[kind]
    if part.neuron_axis != axis:
        raise UnsupportedError(
            f"neurons of tensor {part.weight!r} run along axis {axis}, as its module is a {kind}, not along axis "
            f"{part.neuron_axis}, as architecture {architecture.name!r} says",
            fix="correct `neuron_axis` in the description",
        )


def find_activation(model: Any, module: Any, activation: str) -> Any:
    """The module beside a projection that computes this activation; None unless there is exactly one."""
    from transformers.activations import ACT2FN

    if activation not in ACT2FN:
        return None
    kind = type(ACT2FN[activation])
    name = next(name for name, other in model.named_modules() if other is module)
    siblings = model.get_submodule(name.rpartition(".")[0]).children()
    found = [sibling for sibling in siblings if type(sibling) is kind]
    return found[0] if len(found) == 1 else None


def find_experts(model: Any, place: ExpertPlace, architecture: Architecture) -> Any:
    """The module that runs the experts of a layer.

    Raises:
        UnsupportedError: No module holds the weights of all experts itself.
    """

    def fits(module: Any) -> bool:
        return getattr(module, "num_experts", 0) > place.index and hasattr(module, "down_proj")

    return _find(model, place.module, f"that runs {place.index + 1} experts or more", architecture, fits)


def _find(model: Any, wanted: str, kind: str, architecture: Architecture, fits: Callable[[Any], bool]) -> Any:
    modules = dict(model.named_modules())
    for name in _candidates(wanted, modules, architecture):
        if name in modules and fits(modules[name]):
            return modules[name]
    raise UnsupportedError(
        f"{type(model).__name__} of transformers has no module {wanted!r} {kind}",
        fix="check the architecture's names against the model's modules",
    )


def _candidates(wanted: str, modules: Mapping[str, Any], architecture: Architecture) -> Iterator[str]:
    bare = architecture.bare_name(wanted)
    yield wanted
    yield from (prefix + bare for prefix in architecture.prefixes)
    yield bare
    yield from (name for name in modules if name.endswith("." + bare))

"""Finds the modules of a transformers model that compute an FFN block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from neuralink_cli.architectures.architecture import Architecture
from neuralink_cli.architectures.blocks import BlockPart, ExpertPlace, module_of
from neuralink_cli.errors import UnsupportedError


def find_module(model: Any, part: BlockPart, shape: Sequence[int], architecture: Architecture) -> Any:
    """The module that holds a part, even if the model drops or adds a prefix of the tensor names.

    Args:
        shape: The shape of its weight in the checkpoint.

    Raises:
        UnsupportedError: There is no such module, or its weight has another shape.
    """

    def fits(module: Any) -> bool:
        weight = getattr(module, "weight", None)
        return weight is not None and tuple(weight.shape) == tuple(shape)

    return _find(model, module_of(part), f"with a weight of shape {list(shape)}", architecture, fits)


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

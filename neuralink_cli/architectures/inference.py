"""Infers the JSON description of an architecture from a config and the names and shapes of tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from neuralink_cli.architectures.architecture import parse_architecture
from neuralink_cli.architectures.inference_blocks import Kind, find_kinds
from neuralink_cli.architectures.inference_config import (
    expert_count,
    experts_per_token,
    layer_count,
    read_activation,
    read_task,
)
from neuralink_cli.architectures.inference_names import EXPERT, LAYER
from neuralink_cli.checkpoint.model_description import ModelDescription


def infer_architecture(model: ModelDescription) -> dict[str, Any]:
    """The JSON description of a model's architecture, as in `architecture.schema.json`.

    Raises:
        UnsupportedError: No description fits, or more than one may fit.
    """
    if not model.config.get("model_type"):
        raise model.refusal("config.json names no model_type")
    stacks, kinds = find_kinds(model)
    document = _document(kinds, stacks, model)
    parse_architecture(document, model.where)
    return document


def _document(kinds: Sequence[Kind], stacks: Sequence[str], model: ModelDescription) -> dict[str, Any]:
    prefix = _prefix(stacks)
    encoder = len(stacks) == 1 and "encoder" in stacks[0].split(".")
    task = read_task(model, two_stacks=len(stacks) > 1, encoder=encoder)
    document: dict[str, Any] = {
        "name": _name(str(model.config["model_type"])),
        "description": "Inferred from names and shapes of tensors.",
        "model_types": [model.config["model_type"]],
        "task": task,
        "prefixes": [prefix, ""] if prefix else [""],
        "activation": read_activation(model),
        "blocks": [],
    }
    if task in ("encoder", "image-encoder"):
        document["not_in_checkpoint"] = ["pooler."]
    layers = {stack: _keys(layer_count(model.config, stack)) for stack in stacks}
    if all(layers.values()) and len({*map(tuple, layers.values())}) == 1:
        document["layers"] = layers.pop(stacks[0])
        layers = {}
    ids = _ids(kinds, stacks)
    for kind in sorted(kinds, key=lambda kind: (stacks.index(kind.unit.stack), _rank(kind), kind.unit.key)):
        block: dict[str, Any] = {"id": ids[kind.unit.stack, kind.unit.key]}
        if layers.get(kind.unit.stack):
            block["layers"] = layers[kind.unit.stack]
        if kind.experts is not None:
            stated = {"count": expert_count(model.config), "per_token": experts_per_token(model.config)}
            block["experts"] = {
                **{name: _keys(count) for name, count in stated.items() if count is not None},
                "module": f"{kind.unit.stack.removeprefix(prefix)}{LAYER}.{_experts_module(kind)}",
            }
        document["blocks"].append(block | _parts(kind, prefix))
    if len({*ids.values()}) < len(kinds):
        raise model.refusal(f"names differ only in punctuation or capitals ({kinds[0].unit})")
    return document


def _experts_module(kind: Kind) -> str:
    """The module of experts in transformers. It has the name of the tensors, except for one old name."""
    return re.sub(r"\bblock_sparse_moe\b", "mlp", kind.key) if kind.unit.per_expert else kind.key


def _keys(count: tuple[str, int] | None) -> list[str]:
    return [] if count is None else [count[0]]


def _parts(kind: Kind, prefix: str) -> dict[str, Any]:
    parts = {}
    for role in ("gate", "up", "down"):
        fused = role != "down" and "gate_up" in kind.unit.weights
        pattern = kind.unit.weights.get("gate_up" if fused else role)
        if pattern is None:
            continue
        part: dict[str, Any] = {
            "weight": str(pattern).removeprefix(prefix),
            "neuron_axis": 1 - kind.up_axis if role == "down" else kind.up_axis,
        }
        if kind.has_bias(role):
            part["bias"] = str(pattern.bias).removeprefix(prefix)
        if fused:
            part["share"] = {"part": 1 if role == "gate" else 2, "of": 2}
        parts[role] = part
    return parts


def _ids(kinds: Sequence[Kind], stacks: Sequence[str]) -> dict[tuple[str, str], str]:
    """Ids of kinds by stack and key: short ids where they are unique, else ids with the whole key."""
    short = {(kind.unit.stack, kind.unit.key): _side(kind, stacks) + _short_id(kind) for kind in kinds}
    taken = Counter(short.values())
    return {
        (kind.unit.stack, kind.unit.key): name if taken[name] == 1 else _side(kind, stacks) + _long_id(kind)
        for kind, name in zip(kinds, short.values(), strict=True)
    }


def _side(kind: Kind, stacks: Sequence[str]) -> str:
    return "" if len(stacks) == 1 else ("encoder.", "decoder.")[stacks.index(kind.unit.stack)]


def _rank(kind: Kind) -> int:
    """Dense blocks first, then experts, then shared experts."""
    return 1 if kind.experts is not None else 2 if "share" in kind.key.lower() else 0


def _short_id(kind: Kind) -> str:
    last = {0: "", 1: f".experts.{EXPERT}", 2: "." + _name(kind.key.rpartition(".")[2])}
    return f"layers.{LAYER}{last[_rank(kind)]}"


def _long_id(kind: Kind) -> str:
    steps = [f"layers.{LAYER}", *(_name(step) for step in kind.key.split(".") if step)]
    if kind.experts is not None:
        steps += [EXPERT] if steps[-1] == "experts" else ["experts", EXPERT]
    return ".".join(steps)


def _name(text: str) -> str:
    """The text as a name that the schema allows."""
    return re.sub("[^a-z0-9_-]+", "-", text.lower()).strip("_-") or "inferred"


def _prefix(stacks: Sequence[str]) -> str:
    """The prefix of a model's names before those of its base model: the first step, if more than one comes."""
    firsts = {stack.split(".")[0] for stack in stacks if stack.count(".") > 1}
    first = firsts.pop() if len(firsts) == 1 else ""
    shared = first not in ("", "encoder", "decoder") and all(stack.startswith(f"{first}.") for stack in stacks)
    return f"{first}." if shared else ""

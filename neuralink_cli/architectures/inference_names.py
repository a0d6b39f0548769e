"""What tensor names tell: the layer and expert that a tensor belongs to, and the role that its words stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Template

LAYER, EXPERT = "${layer}", "${expert}"
_NUMBER = re.compile(r"0|[1-9][0-9]{0,6}")
_PLAIN = re.compile(r"[A-Za-z0-9_.-]*")
_ATTENTION = re.compile(r"attn|attention|qkv|query|^(q|k|v|o)_proj$|^out_proj$|^(q|k|v)_lin$")
# Roles of whole words; names with the word gate, up or down need no entry.
_WORDS = {
    "fc1": "up", "fc_1": "up", "fc_in": "up", "c_fc": "up", "dense_h_to_4h": "up", "h_to_4h": "up", "lin1": "up",
    "linear1": "up", "linear_1": "up", "linear_in": "up", "wi": "up", "wi_1": "up", "w_in": "up",
    "intermediate_dense": "up", "intermediate.dense": "up", "wi_0": "gate",
    "fc2": "down", "fc_2": "down", "fc_out": "down", "c_proj": "down", "dense_4h_to_h": "down", "4h_to_h": "down",
    "lin2": "down", "linear2": "down", "linear_2": "down", "linear_out": "down", "wo": "down", "w_out": "down",
    "output_dense": "down", "output.dense": "down",
    # These have a meaning only together.
    "w1": "w1", "w2": "w2", "w3": "w3",
}  # fmt: skip
_NUMBERED = {
    frozenset({"w1", "w2", "w3"}): {"w1": "gate", "w2": "down", "w3": "up"},
    frozenset({"w1", "w2"}): {"w1": "up", "w2": "down"},
}


@dataclass(frozen=True)
class NamePattern:
    """A tensor name without its numbers: the text before the layer number, and the text after it.

    A `$` in the name itself is doubled.
    """

    stack: str
    rest: str

    def __str__(self) -> str:
        return f"{self.stack}{LAYER}.{self.rest}"

    @property
    def bias(self) -> NamePattern:
        """The name of this weight's bias, if it has one."""
        stem = self.rest.removesuffix(".weight")
        return NamePattern(self.stack, f"{stem}.bias" if stem != self.rest else f"{stem}_bias")

    @property
    def of_attention(self) -> bool:
        """Whether a word in the name says that the tensor belongs to attention."""
        return any(_ATTENTION.search(step) for step in self.rest.lower().split("."))


@dataclass(frozen=True)
class Place:
    """The number of a layer and, for a tensor of one expert, the number of the expert."""

    layer: int
    expert: int | None

    def name(self, pattern: NamePattern) -> str:
        """The tensor of a pattern at this place."""
        return Template(str(pattern)).substitute(layer=self.layer, expert=self.expert)


def take_numbers_out(name: str) -> tuple[NamePattern, Place] | None:
    """The pattern and place of a tensor; None if it belongs to no layer.

    The first number is the layer. A later number is the expert if the step before it says expert and not shared.
    """
    steps = name.replace("$", "$$").split(".")
    numbers = [i for i, step in enumerate(steps) if _NUMBER.fullmatch(step)]
    if not numbers or numbers[0] == len(steps) - 1:
        return None
    layer_at, *others = numbers
    expert = None
    for i in others:
        word = steps[i - 1].lower()
        if "expert" in word and "share" not in word and i < len(steps) - 1:
            expert, steps[i] = int(steps[i]), EXPERT
            break
    stack = "".join(step + "." for step in steps[:layer_at])
    return NamePattern(stack, ".".join(steps[layer_at + 1 :])), Place(int(steps[layer_at]), expert)


def role_of(pattern: NamePattern) -> tuple[str, str] | None:
    """The unit that a weight belongs to (a part of its name) and its role there; None if its name tells no role.

    Roles are gate, up, down, gate_up (both in one tensor, in this order), and the numbered roles of `settle_roles`.
    """
    stem = pattern.rest.removesuffix(".weight")
    if pattern.of_attention or stem.endswith((".bias", "_bias")) or not _is_plain(pattern):
        return None
    steps = stem.split(".")
    for length in (2, 1):
        word = ".".join(steps[-length:]).lower()
        role = _WORDS.get(word) if length == 2 else _WORDS.get(word) or _role_of_words(word.split("_"))
        if role is not None:
            return ".".join(steps[:-length]), role
    return None


def settle_roles(roles: dict[str, NamePattern]) -> dict[str, NamePattern]:
    """A unit's weights with numbered roles replaced: w1, w2, w3 are gate, down, up; w1 and w2 alone are up and down."""
    numbered = frozenset(role for role in roles if role in ("w1", "w2", "w3"))
    meant = _NUMBERED.get(numbered, {}) if len(numbered) == len(roles) else {}
    return {meant.get(role, role): pattern for role, pattern in roles.items()}


def _role_of_words(words: list[str]) -> str | None:
    """The role by the words gate, up and down. `up_gate` has none: which half is the gate differs between models."""
    found = [word for word in words if word in ("gate", "up", "down")]
    if found == ["gate", "up"]:
        return "gate_up"
    return found[0] if len(found) == 1 else None


def _is_plain(pattern: NamePattern) -> bool:
    return _PLAIN.fullmatch(pattern.stack + pattern.rest.replace(EXPERT, "")) is not None

"""A JSON Schema as a function: whether a document is valid, for documents with thousands of blocks.

jsonschema interprets the schema for every value, which takes seconds for a model with thousands of experts. Here it is
translated once, for the keywords that the schemas of this package use. What is not valid jsonschema explains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Beyond it JSON readers that use floating point lose integers, and 64-bit sums overflow.
LARGEST_INTEGER = (1 << 53) - 1

# Whether a value is valid.
Check = Callable[[Any], bool]
# The definitions of a schema, by name.
Definitions = Mapping[str, Any]

_ANNOTATIONS = frozenset({"$schema", "$defs", "title", "description"})


def is_integer(value: Any) -> bool:
    """Whether a value is an integer that every JSON reader reads the same: no 24.0, no true."""
    return type(value) is int and abs(value) <= LARGEST_INTEGER


def is_number(value: Any) -> bool:
    """Whether a value is such an integer, or a float."""
    return type(value) is float or is_integer(value)


def is_the_same(value: Any, other: Any) -> bool:
    """Whether two values are equal and of one type: 1 is not true."""
    return type(value) is type(other) and value == other


def whole_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern of a schema, whose $ is the end of the text. Python's own $ also matches before a line break there."""
    return re.compile(re.sub(r"\$$", r"\\Z", pattern))


def compile_schema(schema: Mapping[str, Any]) -> Check:
    """Translate a schema.

    Raises:
        ValueError: The schema has a keyword that is not known here.
    """
    definitions: Definitions = schema.get("$defs", {})
    compiled: dict[str, Check] = {}

    def refer(reference: str) -> Check:
        name = reference.removeprefix("#/$defs/")
        if name not in compiled:
            # A definition may refer to itself.
            compiled[name] = lambda value: compiled[name](value)
            compiled[name] = _schema(definitions[name], refer)
        return compiled[name]

    return _schema(schema, refer)


def _schema(schema: Any, refer: Callable[[str], Check]) -> Check:
    """The check of a schema or of a part of one."""
    if isinstance(schema, bool):
        return lambda _value: schema
    keywords = schema.keys() - _ANNOTATIONS
    checks = []
    if "type" in keywords:
        checks.append(_any(_TYPES[name] for name in _listed(schema["type"])))
    if "$ref" in keywords:
        checks.append(refer(schema["$ref"]))
    for kinds, names, make in (
        (dict, _OF_OBJECTS, _object),
        (list, _OF_ARRAYS, _array),
        (str, _OF_STRINGS, _string),
        ((int, float), _OF_NUMBERS, _number),
    ):
        if keywords & names:
            checks.append(_only_for(kinds, make(schema, refer)))
    if "enum" in keywords or "const" in keywords:
        allowed = schema["enum"] if "enum" in keywords else [schema["const"]]
        checks.append(lambda value: any(is_the_same(value, one) for one in allowed))
    if "anyOf" in keywords:
        checks.append(_any([_schema(one, refer) for one in schema["anyOf"]]))
    if "oneOf" in keywords:
        choices = [_schema(one, refer) for one in schema["oneOf"]]
        checks.append(lambda value: sum(choice(value) for choice in choices) == 1)
    unknown = keywords - _OF_OBJECTS - _OF_ARRAYS - _OF_STRINGS - _OF_NUMBERS - _OF_ANY
    if unknown:
        raise ValueError(f"keywords of a schema that are not known: {', '.join(sorted(unknown))}")
    return _all(checks)


_OF_ANY = frozenset({"type", "$ref", "enum", "const", "anyOf", "oneOf"})
_OF_OBJECTS = frozenset({"properties", "required", "additionalProperties", "minProperties", "dependentRequired"})
_OF_ARRAYS = frozenset({"items", "minItems", "maxItems", "uniqueItems"})
_OF_STRINGS = frozenset({"minLength", "maxLength", "pattern"})
_OF_NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_TYPES: Mapping[str, Check] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": is_integer,
    "number": is_number,
}
_INFINITE = float("inf")


def _object(schema: Mapping[str, Any], refer: Callable[[str], Check]) -> Check:
    members = {name: _schema(one, refer) for name, one in schema.get("properties", {}).items()}
    others = _schema(schema.get("additionalProperties", True), refer)
    required = schema.get("required", ())
    dependent = schema.get("dependentRequired", {})
    fewest = schema.get("minProperties", 0)

    def check(value: dict[str, Any]) -> bool:
        if len(value) < fewest or not all(map(value.__contains__, required)):
            return False
        for name, needed in dependent.items():
            if name in value and not all(map(value.__contains__, needed)):
                return False
        # Not all(), whose generator takes longer than many of the checks.
        for name, member in value.items():  # noqa: SIM110
            if not members.get(name, others)(member):
                return False
        return True

    return check


def _array(schema: Mapping[str, Any], refer: Callable[[str], Check]) -> Check:
    item = _schema(schema.get("items", True), refer)
    fewest, most = schema.get("minItems", 0), schema.get("maxItems", _INFINITE)
    unique = schema.get("uniqueItems", False)

    def check(value: list[Any]) -> bool:
        if not fewest <= len(value) <= most or not all(map(item, value)):
            return False
        return not unique or not any(one in value[:k] for k, one in enumerate(value))

    return check


def _string(schema: Mapping[str, Any], _refer: Callable[[str], Check]) -> Check:
    fewest, most = schema.get("minLength", 0), schema.get("maxLength", _INFINITE)
    found = whole_pattern(schema.get("pattern", "")).search
    return lambda value: fewest <= len(value) <= most and found(value) is not None


def _number(schema: Mapping[str, Any], _refer: Callable[[str], Check]) -> Check:
    least, most = schema.get("minimum", -_INFINITE), schema.get("maximum", _INFINITE)
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")

    def check(value: float) -> bool:
        # What is no number here, such as true, has no size.
        if not is_number(value):
            return True
        return least <= value <= most and (above is None or value > above) and (below is None or value < below)

    return check


def _only_for(kinds: type | tuple[type, ...], check: Check) -> Check:
    """A check that other kinds of values pass, as those of one kind of value do in JSON Schema."""
    return lambda value: not isinstance(value, kinds) or check(value)


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _all(checks: list[Check]) -> Check:
    if len(checks) == 1:
        return checks[0]
    if len(checks) == 2:
        first, second = checks
        return lambda value: first(value) and second(value)
    return lambda value: all(check(value) for check in checks)


def _any(checks: Iterable[Check]) -> Check:
    checks = list(checks)
    if len(checks) == 1:
        return checks[0]
    return lambda value: any(check(value) for check in checks)

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from neuralink_cli.activations.trace import TRACE_SCHEMA
from neuralink_cli.architectures.architecture import (
    ARCHITECTURE_SCHEMA,
    ConfigNumber,
    ExpertsPattern,
    UpPattern,
    builtin_architectures,
    find_architecture,
    parse_architecture,
    read_architecture,
)
from neuralink_cli.architectures.choice import ArchitectureChoice, choose_architecture
from neuralink_cli.checkpoint.model_description import ModelDescription
from neuralink_cli.devices.device import DEVICE_SCHEMA
from neuralink_cli.errors import InputError, OptionError, UnsupportedError
from neuralink_cli.files.schema import Schema
from neuralink_cli.layout.index import FLASH_SCHEMA, PERMUTED_SCHEMA
from neuralink_cli.placement.placement import PLACEMENT_SCHEMA
from tests import swept
from tests.families import BY_NAME_ONLY, BY_TEXT_MODEL, FAMILY

FOLDER = resources.files("neuralink_cli.architectures").joinpath("descriptions")
BUILT_IN = sorted(item.name for item in FOLDER.iterdir() if item.name.count(".") == 1 and item.name.endswith(".json"))
VALID: dict[str, Any] = {
    "name": "mine",
    "description": "A test.",
    "model_types": ["mine"],
    "task": "causal-lm",
    "prefixes": ["model.", ""],
    "layers": ["depth"],
    "activation": {"config": ["act"], "default": "relu"},
    "not_in_checkpoint": ["head."],
    "blocks": [
        {
            "id": "layers.${layer}",
            "gate": {"weight": "l.${layer}.g", "neuron_axis": 0},
            "up": {"weight": "l.${layer}.u", "neuron_axis": 0, "bias": "l.${layer}.ub"},
            "down": {"weight": "l.${layer}.d", "neuron_axis": 1, "bias": "l.${layer}.db"},
        }
    ],
}


def document_of(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(FOLDER.joinpath(name).read_text())
    return document


SCHEMAS = (ARCHITECTURE_SCHEMA, TRACE_SCHEMA, PLACEMENT_SCHEMA, DEVICE_SCHEMA, FLASH_SCHEMA, PERMUTED_SCHEMA)


@pytest.mark.parametrize("published", SCHEMAS, ids=lambda schema: schema.kind)
def test_the_published_schemas_are_schemas(published: Schema) -> None:
    schema = published.read()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_file_meets_the_schema(name: str) -> None:
    document = document_of(name)
    jsonschema.Draft202012Validator(ARCHITECTURE_SCHEMA.read()).validate(document)
    assert name == f"{document['name']}.json"
    for model_type in document["model_types"]:
        assert find_architecture(model_type, Path("x")).name == document["name"]


def test_no_model_type_is_in_two_files_and_all_are_listed() -> None:
    everything = [model_type for name in BUILT_IN for model_type in document_of(name)["model_types"]]
    assert len(set(everything)) == len(everything)
    assert {t for a in builtin_architectures() for t in a.model_types} == set(everything)
    assert [a.name for a in builtin_architectures()] == [name.removesuffix(".json") for name in BUILT_IN]


def test_the_promised_model_types_are_known() -> None:
    for model_type in ("opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "bert"):
        assert find_architecture(model_type, Path("x"))


def test_an_unknown_model_type_says_where_the_known_ones_are() -> None:
    with pytest.raises(UnsupportedError) as caught:
        find_architecture("mamba9", Path("the/model"))
    assert str(caught.value).startswith("the/model: architecture 'mamba9' is not known (`neuralink architectures`")
    assert str(caught.value).endswith("(docs/architectures.md) for --architecture")


def test_reads_a_file_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(VALID))
    found = read_architecture(path)
    assert (found.name, found.model_types, found.task) == ("mine", ("mine",), "causal-lm")
    assert (found.prefixes, found.blocks[0].layer_keys) == (("model.", ""), ("depth",))
    assert (found.activation_keys, found.activation_default) == (("act",), "relu")
    assert found.not_in_checkpoint == ("head.",)
    assert list(found.blocks[0].parts) == ["gate", "up", "down"]
    assert found.blocks[0].parts["up"].bias == "l.${layer}.ub"
    assert found.blocks[0].parts["gate"].bias is None
    opt = ModelDescription(Path("x"), {"model_type": "opt"}, {})
    assert choose_architecture(opt, ArchitectureChoice(path)) == found
    assert choose_architecture(opt).name == "opt"
    with pytest.raises(OptionError, match="drop one of them"):
        ArchitectureChoice(path, infer=True)


def test_parts_are_in_bundle_order_whatever_the_order_in_the_file() -> None:
    document = copy.deepcopy(VALID)
    document["blocks"][0] = dict(reversed(document["blocks"][0].items()))
    assert list(parse_architecture(document, "x").blocks[0].parts) == ["gate", "up", "down"]


def at(*steps: Any) -> Callable[[Any], Any]:
    def find(document: Any) -> Any:
        for step in steps:
            document = document[step]
        return document

    return find


LEVELS: dict[str, Callable[[Any], Any]] = {
    "top": at(),
    "activation": at("activation"),
    "block": at("blocks", 0),
    "part": at("blocks", 0, "down"),
}


@pytest.mark.parametrize("level", LEVELS)
def test_an_unknown_key_is_an_error_at_every_level(level: str) -> None:
    document = copy.deepcopy(VALID)
    LEVELS[level](document)["colour"] = "blue"
    with pytest.raises(InputError, match=r"mine.json: not a valid architecture: .*'colour' was unexpected"):
        parse_architecture(document, "mine.json")


CHANGES: dict[str, tuple[Callable[[Any], Any], str, Any]] = {
    "name with a slash": (at(), "name", "a/b"),
    "name is a number": (at(), "name", 7),
    "no model types": (at(), "model_types", []),
    "model types twice": (at(), "model_types", ["a", "a"]),
    "another task": (at(), "task", "vision"),
    "no prefixes": (at(), "prefixes", []),
    "no activation": (at(), "activation", {}),
    "empty default": (at("activation"), "default", ""),
    "no blocks": (at(), "blocks", []),
    "axis 2": (at("blocks", 0, "up"), "neuron_axis", 2),
    "axis is a boolean": (at("blocks", 0, "up"), "neuron_axis", True),
    "axis is text": (at("blocks", 0, "up"), "neuron_axis", "0"),
    "weight without layer": (at("blocks", 0, "up"), "weight", "l.u"),
    "weight with another placeholder": (at("blocks", 0, "up"), "weight", "l.${layer}.${neuron}"),
    "weight with a bare placeholder": (at("blocks", 0, "up"), "weight", "l.${layer}.$expert"),
    "weight with a stray dollar": (at("blocks", 0, "up"), "weight", "l.${layer}.$"),
    "bias with another placeholder": (at("blocks", 0, "up"), "bias", "l.${layer}.${neuron}"),
    "id with another placeholder": (at("blocks", 0), "id", "layers.${layer}.${neuron}"),
    "id of another form": (at("blocks", 0), "id", "block.${layer}"),
    "a name to ignore without a layer": (at(), "ignored", ["mlp.seen"]),
    "id with a slash": (at("blocks", 0), "id", "layers.${layer}/../x"),
    "a slope of nothing": (at("activation"), "slope", {}),
    "a slope of 0": (at("activation"), "slope", {"default": 0}),
    "a clamp that is no number": (at("activation"), "at_most", {"config": ["limit"], "default": "7"}),
    "up values of which nothing is said": (at(), "up_values", {}),
    "up values with another key": (at(), "up_values", {"plus": 1, "times": 2}),
    "a share that alternates by a word": (
        at("blocks", 0, "up"), "share", {"part": 1, "of": 2, "alternating": "yes"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_refuses(change: str) -> None:
    find, key, value = CHANGES[change]
    document = copy.deepcopy(VALID)
    find(document)[key] = value
    with pytest.raises(InputError, match=r"mine.json: not a valid architecture: at "):
        parse_architecture(document, "mine.json")


@pytest.mark.parametrize("key", ["name", "model_types", "task", "prefixes", "activation", "blocks"])
def test_refuses_without(key: str) -> None:
    document = {name: value for name, value in VALID.items() if name != key}
    with pytest.raises(InputError, match=f"'{key}' is a required property"):
        parse_architecture(document, "mine.json")


@pytest.mark.parametrize("role", ["up", "down"])
def test_refuses_a_block_without(role: str) -> None:
    document = copy.deepcopy(VALID)
    del document["blocks"][0][role]
    with pytest.raises(InputError, match=rf"at blocks\[0\]: '{role}' is a required property"):
        parse_architecture(document, "mine.json")


def test_refuses_two_blocks_of_one_name() -> None:
    document = copy.deepcopy(VALID)
    document["blocks"].append(copy.deepcopy(document["blocks"][0]))
    with pytest.raises(InputError, match=r"mine.json: .*'layers.\$\{layer\}'"):
        parse_architecture(document, "mine.json")


def test_refuses_a_tensor_that_is_two_parts() -> None:
    document = copy.deepcopy(VALID)
    document["blocks"][0]["gate"]["weight"] = document["blocks"][0]["up"]["weight"]
    with pytest.raises(InputError, match=r"mine.json: .*'l.\$\{layer\}.u'"):
        parse_architecture(document, "mine.json")


def test_refuses_files_that_are_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        read_architecture(tmp_path / "absent.json")
    (tmp_path / "x.json").write_text('{"name": "a", "name": "b"}')
    with pytest.raises(InputError, match="duplicate key 'name'"):
        read_architecture(tmp_path / "x.json")


def test_every_model_type_that_is_listed_is_run_through_the_pipeline_or_passed_the_sweep() -> None:
    listed = {model_type for architecture in builtin_architectures() for model_type in architecture.model_types}
    run = {family.renamed or family.model_type for family in FAMILY.values()} | set(BY_NAME_ONLY) | set(BY_TEXT_MODEL)
    assert run <= listed
    assert listed - run <= {one.model_type for one in swept.read()[1] if one.outcome == "pass"}


def with_experts(**changes: Any) -> dict[str, Any]:
    """The valid document with a second kind of block, of experts whose gate and up rows are in one tensor."""
    document = copy.deepcopy(VALID)
    both = {"weight": "l.${layer}.e.both", "neuron_axis": 0}
    block: dict[str, Any] = {
        "id": "layers.${layer}.experts.${expert}",
        "layers": ["expert_layers"],
        "experts": {"count": ["experts"], "per_token": ["chosen"], "module": "l.${layer}.e"},
        "gate": {**both, "share": {"part": 1, "of": 2}},
        "up": {**both, "share": {"part": 2, "of": 2}, "module": "l.${layer}.both"},
        "down": {"weight": "l.${layer}.e.${expert}.d", "neuron_axis": 1},
    }
    document["blocks"].append({**block, **changes})
    return document


def test_kinds_of_blocks_shares_and_experts() -> None:
    dense, experts = parse_architecture(with_experts(), "x").blocks
    assert (dense.experts, dense.layer_keys) == (None, ("depth",))
    assert experts.experts == ExpertsPattern(("experts",), ("chosen",), "l.${layer}.e")
    assert experts.layer_keys == ("expert_layers",)
    assert (experts.parts["gate"].share, experts.parts["up"].share) == ((1, 2), (2, 2))
    assert experts.parts["up"].module == "l.${layer}.both"
    assert [part.per_expert for part in experts.parts.values()] == [False, False, True]


def test_what_another_model_stands_in_for() -> None:
    document = {**VALID, "runs_as": {"model_type": "mistral", "up_activation": True}}
    found = parse_architecture(document, "x")
    assert (found.runs_as, found.up_activation) == ("mistral", True)
    plain = parse_architecture(VALID, "x")
    assert (plain.runs_as, plain.up_activation, dict(plain.activation_names)) == (None, False, {})


def test_the_same_block_may_be_stored_in_several_ways() -> None:
    other = copy.deepcopy(VALID["blocks"][0])
    other["up"]["weight"], other["gate"]["weight"] = "l.${layer}.other_u", "l.${layer}.other_g"
    document = {**VALID, "blocks": [*VALID["blocks"], other]}
    assert [block.id for block in parse_architecture(document, "x").blocks] == ["layers.${layer}"] * 2


NOT_EXPERTS: dict[str, tuple[dict[str, Any], str]] = {
    "experts without a number in the id": ({"id": "layers.${layer}.experts"}, "needs both `experts` and"),
    "a number in the id without experts": ({"experts": None}, "needs both `experts` and"),
    "an id that does not say experts": ({"id": "layers.${layer}.moe.${expert}"}, "not a valid architecture"),
    "no module": ({"experts": {"count": ["experts"]}}, "'module' is a required property"),
    "the same share twice": (
        {"gate": {"weight": "l.${layer}.e.both", "neuron_axis": 0, "share": {"part": 2, "of": 2}}},
        "describes tensor 'l.${layer}.e.both' twice",
    ),
    "the third of two": (
        {"gate": {"weight": "l.${layer}.e.both", "neuron_axis": 0, "share": {"part": 3, "of": 2}}}, "part 3 of 2",
    ),
    "one share": (
        {"gate": {"weight": "l.${layer}.e.g", "neuron_axis": 0, "share": {"part": 1, "of": 1}}}, "less than the",
    ),
    "a tensor of another block": ({"down": {"weight": "l.${layer}.d", "neuron_axis": 1}}, "describes tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_EXPERTS)
def test_refuses_experts_that_make_no_sense(name: str) -> None:
    changes, complaint = NOT_EXPERTS[name]
    document = with_experts(**changes)
    document["blocks"][1] = {key: value for key, value in document["blocks"][1].items() if value is not None}
    with pytest.raises(InputError, match=re.escape(complaint)):
        parse_architecture(document, "mine.json")


def test_refuses_an_expert_tensor_in_a_block_without_experts() -> None:
    document = copy.deepcopy(VALID)
    document["blocks"][0]["up"]["weight"] = "l.${layer}.${expert}.u"
    with pytest.raises(InputError, match=r"has \$\{expert\}, but its block 'layers.\$\{layer\}' has not"):
        parse_architecture(document, "mine.json")


def test_clamps_slopes_and_what_is_added_to_up() -> None:
    number = {"config": ["limit"], "default": 7}
    activation = {"slope": {"config": ["alpha"]}, "at_most": number}
    document = {**VALID, "activation": activation, "up_values": {"limit": number, "plus": 1}}
    found = parse_architecture(document, "x")
    assert (found.slope, found.at_most) == (ConfigNumber(("alpha",), None), ConfigNumber(("limit",), 7))
    assert found.up_values == UpPattern(ConfigNumber(("limit",), 7), 1)
    assert parse_architecture({**document, "up_values": {"plus": 0.5}}, "x").up_values == UpPattern(None, 0.5)
    plain = parse_architecture(VALID, "x")
    assert (plain.slope, plain.at_most, plain.up_values) == (None, None, None)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"blocks": [{k: v for k, v in VALID["blocks"][0].items() if k != "gate"}]}, "block 'layers.${layer}' without"),
        ({"runs_as": {"model_type": "mistral", "up_activation": True}}, "an activated up projection"),
    ],
)
def test_up_values_are_multiplied_with_a_gate(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"describes `up_values` and {complaint}")):
        parse_architecture({**VALID, "up_values": {"plus": 1}, **change}, "mine.json")


def test_parts_of_experts_may_alternate_but_not_those_of_other_blocks() -> None:
    share = {"part": 1, "of": 2, "alternating": True}
    gate = {"weight": "l.${layer}.e.both", "neuron_axis": 0, "share": share}
    experts = parse_architecture(with_experts(gate=gate), "x").blocks[1]
    assert [part.alternating for part in experts.parts.values()] == [True, False, False]
    document = copy.deepcopy(VALID)
    document["blocks"][0]["gate"] |= {"share": share}
    with pytest.raises(InputError, match=r"tensor 'l.\$\{layer\}.g' has alternating parts, which only experts may"):
        parse_architecture(document, "mine.json")

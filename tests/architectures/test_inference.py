from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.architectures.architecture import find_architecture, parse_architecture
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.architectures.inference import infer_architecture
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.model_description import ModelDescription, describe
from neuralink_cli.errors import UnsupportedError
from tests.checkpoints import HIDDEN, NEURONS, RawTensor, tensors_of, write_checkpoint
from tests.conftest import ModelFactory
from tests.scaled import FP8, INT8, MXFP4, PACKED4, quantised_copy
from tests.tiny_models import FAMILIES

Shapes = dict[str, tuple[int, ...]]
CONFIG: dict[str, Any] = {
    "model_type": "Strange.Model",
    "architectures": ["StrangeForCausalLM"],
    "hidden_size": 20,
    "intermediate_size": 37,
    "hidden_act": "silu",
    "num_hidden_layers": 2,
}
H, N = CONFIG["hidden_size"], CONFIG["intermediate_size"]
# Built-in families that cannot be inferred, and why.
REFUSED = {
    "bloom": "names no activation",
    "mpt": "names no activation",
    "granitemoe": "no tensor names look like",
    "granitemoeshared": "no tensor names look like",
    "granitemoehybrid": "no tensor names look like",
    "lfm2": "names no activation",
    "lfm2_moe": "names no activation",
    "modernbert": "Wi.weight' .* do not fit",
    "nomic_bert": "no tensor names look like",
    "nemotron_h": "no FFN block is recognised in layer 0",
    "gpt_oss": "gate and up columns, which may lie one after the other or alternate",
    "openai_privacy_filter": "gate and up columns, which may lie one after the other or alternate",
    "minimax_m3_vl_text": "no FFN block is recognised in layer 0",
}
# What is inferred for these differs, and profiling notices: a cut, an activation with parameters, names of modules.
DIFFERENT = ("gemma3n_text", "apertus", "deepseek_v4")


def describe_model(shapes: Mapping[str, tuple[int, ...]], **config: Any) -> ModelDescription:
    whole = {**CONFIG, **config}
    return ModelDescription(Path("the/model"), {k: v for k, v in whole.items() if v is not None}, shapes)


def infer(shapes: Mapping[str, tuple[int, ...]], **config: Any) -> dict[str, Any]:
    return infer_architecture(describe_model(shapes, **config))


def refusal(shapes: Mapping[str, tuple[int, ...]], **config: Any) -> str:
    with pytest.raises(UnsupportedError) as caught:
        infer(shapes, **config)
    message = str(caught.value)
    assert message.startswith("the/model: its architecture cannot be inferred: ")
    assert message.endswith("; describe it in a JSON file (docs/architectures.md) for --architecture")
    return message


def layers(tensors: Mapping[str, tuple[int, ...]], stack: str = "model.layers", count: int = 2) -> Shapes:
    """The same tensors in every layer, with some that every model has around them."""
    found: Shapes = {"embed.weight": (100, H), "head.bias": (N,)}
    for layer in range(count):
        found |= {f"{stack}.{layer}.norm.weight": (H,), f"{stack}.{layer}.self_attn.q_proj.weight": (N, H)}
        found |= {f"{stack}.{layer}.{name}": shape for name, shape in tensors.items()}
    return found


GLU: Shapes = {
    "mlp.gate_proj.weight": (N, H),
    "mlp.up_proj.weight": (N, H),
    "mlp.down_proj.weight": (H, N),
}
MLP: Shapes = {"mlp.fc1.weight": (N, H), "mlp.fc1.bias": (N,), "mlp.fc2.weight": (H, N), "mlp.fc2.bias": (H,)}


def essence(blocks: tuple[FFNBlock, ...]) -> list[Any]:
    """All that decides which bytes are moved, and when a neuron fires."""
    return [
        (block.neurons, block.hidden, block.activation, block.expert, [replace(p, module=None) for p in block.parts])
        for block in blocks
    ]


def assert_finds_what_is_built_in(directory: Path) -> None:
    with Checkpoint(directory) as checkpoint:
        document = infer_architecture(describe(checkpoint))
        expected = find_architecture(checkpoint.model_type, directory)
        found = find_blocks(checkpoint, parse_architecture(document, "inferred"))
        blocks = find_blocks(checkpoint, expected)
        assert essence(found) == essence(blocks)
        assert [block.id for block in found] == [block.id for block in blocks]
        assert document["task"] == expected.task


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("opt", {"architectures": ["OPTForCausalLM"], "ffn_dim": NEURONS}),
        ("llama", {"architectures": ["LlamaForCausalLM"], "intermediate_size": NEURONS}),
        ("gpt2", {"architectures": ["GPT2LMHeadModel"], "n_inner": NEURONS}),
        ("bert", {"architectures": ["BertForMaskedLM"], "intermediate_size": NEURONS}),
    ],
)
def test_raw_checkpoints_have_the_blocks_of_the_built_in_architecture(
    tmp_path: Path, family: str, config: dict[str, Any], bias: bool
) -> None:
    assert_finds_what_is_built_in(write_checkpoint(tmp_path / "model", family, config=config, bias=bias))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in DIFFERENT])
def test_real_models_have_the_blocks_of_the_built_in_architecture(model: ModelFactory, family: str) -> None:
    if family not in REFUSED:
        assert_finds_what_is_built_in(model(family))
        return
    with Checkpoint(model(family)) as checkpoint, pytest.raises(UnsupportedError, match=REFUSED[family]):
        infer_architecture(describe(checkpoint))


def test_a_gated_unit() -> None:
    assert infer(layers(GLU)) == {
        "name": "strange-model",
        "description": "Inferred from names and shapes of tensors.",
        "model_types": ["Strange.Model"],
        "task": "causal-lm",
        "prefixes": ["model.", ""],
        "layers": ["num_hidden_layers"],
        "activation": {"config": ["hidden_act"]},
        "blocks": [
            {
                "id": "layers.${layer}",
                "gate": {"weight": "layers.${layer}.mlp.gate_proj.weight", "neuron_axis": 0},
                "up": {"weight": "layers.${layer}.mlp.up_proj.weight", "neuron_axis": 0},
                "down": {"weight": "layers.${layer}.mlp.down_proj.weight", "neuron_axis": 1},
            }
        ],
    }


@pytest.mark.parametrize(
    "words", ["fc1 fc2", "c_fc c_proj", "dense_h_to_4h dense_4h_to_h", "wi wo", "w1 w2", "Lin1 Lin2", "up down"]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("stack", "prefixes"),
    [("h", [""]), ("blocks", [""]), ("transformer.h", ["transformer.", ""]), ("a.b.encoder.layer", ["a.", ""])],
)
def test_plain_units_of_many_names(words: str, transposed: bool, stack: str, prefixes: list[str]) -> None:
    up, down = words.split()
    wide, tall = ((H, N), (N, H)) if transposed else ((N, H), (H, N))
    shapes = layers({f"ffn.{up}.weight": wide, f"ffn.{down}.weight": tall, f"ffn.{up}.bias": (N,)}, stack)
    document = infer(shapes, num_hidden_layers=None)
    assert (document["prefixes"], "layers" in document) == (prefixes, False)
    [block] = document["blocks"]
    stem = f"{stack.removeprefix(prefixes[0])}.${{layer}}.ffn."
    assert block == {
        "id": "layers.${layer}",
        "up": {"weight": f"{stem}{up}.weight", "neuron_axis": int(transposed), "bias": f"{stem}{up}.bias"},
        "down": {"weight": f"{stem}{down}.weight", "neuron_axis": int(not transposed)},
    }


def three(names: str) -> Shapes:
    """Three matrices of these names, the last turned the other way."""
    return layers(dict(zip([f"{name}.weight" for name in names.split()], [(N, H), (N, H), (H, N)], strict=True)))


@pytest.mark.parametrize(
    "names", ["gate up down", "w1 w3 w2", "wi_0 wi_1 wo", "w_gate w_up w_down", "a.gate_fc a.up a.down"]
)
def test_which_of_two_is_the_gate_is_told_by_name(names: str) -> None:
    [block] = infer(three(names))["blocks"]
    assert [block[role]["weight"] for role in ("gate", "up", "down")] == [
        f"layers.${{layer}}.{name}.weight" for name in names.split()
    ]


@pytest.mark.parametrize(
    "names", ["fc1 fc3 fc2", "up_proj linear_v down_proj", "c_fc_0 c_fc c_proj", "m.fc1 m.fc1_g m.fc2", "w1 v1 w2"]
)
def test_a_matrix_like_a_gate_of_another_name_is_refused(names: str) -> None:
    assert "may belong to the neurons of" in refusal(three(names))


def test_fused_gate_and_up_rows() -> None:
    fused = {"mlp.gate_up_proj.weight": (2 * N, H), "mlp.gate_up_proj.bias": (2 * N,)}
    [block] = infer(layers(fused | {"mlp.down_proj.weight": (H, N)}))["blocks"]
    for part, role in enumerate(("gate", "up"), 1):
        assert block[role] == {
            "weight": "layers.${layer}.mlp.gate_up_proj.weight",
            "neuron_axis": 0,
            "bias": "layers.${layer}.mlp.gate_up_proj.bias",
            "share": {"part": part, "of": 2},
        }


@pytest.mark.parametrize("name", ["Wi", "dense_h_to_4h", "up_gate_proj", "fc1"])
def test_fused_rows_whose_name_does_not_say_which_half_is_the_gate_are_refused(name: str) -> None:
    assert name in refusal(layers({f"mlp.{name}.weight": (2 * N, H), "mlp.down.weight": (H, N)}))


def test_fused_columns_are_refused_since_they_may_alternate() -> None:
    shapes = {"mlp.experts.gate_up_proj": (4, H, 2 * N), "mlp.experts.down_proj": (4, N, H)}
    assert "one after the other or alternate" in refusal(layers(shapes))


def test_experts_with_tensors_of_their_own_beside_dense_layers_and_shared_ones() -> None:
    shapes = layers({}, count=3)
    shapes |= {f"model.layers.0.{name}": shape for name, shape in GLU.items()}
    for layer in (1, 2):
        stem = f"model.layers.{layer}.mlp"
        shapes[f"{stem}.gate.weight"] = (4, H)
        for expert in range(4):
            for name, shape in GLU.items():
                shapes[name.replace("mlp", f"{stem}.experts.{expert}")] = tuple(11 if d == N else d for d in shape)
        for name, shape in GLU.items():
            shapes[name.replace("mlp", f"{stem}.shared_experts")] = tuple(22 if d == N else d for d in shape)
    more = {"moe_intermediate_size": 11, "n_shared_experts": 2, "n_routed_experts": 4, "num_hidden_layers": 3}
    document = infer(shapes, **more)
    assert [block["id"] for block in document["blocks"]] == [
        "layers.${layer}", "layers.${layer}.experts.${expert}", "layers.${layer}.shared_experts"
    ]  # fmt: skip
    assert document["blocks"][1]["experts"] == {"count": ["n_routed_experts"], "module": "layers.${layer}.mlp.experts"}
    assert document["blocks"][1]["up"]["weight"] == "layers.${layer}.mlp.experts.${expert}.up_proj.weight"
    assert "layers have [4] experts, but config.json says 5" in refusal(shapes, **{**more, "n_routed_experts": 5})
    del shapes["model.layers.2.mlp.experts.1.up_proj.weight"]
    assert "layer 2 is unlike the others: 'model.layers.2.mlp.experts.1.down_proj" in refusal(shapes, **more)


def test_experts_in_one_tensor() -> None:
    tensors = {
        "moe.experts.gate_up_proj": (4, 2 * N, H),
        "moe.experts.gate_up_proj_bias": (4, 2 * N),
        "moe.experts.down_proj": (4, H, N),
    }
    [block] = infer(layers(tensors))["blocks"]
    assert block["experts"] == {"module": "layers.${layer}.moe.experts"}
    assert block["gate"]["bias"] == "layers.${layer}.moe.experts.gate_up_proj_bias"
    assert "weight" in block["down"]
    # Three axes without the word may be anything.
    refusal(layers({name.replace("moe.experts", "mlp"): shape for name, shape in tensors.items()}))


def test_experts_that_are_not_numbered_as_layers_are_would_be_taken_for_blocks_that_always_run() -> None:
    shapes = layers({name.replace("mlp", "mlp.experts.expert_0"): shape for name, shape in GLU.items()})
    assert "no number between two dots tells which expert" in refusal(shapes)
    shared = layers({name.replace("mlp", "mlp.share_expert"): shape for name, shape in GLU.items()})
    assert infer(shared)["blocks"][0]["id"] == "layers.${layer}.share_expert"


def test_encoder_and_decoder() -> None:
    shapes = layers(MLP, "model.encoder.layers") | layers(MLP, "model.decoder.layers", 3)
    document = infer(shapes, encoder_layers=2, decoder_layers=3, num_hidden_layers=2, is_encoder_decoder=True)
    assert (document["task"], document["prefixes"]) == ("seq2seq", ["model.", ""])
    assert [(block["id"], block["layers"]) for block in document["blocks"]] == [
        ("encoder.layers.${layer}", ["encoder_layers"]),
        ("decoder.layers.${layer}", ["decoder_layers"]),
    ]


def test_two_lists_of_layers_that_are_no_encoder_and_decoder_are_refused() -> None:
    message = refusal(layers(GLU, "vision.layers") | layers(GLU, "text.layers"))
    assert "2 lists of layers have FFN blocks (text.layers.${layer}, vision.layers.${layer})" in message


def test_two_blocks_in_a_layer_get_longer_ids() -> None:
    shapes = layers(GLU | {name.replace("mlp", "MLP_2.a"): shape for name, shape in GLU.items()})
    assert [block["id"] for block in infer(shapes)["blocks"]] == ["layers.${layer}.mlp_2.a", "layers.${layer}.mlp"]
    clash = layers(GLU | {name.replace("mlp", "MLP"): shape for name, shape in GLU.items()})
    assert "differ only in punctuation or capitals" in refusal(clash)


SQUARE = {"intermediate_size": H}


@pytest.mark.parametrize("transposed", [False, True])
def test_as_many_neurons_as_hidden_weights_need_biases_that_show_how_matrices_are_stored(transposed: bool) -> None:
    square = {name: tuple(H if d == N else d for d in shape) for name, shape in GLU.items()}
    assert "neurons may be the rows or the columns of" in refusal(layers(square), **SQUARE)
    qkv = {"attn.qkv.weight": (H, 3 * H) if transposed else (3 * H, H), "attn.qkv.bias": (3 * H,)}
    [block] = infer(layers(square | qkv), **SQUARE)["blocks"]
    assert (block["gate"]["neuron_axis"], block["down"]["neuron_axis"]) == (int(transposed), int(not transposed))
    assert "may belong to" in refusal(layers(square | qkv | {"mlp.norm.weight": (H,)}), **SQUARE)
    other = {"attn.out.weight": (H, 2 * H) if not transposed else (2 * H, H), "attn.out.bias": (2 * H,)}
    assert "neurons may be the rows or the columns of" in refusal(layers(square | qkv | other), **SQUARE)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mlp.fc1.bias": (H,)}, "do not fit each other as bias and weight of the up projection"),
        ({"mlp.fc2.bias": (N,)}, "do not fit each other as bias and weight of the down projection"),
        ({"mlp.inner_norm.weight": (N,)}, "'model.layers.0.mlp.inner_norm.weight' [37] may belong to the neurons"),
        ({"scale": (1, N)}, "'model.layers.0.scale' [1, 37] may belong to the neurons"),
        ({"mlp.fc1.weight_scale": (N, 1)}, "weight_scale"),
        ({"mlp.fc1.lora_B.weight": (N, 4)}, "lora_B"),
        ({"mlp.attn_like.weight": (N,)}, "attn_like"),
        ({"mlp.$caling": (N,)}, "$caling"),
        ({"mlp.up_proj.weight": (N, H)}, "both look like a block's up projection"),
        ({"mlp.fc2.weight": (H, N, 1)}, "'model.layers.0.mlp.fc2.weight' [20, 37, 1] do not fit hidden size 20"),
        ({"mlp.fc2.weight": (N, H)}, "do not fit hidden size 20 and intermediate size 37"),
        ({"mlp.fc1.weight": (N + 1, H), "mlp.fc2.weight": (H, N + 1)}, "'model.layers.0.mlp.fc1.weight' [38, 20]"),
    ],
)  # fmt: skip
def test_what_may_scramble_a_model_is_refused(change: Shapes, complaint: str) -> None:
    assert complaint in refusal(layers(MLP | change))


def test_layers_that_lack_a_block_are_named() -> None:
    shapes = layers(GLU)
    assert "no FFN block is recognised in layer 2 of 3 (model.layers.2)" in refusal(shapes, num_hidden_layers=3)
    assert "layer 2 of 1000000000" in refusal(shapes, num_hidden_layers=10**9)
    later = {name.replace("layers.0", "layers.7"): shape for name, shape in shapes.items()}
    assert "no FFN block is recognised in layer 0 of 8" in refusal(later, num_hidden_layers=None)
    odd = {**shapes, "model.layers.1.mlp.up_proj.weight": (N + 1, H)}
    assert "layer 1 is unlike the others" in refusal(odd)


def test_layers_beyond_those_that_the_config_counts_are_left_alone() -> None:
    assert infer(layers(GLU, count=3))["layers"] == ["num_hidden_layers"]


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"hidden_size": None}, "config.json names no hidden size (hidden_size, d_model,"),
        ({"hidden_size": "20"}, "config.json names no hidden size"),
        ({"hidden_size": float("nan")}, "config.json names no hidden size"),
        ({"hidden_act": None}, "config.json names no activation (hidden_activation,"),
        ({"architectures": None}, "config.json names no architectures, which does not tell"),
        ({"architectures": ["StrangeModel"]}, "config.json names architectures ['StrangeModel'], which does not"),
        ({"architectures": 7}, "config.json names no architectures"),
        ({"intermediate_size": None}, "do not fit hidden size 20 and intermediate size 80"),
        ({"intermediate_size": [True, "37", -37, 37.5]}, "intermediate size 80"),
        ({"model_type": ""}, "names no model_type"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_say_is_refused(config: dict[str, Any], complaint: str) -> None:
    assert complaint in refusal(layers(GLU), **config)


@pytest.mark.parametrize(
    ("config", "stack", "task"),
    [
        ({"architectures": ["XLMHeadModel"]}, "h", "causal-lm"),
        ({"architectures": ["XForMaskedLM"]}, "h", "encoder"),
        ({"architectures": ["XModel"]}, "encoder.layer", "encoder"),
        ({"architectures": ["XForImageClassification"]}, "encoder.layer", "image-encoder"),
        ({"architectures": ["XForConditionalGeneration"]}, "language_model.layers", "causal-lm"),
    ],
)  # fmt: skip
def test_the_task_is_told_by_the_class(config: dict[str, Any], stack: str, task: str) -> None:
    document = infer(layers(GLU, stack), **config)
    assert document["task"] == task
    assert ("not_in_checkpoint" in document) == (task in ("encoder", "image-encoder"))


def test_sizes_and_activation_of_a_text_model_among_several() -> None:
    text = {key: CONFIG[key] for key in ("hidden_size", "intermediate_size", "hidden_act", "num_hidden_layers")}
    assert infer(layers(GLU), **dict.fromkeys(text), text_config=text)["blocks"] == infer(layers(GLU))["blocks"]


def test_activations_as_t5_calls_them() -> None:
    found = infer(layers(GLU), hidden_act=None, feed_forward_proj="gated-gelu")
    assert found["activation"] == {"config": ["feed_forward_proj"], "names": {"gated-gelu": "gelu_new"}}


def test_four_times_the_hidden_size_where_the_config_says_nothing() -> None:
    shapes = layers({"mlp.fc_in.weight": (80, H), "mlp.fc_out.weight": (H, 80)})
    assert infer(shapes, intermediate_size=None)["blocks"][0]["up"]["neuron_axis"] == 0


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"a": (1,)},
        {"0": (N, H)},
        {"model.layers.0": (N, H)},
        {".0.": (N, H)},
        {"..0..": (N, H)},
        {"model.layers.0.mlp.../../up_proj.weight": (N, H), "model.layers.0.mlp.../../down_proj.weight": (H, N)},
        {"m$.0.up": (N, H), "m$.0.down": (H, N)},
        {"m.${layer}.0.up": (N, H), "m.${layer}.0.down": (H, N)},
        {"ünï.0.up": (N, H), "ünï.0.down": (H, N)},
        {"m.\u0663.up": (N, H), "m.\u0663.down": (H, N)},
        {"m.00.up": (N, H), "m.00.down": (H, N)},
        {"m." + "9" * 5000 + ".up": (N, H), "m." + "9" * 5000 + ".down": (H, N)},
        {"m.0.up": (), "m.0.down": (0, N)},
        {f"{i}.0.{role}": (N, H) if role == "up" else (H, N) for i in "abc" for role in ("up", "down")},
        {f"m.0.a{i}.{role}": (N, H) if role == "up" else (H, N) for i in range(200) for role in ("up", "down")},
    ],
)
def test_strange_names_are_never_a_block(shapes: Shapes) -> None:
    refusal(shapes, num_hidden_layers=None)


WORDS = """
model layers 0 1 mlp experts shared_expert up_proj down_proj gate_up_proj gate w1 w2 w3 weight bias
intermediate output dense attn $ ${layer} ${expert} é encoder decoder .
"""
STEPS = st.sampled_from(WORDS.split())
NAMES = st.lists(STEPS, min_size=1, max_size=7).map(".".join)
SHAPES = st.lists(st.sampled_from([0, 1, 2, H, N, 2 * N]), max_size=3).map(tuple)
KEYS = st.sampled_from(["num_hidden_layers", "num_experts", "hidden_size", "d_ff", "text_config"])
VALUES = st.sampled_from([None, 0, 1, 2, H, N, -1, 0.5, "relu", [N, None], {"a": 1}, True])
# With the length of neurons.
SUSPECTS = st.sampled_from([(N,), (N, 1), (N, H), (H, N), (2, N), (N, N)])


@given(st.dictionaries(NAMES, SHAPES, max_size=12), st.dictionaries(KEYS, VALUES), st.booleans())
def test_whatever_the_names_and_shapes_it_is_a_valid_document_or_a_refusal(
    shapes: Shapes, config: dict[str, Any], among_layers: bool
) -> None:
    with contextlib.suppress(UnsupportedError):
        parse_architecture(infer(layers(GLU) | shapes if among_layers else shapes, **config), "inferred")


@given(st.lists(STEPS, min_size=1, max_size=4).map(".".join), SUSPECTS)
def test_one_more_tensor_with_the_length_of_neurons_is_never_overlooked(name: str, shape: tuple[int, ...]) -> None:
    """What lies in a unit and is as long as its neurons is a part of the unit, or of another that is found."""
    try:
        document = infer(layers(GLU | {f"mlp.{name}": shape}))
    except UnsupportedError:
        return
    used = json.dumps(document).replace("${layer}", "0").replace("${expert}", "0")
    assert f"layers.0.mlp.{name}".replace("experts.1", "experts.0") in used


def test_the_blocks_of_what_is_inferred_are_found(tmp_path: Path) -> None:
    tensors: dict[str, RawTensor] = tensors_of("llama", bias=True)
    config = {**CONFIG, "hidden_size": HIDDEN, "intermediate_size": NEURONS}
    with Checkpoint(write_checkpoint(tmp_path / "model", tensors=tensors, config=config)) as checkpoint:
        document = infer_architecture(describe(checkpoint))
        found = find_blocks(checkpoint, parse_architecture(document, "inferred"))
    assert [(block.id, block.neurons, block.hidden) for block in found] == [
        (f"layers.{layer}", NEURONS, HIDDEN) for layer in range(2)
    ]


@pytest.mark.parametrize("kind", [FP8, INT8, PACKED4, MXFP4])
def test_scales_that_are_understood_change_nothing(tmp_path: Path, kind: str) -> None:
    model = Path(__file__).parent.parent.parent / "examples/tiny-relu"
    quantised_copy(model, tmp_path / "model", kind, (1, 32) if kind == PACKED4 else (48, 80))
    with Checkpoint(model) as plain, Checkpoint(tmp_path / "model") as quantised:
        assert describe(quantised).shapes == describe(plain).shapes
        assert infer_architecture(describe(quantised)) == infer_architecture(describe(plain))

"""What is said of a model whose type is not built in: the most similar architecture, and what differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuralink_cli.architectures.architecture import builtin_architectures, is_built_in
from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.nearest import nearest, unsupported
from neuralink_cli.checkpoint.model_description import ModelDescription
from neuralink_cli.errors import UnsupportedError
from tests.architectures.test_inference import GLU, H, N, Shapes, layers

LLAMA = layers(GLU)
EXPERTS: Shapes = {
    f"mlp.experts.{expert}.{name}_proj.weight": (H, N) if name == "down" else (N, H)
    for expert in range(4)
    for name in ("gate", "up", "down")
}


def said_of(shapes: Shapes) -> str | None:
    return nearest(ModelDescription(Path("m"), {"model_type": "strange"}, shapes))


SAID: dict[str, tuple[Shapes, str | None]] = {
    "nothing differs": (LLAMA, "nearest: llama; none of its tensors is missing"),
    "a norm inside": (
        layers({**GLU, "mlp.norm.weight": (N,)}), "nearest: llama; not described: model.layers.0.mlp.norm.weight"
    ),
    "a tensor missing, and others in its place": (
        layers({**{name: shape for name, shape in GLU.items() if "gate" not in name}, "mlp.g1.weight": (N, H),
                "mlp.g2.weight": (N, H), "mlp.g3.weight": (N, H)}),
        "nearest: nemotron; not described: model.layers.0.mlp.g1.weight, model.layers.0.mlp.g2.weight and 1 more",
    ),
    "under another prefix": (
        layers({**GLU, "mlp.scale": (N,)}, stack="deep.inside.layers"),
        "nearest: llama; not described: deep.inside.layers.0.mlp.scale",
    ),
    "a down projection of another name": (
        layers({"mlp.gate_proj.weight": (N, H), "mlp.up_proj.weight": (N, H), "mlp.back.weight": (H, N)}),
        "nearest: llama; missing model.layers.0.mlp.down_proj.weight; not described: model.layers.0.mlp.back.weight",
    ),
    "experts": (
        layers({**EXPERTS, "mlp.experts.scale": (4,)}),
        "nearest: deepseek; not described: model.layers.0.mlp.experts.scale",
    ),
    "layers that begin later": (
        {name.replace(".0.", ".7.").replace(".1.", ".8."): shape
         for name, shape in layers({**GLU, "mlp.norm.weight": (N,)}).items()},
        "nearest: llama; not described: model.layers.7.mlp.norm.weight",
    ),
    "no layers": ({"embed.weight": (100, H)}, None),
    "another kind of model": (layers({"mixer.in_proj.weight": (N, H), "mixer.out_proj.weight": (H, N)}), None),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_is_said(name: str) -> None:
    shapes, expected = SAID[name]
    assert said_of(shapes) == expected


def test_biases_are_no_difference() -> None:
    weights = {"mlp.fc_in.weight": (N, H), "mlp.fc_out.weight": (H, N)}
    biases = {"mlp.fc_in.bias": (N,), "mlp.fc_out.bias": (H,)}
    for tensors in (weights, weights | biases):
        assert said_of(layers(tensors, stack="transformer.h")) == "nearest: gptj; none of its tensors is missing"


def test_the_refusal_says_it_between_the_problem_and_the_advice() -> None:
    shapes = layers({**GLU, "mlp.norm.weight": (N,)})
    with pytest.raises(UnsupportedError) as caught:
        choose_architecture(ModelDescription(Path("m"), {"model_type": "strange"}, shapes))
    assert str(caught.value).startswith("m: architecture 'strange' is not known (`neuralink architectures` lists the ")
    assert "known ones); nearest: llama; not described: model.layers.0.mlp.norm.weight; try --infer" in str(
        caught.value
    )


@pytest.mark.parametrize("model_type", unsupported())
def test_types_that_cannot_be_described_say_why(model_type: str) -> None:
    assert not is_built_in(model_type)
    with pytest.raises(UnsupportedError, match=f"^m: model type '{model_type}' is not supported: [a-z].*[^.]$"):
        choose_architecture(ModelDescription(Path("m"), {"model_type": model_type}, LLAMA))


def test_every_architecture_is_compared() -> None:
    """None is so special that it fails on a model that has nothing of it."""
    assert len(builtin_architectures()) > 40
    assert said_of(layers({**GLU, **EXPERTS})) is not None

"""The modules of transformers that compute a block, from its id and the names of its tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuralink_cli.architectures.architecture import find_architecture
from neuralink_cli.architectures.block_modules import module_names
from neuralink_cli.errors import UnsupportedError


def names_of(model_type: str, block: str, **weights: str) -> tuple[dict[str, str], set[tuple[int, int]], str | None]:
    found = module_names(find_architecture(model_type, Path("here")), block, weights)
    assert found.parts.keys() == found.shares.keys() == weights.keys()
    return dict(found.parts), set(found.shares.values()), found.experts


def test_a_module_has_the_name_of_its_tensor_or_another() -> None:
    up, down = "model.decoder.layers.3.fc1", "model.decoder.layers.3.fc2"
    assert names_of("opt", "layers.3", up=f"{up}.weight", down=f"{down}.weight") == (
        {"up": up, "down": down}, {(1, 1)}, None,
    )  # fmt: skip
    stem = "encoder.layers.1.mlp"
    tensors = {"gate": f"{stem}.fc12.weight", "up": f"{stem}.fc11.weight", "down": f"{stem}.fc2.weight"}
    assert names_of("nomic_bert", "layers.1", **tensors)[0]["gate"] == "layers.1.mlp.gate_proj"


def test_experts_have_a_module_for_all_of_them() -> None:
    stem = "model.layers.2.block_sparse_moe.experts.13"
    one = {"gate": f"{stem}.w1.weight", "up": f"{stem}.w3.weight", "down": f"{stem}.w2.weight"}
    assert names_of("mixtral", "layers.2.experts.13", **one)[1:] == ({(1, 1)}, "model.layers.2.mlp.experts")
    stem = "model.layers.2.mlp.experts"
    both = {"gate": f"{stem}.gate_up_proj", "up": f"{stem}.gate_up_proj", "down": f"{stem}.down_proj"}
    assert names_of("mixtral", "layers.2.experts.13", **both)[1:] == ({(1, 2), (2, 2), (1, 1)}, stem)


@pytest.mark.parametrize("block", ["layers.4", "layers.x", "layers.3.experts.0"])
def test_other_blocks_are_refused(block: str) -> None:
    tensors = {"up": "model.decoder.layers.3.fc1.weight", "down": "model.decoder.layers.3.fc2.weight"}
    with pytest.raises(UnsupportedError, match=f"architecture 'opt' has no block '{block}'"):
        names_of("opt", block, **tensors)

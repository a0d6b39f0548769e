"""Vision models, calibrated on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, ViTModel

from neuralink_cli.activations.trace import Trace
from neuralink_cli.errors import InputError, OptionError
from tests.conftest import ModelFactory
from tests.profile_requests import ProfileRequest, profile
from tests.tiny_models import write_images

# 4 by 4 patches and the token of the whole image.
TOKENS = 17


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "pictures", 12)


def request(model: ModelFactory, pictures: Path, output: Path, **options: Any) -> ProfileRequest:
    return ProfileRequest(model("vit"), output, (str(pictures),), active_ratio=0.3, **options)


def test_bits_are_those_of_the_model_on_the_images(model: ModelFactory, pictures: Path, tmp_path: Path) -> None:
    from PIL import Image

    summary = profile(request(model, pictures, tmp_path / "t", batch_size=5))
    assert (summary.tokens, summary.sources[0].sequences, summary.sources[0].name) == (12 * TOKENS, 12, "pictures")
    vit = ViTModel.from_pretrained(model("vit")).eval()
    processor = AutoImageProcessor.from_pretrained(model("vit"))
    seen = []
    vit.layers[1].mlp.fc1.register_forward_hook(lambda _m, _i, output: seen.append(output.reshape(TOKENS, -1)))
    with torch.no_grad():
        for path in sorted(pictures.iterdir()):
            vit(**processor(Image.open(path), return_tensors="pt"))
    signal = torch.nn.functional.gelu(torch.cat(seen)).abs().numpy()
    with Trace(tmp_path / "t") as trace:
        block = trace.info.blocks[1]
        bits = np.unpackbits(trace.fired(block), axis=1, bitorder="little")[:, : block.neurons].astype(bool)
        assert trace.sequence_lengths.tolist() == [TOKENS] * 12
        decided = np.abs(signal - block.threshold) > 1e-5
        assert decided.mean() > 0.99
        assert np.array_equal(bits[decided], (signal > block.threshold)[decided])


def test_the_same_images_give_the_same_bytes(model: ModelFactory, pictures: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        profile(request(model, pictures, tmp_path / name, seed=3))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("options", "images"), [({"num_samples": 5}, 5), ({"max_tokens": 3 * TOKENS + 1}, 3), ({"max_tokens": 1}, 1)]
)
def test_takes_as_many_as_asked_for(
    model: ModelFactory, pictures: Path, options: dict[str, int], images: int, tmp_path: Path
) -> None:
    assert profile(request(model, pictures, tmp_path / "t", **options)).tokens == images * TOKENS


def test_one_image_and_a_table_of_images(model: ModelFactory, pictures: Path, tmp_path: Path) -> None:
    import datasets

    one = profile(request(model, pictures / "03.png", tmp_path / "one"))
    assert (one.tokens, one.sources[0].name) == (TOKENS, "03.png")
    table = datasets.Dataset.from_dict(
        {"label": [1, 2], "picture": [str(pictures / "00.png"), str(pictures / "01.png")]}
    )
    table.cast_column("picture", datasets.Image()).to_parquet(tmp_path / "two.parquet")
    assert profile(request(model, tmp_path / "two.parquet", tmp_path / "two")).tokens == 2 * TOKENS


def test_what_has_no_images_is_refused(model: ModelFactory, pictures: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no image column, only 'text'"):
        profile(request(model, text_file, tmp_path / "t"))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"broken\.png"):
        profile(request(model, tmp_path / "broken.png", tmp_path / "t"))
    with pytest.raises(InputError, match="no such file"):
        profile(request(model, tmp_path / "absent.png", tmp_path / "t"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        profile(request(model, tmp_path / "empty", tmp_path / "t"))
    with pytest.raises(OptionError, match="are for texts"):
        profile(request(model, pictures, tmp_path / "t", packing=True))
    assert not (tmp_path / "t").exists()

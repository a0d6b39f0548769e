"""Layouts that cannot be run: one clear line each, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.errors import InputError, NeuralinkError, OptionError, UnsupportedError, VerificationError
from neuralink_cli.sparse_models.loading import load_flash_model
from tests.damage import FLASH, flip, start_of
from tests.layouts import LayoutFactory
from tests.runnables import RunnableFactory


def test_the_rows_that_decide_firing_must_be_resident(runnable: RunnableFactory) -> None:
    with pytest.raises(OptionError, match=r"keeps no rows in DRAM .* `neuralink relayout --resident gate`"):
        load_flash_model(runnable("opt", relayout=()).layout)


def test_the_gate_must_be_what_fires(runnable: RunnableFactory) -> None:
    made = runnable("llama", active_ratio=0.3, signal="intermediate")
    with pytest.raises(UnsupportedError, match=r"fires by the input of the down projection .* profile with --signal"):
        load_flash_model(made.layout)


def test_a_permuted_layout_has_nothing_in_flash(runnable: RunnableFactory) -> None:
    with pytest.raises(UnsupportedError, match="is a permuted layout, an ordinary checkpoint"):
        load_flash_model(runnable("opt", relayout=("--layout", "permuted")).layout)


def test_a_checkpoint_is_no_layout(runnable: RunnableFactory, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has neither model\.flash\.json nor"):
        load_flash_model(runnable("opt").model)
    with pytest.raises(InputError, match="no such directory"):
        load_flash_model(tmp_path / "absent")


def test_weights_of_8_bits_lack_their_scales(layouts: LayoutFactory) -> None:
    with pytest.raises(UnsupportedError, match=r"layers\.0 has weights of dtype F8_E4M3, which need scales"):
        load_flash_model(layouts.bundled("opt", resident="gate", dtype="F8_E4M3").layout)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dram": "1"}, r"1 bytes of DRAM are too few for this layout; allow at least \d+ bytes"),
        ({"dram": "0.1%"}, "are too few for this layout"),
        ({"dram": "some"}, "'some' is not a valid size"),
        ({"cache": "mru"}, "cache 'mru' is not one of"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of float32, bfloat16, float16"),
        ({"device_profile": "floppy"}, "device 'floppy' is neither a file nor built in"),
    ],
)
def test_options_that_make_no_sense(runnable: RunnableFactory, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        load_flash_model(runnable("opt").layout, **options)


def cut(layout: Path) -> None:
    content = (layout / FLASH).read_bytes()
    (layout / FLASH).write_bytes(content[:-1])


def change_config(layout: Path) -> None:
    config = json.loads((layout / "config.json").read_text())
    (layout / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


def change_size(layout: Path) -> None:
    config = json.loads((layout / "config.json").read_text())
    (layout / "config.json").write_text(json.dumps({**config, "ffn_dim": 60}))


DAMAGES: dict[str, tuple[Callable[[Path], object], type[NeuralinkError], str]] = {
    "cut": (cut, InputError, "truncated"),
    "order": (lambda p: flip(p / FLASH, start_of(p / FLASH, "layers.0.order")), VerificationError, "order"),
    "frequency": (lambda p: flip(p / FLASH, start_of(p / FLASH, "layers.1.frequency")), VerificationError, "frequency"),
    "index": (lambda p: (p / "model.flash.json").write_text("{}"), InputError, "has format None"),
    "no weights": (lambda p: (p / FLASH).unlink(), InputError, "cannot be opened"),
    "no config": (lambda p: (p / "config.json").unlink(), InputError, r"config\.json: cannot be opened"),
    "more layers": (change_config, InputError, r"weight 'model\.decoder\.layers\.2.*is missing"),
    "other size": (change_size, UnsupportedError, r"has no module 'model\.decoder\.layers\.0\.fc1'"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_layouts(runnable: RunnableFactory, tmp_path: Path, name: str) -> None:
    damage, kind, complaint = DAMAGES[name]
    layout = Path(shutil.copytree(runnable("opt").layout, tmp_path / "layout"))
    damage(layout)
    with pytest.raises(kind, match=complaint):
        load_flash_model(layout)

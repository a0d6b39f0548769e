"""Whatever a lock file or a build file says, it is read or refused in words; no other error gets out."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.errors import NeuralinkError
from neuralink_cli.pipeline.build_file import parse_build, read_build_file
from neuralink_cli.pipeline.lock import read_lock, write_lock
from tests.damage import leaves, put
from tests.fuzzing import ODD_VALUES, mutate
from tests.pipeline.test_lock import EMPTY, ENTRY

ROOT = Path(__file__).parents[2]
EXAMPLE = (ROOT / "examples/neuralink.toml").read_bytes()
DOCUMENT: dict[str, Any] = {
    "output": "out",
    "model": {"path": "./model", "revision": "main", "allow-uncovered": False},
    "profile": {
        "dataset": ["./text.txt"], "num-samples": 0, "active-ratio": 0.3, "max-memory": "8GB", "text-column": ["text"],
        "seed": 1,
    },
    "cluster": {"order": "linked", "effort": "fast", "pin-hot": 0.1, "held-out": 0.2, "min-tokens": 3, "jobs": 2},
    "relayout": {"weights": "q4_0", "resident": "gate", "recall-text": "./text.txt", "recall-tokens": 64},
    "bench": {"dram": "20%", "fail-below": 1.05},
    "device": [{"device": "nvme", "name": "laptops", "dram": "64MB"}, {"device": "ufs4.0"}],
}  # fmt: skip


def refused_in_words(read: Any, *arguments: object) -> bool:
    """Whether it is refused, with a message that fits a line; it may be read as well."""
    try:
        read(*arguments)
    except NeuralinkError as error:
        assert "\n" not in str(error).strip() or str(error).isprintable()
        return True
    return False


@pytest.mark.parametrize("seed", range(3))
def test_a_lock_file(tmp_path: Path, seed: int) -> None:
    random, refused = np.random.default_rng(seed), 0
    for number in range(100):
        path = tmp_path / f"{number}.json"
        write_lock(path, {entry.output: entry for entry in (ENTRY, EMPTY)})
        mutate(path, random)
        refused += refused_in_words(read_lock, path)
    assert refused > 50


@pytest.mark.parametrize("seed", range(3))
def test_the_values_of_a_build_file(tmp_path: Path, seed: int) -> None:
    random, refused = np.random.default_rng(seed), 0
    places = [way for way, _ in leaves(DOCUMENT)]
    for _ in range(200):
        document = copy.deepcopy(DOCUMENT)
        put(document, places[int(random.integers(len(places)))], ODD_VALUES[int(random.integers(len(ODD_VALUES)))])
        refused += refused_in_words(parse_build, document, "neuralink.toml", tmp_path)
    assert refused > 100
    assert not refused_in_words(parse_build, DOCUMENT, "neuralink.toml", tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_the_bytes_of_a_build_file(tmp_path: Path, seed: int) -> None:
    random, refused = np.random.default_rng(seed), 0
    path = tmp_path / "neuralink.toml"
    for _ in range(150):
        content = bytearray(EXAMPLE)
        for place in random.integers(len(content), size=3):
            content[place] ^= 1 << int(random.integers(8))
        path.write_bytes(content)
        if random.random() < 0.2:
            os.truncate(path, int(random.integers(len(content))))
        refused += refused_in_words(read_build_file, path)
    assert refused > 20

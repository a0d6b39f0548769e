"""Datasets by hub id: from the cache without a connection, streamed with one, at the same commit either way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from neuralink_cli.calibration import rows as dataset_rows
from neuralink_cli.calibration.rows import open_rows
from neuralink_cli.checkpoint.hub import DatasetSource
from neuralink_cli.errors import InputError
from tests.hub import COMMIT, running_hub, write_cached

OTHER = "f" * 40
CARD = b"""---
configs:
- config_name: plain
  data_files:
  - {split: train, path: plain/train*.jsonl}
  - {split: test, path: plain/test.jsonl}
- config_name: chat
  data_files:
  - {split: train, path: chat/*.jsonl}
---
"""


def rows(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


CONFIGS = {
    "README.md": CARD,
    "plain/train-0.jsonl": rows("one", "two"),
    "plain/train-1.jsonl": rows("three"),
    "plain/test.jsonl": rows("four"),
    "chat/all.jsonl": rows("five"),
}
PLAIN = {"train.jsonl": rows("one", "two"), "test.jsonl": rows("three")}


@pytest.fixture
def cache(hub_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow cache")
    write_cached(hub_cache, "dataset", "org/configs", CONFIGS)
    write_cached(hub_cache, "dataset", "org/plain", PLAIN)
    write_cached(hub_cache, "dataset", "plain", {"train.jsonl": rows("old")}, commit=OTHER, ref="v1")
    write_cached(hub_cache, "dataset", "plain", PLAIN)
    return hub_cache


def texts(dataset: str, split: str = "train") -> list[str]:
    return [row["text"] for _, row in open_rows(dataset, split) if isinstance(row, Mapping)]


@pytest.mark.parametrize(
    ("dataset", "split", "expected"),
    [
        ("org/plain", "train", ["one", "two"]),
        ("org/plain@main", "test", ["three"]),
        (f"org/plain@{COMMIT}", "train", ["one", "two"]),
        ("plain", "train", ["one", "two"]),
        ("plain@v1", "train", ["old"]),
        (f"plain@{OTHER}", "train", ["old"]),
        ("org/configs:plain", "train", ["one", "two", "three"]),
        ("org/configs:plain@main", "test", ["four"]),
        ("org/configs:plain", "train+test", ["one", "two", "three", "four"]),
        ("org/configs:chat", "train", ["five"]),
    ],
)
def test_cached_datasets_are_read_at_their_commit(
    cache: Path, tmp_path: Path, dataset: str, split: str, expected: list[str]
) -> None:
    opened = open_rows(dataset, split)
    assert texts(dataset, split) == expected
    assert (opened.name, opened.split) == (dataset, split)
    assert opened.revision == (OTHER if "old" in expected else COMMIT)
    assert not (tmp_path / "arrow cache").exists()


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("org/configs", "train", "org/configs: has several configs: plain, chat; choose one as NAME:CONFIG"),
        ("org/configs:x", "train", "org/configs:x: has no config 'x', only plain, chat; choose one as NAME:CONFIG"),
        (
            "org/configs:plain",
            "dev",
            "org/configs:plain: has no split 'dev', only train, test; choose one with --split",
        ),
        (
            "org/configs:plain",
            "train+dev",
            "org/configs:plain: has no split 'train+dev', only train, test; choose one with --split",
        ),
        ("org/plain", "train+", "org/plain: has no split 'train+', only train, test; choose one with --split"),
        ("org/plain", "train[:9]", "org/plain: has no split 'train[:9]', only train, test; choose one with --split"),
        ("a--b", "train", "a--b: is neither a local file nor an id of the Hugging Face hub"),
    ],
)
def test_a_wrong_choice_is_answered_with_the_right_ones(cache: Path, dataset: str, split: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        open_rows(dataset, split)
    assert str(caught.value) == message


@pytest.mark.parametrize("dataset", ["org/absent", "org/plain@v2", "org/plain@" + "e" * 40])
def test_what_is_not_cached_is_not_made_up(cache: Path, dataset: str) -> None:
    with pytest.raises(InputError, match=f"^{dataset}: is neither a local path nor completely in the local cache of "):
        open_rows(dataset)


def test_a_dataset_that_is_partly_cached_is_refused(hub_cache: Path) -> None:
    partly = {name: CONFIGS[name] for name in ("README.md", "plain/train-0.jsonl")}
    write_cached(hub_cache, "dataset", "org/partly", partly)
    with pytest.raises(InputError) as caught:
        open_rows("org/partly:plain")
    assert str(caught.value) == (
        "org/partly:plain: is only partly in the local cache of the Hugging Face hub; "
        f"run `hf download --repo-type dataset org/partly --revision {COMMIT}` with a connection"
    )


def test_a_dataset_of_the_hub_is_streamed_at_the_commit_that_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(*arguments: Any, cache_dir: str, **options: Any) -> Any:
        assert Path(cache_dir).is_dir()
        calls.append((arguments, options))
        return datasets.Dataset.from_list([{"text": "one"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        dataset_rows, "find_dataset", lambda name, revision: DatasetSource(name, f"commit of {revision}")
    )
    opened = open_rows("org/data-set:config@main", "test")
    assert (opened.name, opened.revision, [*opened]) == (
        "org/data-set:config@main",
        "commit of main",
        [("row 1", {"text": "one"})],
    )
    assert calls == [(("org/data-set", "config"), {"revision": "commit of main", "split": "test", "streaming": True})]


def test_the_librarys_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_arguments: Any, **_options: Any) -> Any:
        raise datasets.exceptions.DataFilesNotFoundError("No data files.\nMore\nlines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(dataset_rows, "find_dataset", lambda name, _revision: DatasetSource(name, COMMIT))
    with pytest.raises(InputError) as caught:
        texts("org/x")
    assert str(caught.value) == "org/x: cannot be read as a dataset (No data files. More lines)"


def test_a_hub_that_answers_gives_the_same_rows_as_the_cache(cache: Path, tmp_path: Path) -> None:
    script = """if True:
        import sys
        from neuralink_cli.calibration.rows import open_rows
        from neuralink_cli.errors import InputError
        for dataset in sys.argv[1:]:
            try:
                rows = open_rows(dataset)
                print([row["text"] for _, row in rows], rows.revision)
            except InputError as error:
                print(error)
    """
    wanted = ["org/configs:plain", "org/plain@main", "org/configs:x", "org/absent", "org/plain@v2", "org/gated"]
    with running_hub() as hub:
        hub.repositories = {("dataset", "org/configs"): CONFIGS, ("dataset", "org/plain"): PLAIN}
        hub.repositories["dataset", "org/gated"] = PLAIN
        hub.gated.add("org/gated")
        environment = {**os.environ, **hub.environment(tmp_path / "other cache")}
        done = subprocess.run(
            [sys.executable, "-c", script, *wanted], env=environment, capture_output=True, text=True, check=True
        )
    found = done.stdout.splitlines()
    assert found[:2] == [f"{texts(dataset)} {COMMIT}" for dataset in wanted[:2]]
    assert found[2].startswith("org/configs:x: has no config 'x', only plain, chat")
    assert found[3].startswith("org/absent: is neither a local path nor a dataset of the Hugging Face hub")
    assert found[4].startswith("org/plain: has no revision 'v2'")
    assert found[5].startswith("org/gated: is gated, and you have no access")

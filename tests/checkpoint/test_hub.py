from __future__ import annotations

import errno
import logging
import shutil
import sys
from collections.abc import Callable
from glob import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.hub import find_dataset, find_model
from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.errors import InputError, MissingDependencyError, OptionError, OutputError, UnsupportedError
from tests.checkpoints import files_of, write_checkpoint
from tests.hub import COMMIT, write_cached

OTHER = "f" * 40


def http_error(kind: Callable[..., Exception]) -> Exception:
    """An error of the hub's library, as an answer of the hub leads to it."""
    response: Any = SimpleNamespace(headers={}, status_code=404, request=None)
    return kind("the hub's words.\nMore of them", response=response)


def hub_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_arguments: object, **_options: object) -> NoReturn:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)


def without(files: dict[str, bytes], suffix: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.endswith(suffix)}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    return files_of(write_checkpoint(tmp_path / "original", shards=2))


@pytest.fixture
def hub_knows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the hub list files, and remember which are asked for; it fails with `error`, or does not give `lost`."""

    def know(
        cache: Path, files: dict[str, bytes], error: Exception | None = None, lost: str | None = None
    ) -> list[list[str]]:
        asked: list[list[str]] = []
        siblings = [SimpleNamespace(rfilename=name, size=len(content)) for name, content in files.items()]

        def model_info(_api: object, _id: str, **_options: object) -> Any:
            return SimpleNamespace(sha=COMMIT, siblings=siblings)

        def hf_hub_download(repository: str, name: str, *, revision: str) -> str:
            return str(write_cached(cache, "model", repository, {name: files[name]}, commit=revision) / name)

        def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            asked.append(allow_patterns)
            if error is not None:
                raise error
            fetched = {name: files[name] for name in files if escape(name) in allow_patterns and name != lost}
            return str(write_cached(cache, "model", repository, fetched, ref=revision or "main"))

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return know


def test_what_exists_locally_wins(hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cached(hub_cache, "model", "org/name", {"config.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    source = find_model("org/name")
    assert (source.directory, source.origin) == (Path("org/name"), None)
    with pytest.raises(OptionError, match="--revision is for models of the Hugging Face hub, and org/name is a local"):
        find_model("org/name", "main")


@pytest.mark.parametrize(
    "model",
    [Path("org/name"), "/org/name", "./org/name", "org/name/", "a/b/c", "a--b", "a..b", "-a", "org/b.", "\u00e4"],
)
def test_what_is_no_hub_id_is_a_local_path(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str | Path
) -> None:
    write_cached(hub_cache, "model", "org/name", {"config.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    source = find_model(model)
    assert (source.directory, source.origin) == (Path(model), None)
    with pytest.raises(OptionError, match="is a local path"):
        find_model(model, COMMIT)


@pytest.mark.parametrize("name", ["org/name", "name", "Org_1/na.me-2", "a/b"])
@pytest.mark.parametrize("revision", [None, "main", "v1.0", OTHER])
def test_a_cached_model_is_found_by_name_and_revision(
    hub_cache: Path, files: dict[str, bytes], caplog: pytest.LogCaptureFixture, name: str, revision: str | None
) -> None:
    write_cached(hub_cache, "model", name, files)
    write_cached(hub_cache, "model", name, files, commit=OTHER, ref="v1.0")
    source = find_model(name, revision)
    commit = COMMIT if revision in (None, "main") else OTHER
    assert source.origin == Origin(name, commit)
    with Checkpoint(source.directory, source.origin) as checkpoint:
        assert len(checkpoint.files) == 2
    wanted = name if revision is None else f"{name}@{revision}"
    assert f"{wanted}: HF_HUB_OFFLINE is set; using commit {commit} from the local cache" in caplog.messages


@pytest.mark.parametrize("revision", ["v2", "e" * 40])
def test_an_unknown_revision_is_not_replaced_by_another(
    hub_cache: Path, files: dict[str, bytes], revision: str
) -> None:
    write_cached(hub_cache, "model", "org/name", files)
    with pytest.raises(InputError, match=f"^org/name@{revision}: is neither a local path nor completely in the local "):
        find_model("org/name", revision)


@pytest.mark.parametrize("lacking", ["config.json", ".safetensors"])
def test_a_cached_tokenizer_is_no_cached_model(hub_cache: Path, files: dict[str, bytes], lacking: str) -> None:
    write_cached(hub_cache, "model", "org/name", without(files, lacking))
    with pytest.raises(InputError, match="nor completely in the local cache of the Hugging Face hub"):
        find_model("org/name")


def test_what_is_nowhere_is_said_to_be_nowhere(hub_cache: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_model("org/nmae")
    assert str(caught.value) == (
        "org/nmae: is neither a local path nor completely in the local cache of the Hugging Face hub, and "
        "HF_HUB_OFFLINE is set; check the name, or run `hf download org/nmae` with a connection"
    )
    with pytest.raises(InputError, match="or run `hf download --repo-type dataset data --revision v1` with a conn"):
        find_dataset("data", "v1")


ANSWERS = {
    "not found": (
        http_error(errors.RepositoryNotFoundError),
        "is neither a local path nor a model of the Hugging Face hub",
        "check the name; if it is private, run `hf auth login`",
    ),
    "gated": (
        http_error(errors.GatedRepoError),
        "is gated, and you have no access",
        "accept its licence on https://huggingface.co/org/name, then run `hf auth login`",
    ),
    "no such revision": (
        http_error(errors.RevisionNotFoundError),
        "has no revision 'v1'",
        "see https://huggingface.co/org/name/commits",
    ),
    "no connection": (
        ConnectionError("no route.\nAt all"),
        "the hub cannot be reached (no route. At all)",
        "check the name, or run `hf download org/name --revision v1` with a connection",
    ),
    "server error": (
        http_error(errors.HfHubHTTPError),
        "the hub cannot be reached (the hub's words. More of them)",
        "check the name, or run `hf download org/name --revision v1` with a connection",
    ),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_the_hub_answers_is_said_in_one_line(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    error, what, fix = ANSWERS[answer]
    hub_fails(monkeypatch, error)
    with pytest.raises(InputError) as caught:
        find_model("org/name", "v1")
    assert str(caught.value).startswith("org/name")
    assert str(caught.value).endswith(f"{what}; {fix}")
    with pytest.raises(InputError, match=r"^org/data"):
        find_dataset("org/data", "v1")


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_the_hub_does_not_give_comes_from_the_cache_with_a_remark(
    hub_cache: Path,
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answer: str,
) -> None:
    error, what, _ = ANSWERS[answer]
    hub_fails(monkeypatch, error)
    write_cached(hub_cache, "model", "org/name", files, ref="v1")
    folder = write_cached(hub_cache, "dataset", "org/data", {"train.txt": b"x"}, ref="v1")
    assert find_model("org/name", "v1").origin == Origin("org/name", COMMIT)
    assert f"org/name@v1: {what}; using commit {COMMIT} from the local cache" in caplog.messages
    found = find_dataset("org/data", "v1")
    assert (found.location, found.revision) == (str(folder), COMMIT)


def test_a_dataset_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def dataset_info(_api: object, name: str, *, revision: str | None, **_options: object) -> Any:
        assert (name, revision) == ("org/data", "v1")
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    found = find_dataset("org/data", "v1")
    assert (found.location, found.revision) == ("org/data", COMMIT)
    assert caplog.messages == [f"org/data@v1: streaming the dataset at commit {COMMIT} from the Hugging Face hub"]


def test_only_what_makes_the_checkpoint_is_fetched(
    hub_cache: Path, files: dict[str, bytes], hub_knows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shards = [name for name in files if name.endswith(".safetensors")]
    wanted = [
        *files,
        "merges[1].txt",
        "tokenizer.model",
        "original/params.json",
        "2_Dense/model.safetensors",
        "head.pt",
    ]
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/x.pth", "onnx/model.onnx", "x.gguf"]
    others += [".gitattributes", "tf_model.h5", "64.tflite", "pytorch_model.bin.index.json", "checkpoint-1/config.json"]
    asked = hub_knows(hub_cache, {**files, **{name: b"12345" for name in (*wanted, *others) if name not in files}})
    assert find_model("org/name").origin == Origin("org/name", COMMIT)
    assert len(shards) == 2
    assert sorted(asked[0]) == sorted("merges[[]1].txt" if name == "merges[1].txt" else name for name in wanted)
    size = sum(map(len, files.values())) + 5 * 5
    announced = f"{len(wanted)} files, {size:,} bytes"
    assert f"org/name: fetching commit {COMMIT} from the Hugging Face hub: {announced}" in caplog.messages


def test_every_file_is_fetched_if_asked(hub_cache: Path, files: dict[str, bytes], hub_knows: Any) -> None:
    others = ["pytorch_model.bin", "onnx/model.onnx", ".gitattributes"]
    asked = hub_knows(hub_cache, {**files, **dict.fromkeys(others, b"x")})
    find_model("org/name", all_files=True)
    assert sorted(asked[0]) == sorted([*files, *others])


def test_a_single_file_is_fetched_without_its_duplicates(hub_cache: Path, tmp_path: Path, hub_knows: Any) -> None:
    files = files_of(write_checkpoint(tmp_path / "single"))
    others = {
        "model-00001-of-00001.safetensors": b"",
        "model.fp16.safetensors": b"",
        "model.safetensors.index.json": b"",
    }
    asked = hub_knows(hub_cache, files | others)
    find_model("org/name")
    assert sorted(asked[0]) == sorted(files)


def test_what_is_cached_is_not_announced_as_fetched(
    hub_cache: Path, files: dict[str, bytes], hub_knows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_cached(hub_cache, "model", "org/name", files)
    hub_knows(hub_cache, files)
    with caplog.at_level(logging.INFO):
        find_model("org/name", "main")
    assert caplog.messages == [f"org/name@main: commit {COMMIT} is in the local cache"]


UNUSABLE: dict[str, tuple[Any, type[Exception], str]] = {
    "pickles only": (
        lambda files: {**without(without(files, ".safetensors"), ".index.json"), "pytorch_model.bin": b"x"},
        UnsupportedError,
        "^org/name: has only pickled weights",
    ),
    "no weights": (
        lambda files: without(without(files, ".safetensors"), ".index.json"),
        InputError,
        "^org/name: has neither model.safetensors nor ",
    ),
    "no config": (lambda files: without(files, "config.json"), InputError, "^org/name: has no config.json"),
    "a shard is missing": (lambda files: without(files, "2.safetensors"), InputError, "^org/name: shard .* is missing"),
    "a shard elsewhere": (
        lambda files: {**files, "model.safetensors.index.json": b'{"weight_map": {"x": "../x.safetensors"}}'},
        InputError,
        "is not a plain",
    ),
    "quantised": (
        lambda files: {
            **files,
            "config.json": b'{"model_type": "opt", "quantization_config": {"quant_method": "gptq"}}',
        },
        UnsupportedError,
        r"is quantised \(gptq\)",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_used_is_not_fetched(
    hub_cache: Path, files: dict[str, bytes], hub_knows: Any, case: str
) -> None:
    change, kind, message = UNUSABLE[case]
    asked = hub_knows(hub_cache, change(files))
    with pytest.raises(kind, match=message):
        find_model("org/name")
    assert not asked


def test_there_must_be_room_in_the_cache(
    hub_cache: Path, files: dict[str, bytes], hub_knows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub_knows(hub_cache, files)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=100))
    with pytest.raises(OutputError, match=r"hub cache/models--org--name: needs [\d,]+ bytes of disk, 100 are free"):
        find_model("org/name")
    assert not asked


def test_a_fetch_that_fails_is_said_to_have_failed(hub_cache: Path, files: dict[str, bytes], hub_knows: Any) -> None:
    hub_knows(hub_cache, files, ConnectionError("reset by peer"))
    with pytest.raises(InputError, match=r"^org/name: was not fetched completely \(reset by peer\); run it again: "):
        find_model("org/name")
    hub_knows(hub_cache, files, lost="tokenizer.json")
    with pytest.raises(
        InputError, match=r"^org/name: was not fetched completely \(tokenizer.json is missing\); run it"
    ):
        find_model("org/name")
    hub_knows(hub_cache, files, http_error(errors.GatedRepoError))
    with pytest.raises(InputError, match=r"^org/name: is gated, and you have no access"):
        find_model("org/name")
    hub_knows(hub_cache, files, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        find_model("org/name")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        MissingDependencyError, match=r"^org/name: is not a local path, .*pip install 'neuralink-cli\[hf\]'$"
    ):
        find_model("org/name")


def test_the_librarys_settings_are_left_as_they_were(hub_cache: Path, files: dict[str, bytes]) -> None:
    write_cached(hub_cache, "model", "org/name", files)
    from huggingface_hub import utils

    before = utils.logging.get_verbosity(), utils.are_progress_bars_disabled()
    find_model("org/name")
    assert (utils.logging.get_verbosity(), utils.are_progress_bars_disabled()) == before

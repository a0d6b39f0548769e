from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from neuralink_cli.activations.trace import TRACE_SCHEMA
from neuralink_cli.errors import InputError, NeuralinkError, OutputError
from neuralink_cli.files.stage_file import StageFile, StreamedTensor, array_tensor, write_stage_file
from tests.checkpoints import RawTensor, encode
from tests.faults import faults, file_size_limit

BLOCK = {
    "id": "layers.0",
    "neurons": 12,
    "hidden": 4,
    "activation": "relu",
    "threshold": 0.5,
    "part_bytes": {"up": 16, "down": 16},
    "routed": None,
}
DOCUMENT: dict[str, Any] = {
    "model": {"fingerprint": "ab" * 32, "model_type": "opt", "architecture": "opt"},
    "origin": None,
    "signal": "gate",
    "calibration": None,
    "blocks": [BLOCK],
    "sources": [
        {"name": "t\u00e4xt", "sha256": "cd" * 32, "first_sequence": 0, "sequences": 2, "total_sequences": 2,
         "tokens": 900, "parameters": {"b": 1, "a": 2}}
    ],
}  # fmt: skip
FIRED = np.random.default_rng(0).integers(0, 256, (900, 2), dtype=np.uint8)
LENGTHS = np.array([400, 500], dtype=np.uint32)


def chunks() -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    yield FIRED[:1]
    yield FIRED[1:1]
    yield FIRED[1:]


TENSORS = (StreamedTensor("layers.0.fired", "U8", (900, 2), chunks), array_tensor("sequence_lengths", LENGTHS))


def write(path: Path, document: dict[str, Any] = DOCUMENT, tensors: Sequence[StreamedTensor] = TENSORS) -> str:
    return write_stage_file(path, TRACE_SCHEMA, document, tensors, overwrite=True)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header's JSON and the data section."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def backwards(value: Any) -> Any:
    """The same document with all its objects in reverse order."""
    if isinstance(value, dict):
        return {key: backwards(item) for key, item in reversed(value.items())}
    return [backwards(item) for item in value] if isinstance(value, list) else value


def test_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    digest = write(path)
    with safe_open(path, "np") as file:
        assert list(file.metadata()) == ["neuralink"]
        assert set(file.keys()) == {"layers.0.fired", "sequence_lengths"}
        assert np.array_equal(file.get_tensor("layers.0.fired"), FIRED)
        assert np.array_equal(file.get_tensor("sequence_lengths"), LENGTHS)
        document = json.loads(file.metadata()["neuralink"])
    assert document["content_sha256"] == digest
    assert (document["format"], document["version"]) == ("neuralink-trace", 1)
    assert {key: document[key] for key in DOCUMENT} == DOCUMENT
    assert (path.stat().st_size - len(header_of(path)[1])) % 4096 == 0


def test_is_read_back(tmp_path: Path) -> None:
    digest = write(tmp_path / "x")
    with StageFile(tmp_path / "x", TRACE_SCHEMA) as file:
        assert np.array_equal(file.array("layers.0.fired", "U8"), FIRED)
        assert file.array("sequence_lengths", "U32").tolist() == [400, 500]
        assert file.content_sha256 == digest
        file.check_content()
        with pytest.raises(InputError, match="tensor 'sequence_lengths' has dtype U32, not I32"):
            file.array("sequence_lengths", "I32")
        with pytest.raises(InputError, match="tensor 'absent' is missing"):
            file.array("absent", "U8")


def test_the_digest_is_that_of_the_data_and_the_document(tmp_path: Path) -> None:
    digest = write(tmp_path / "x")
    header, data = header_of(tmp_path / "x")
    assert data == FIRED.tobytes() + LENGTHS.tobytes()
    document = json.loads(header["__metadata__"]["neuralink"])
    del document["content_sha256"]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(data + text.encode()).hexdigest() == digest


def test_the_same_input_gives_the_same_bytes_whatever_the_order_of_keys(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    write(tmp_path / "c", backwards(DOCUMENT))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_how_the_data_comes_in_chunks_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", tensors=(array_tensor("layers.0.fired", FIRED), TENSORS[1]))
    turned = np.asfortranarray(FIRED)
    write(tmp_path / "c", tensors=(array_tensor("layers.0.fired", turned), TENSORS[1]))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_the_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.files import test_stage_file as t;"
        "t.write(Path(sys.argv[1]), {k: t.DOCUMENT[k] for k in set(t.DOCUMENT)})"
    )
    write(tmp_path / "here")
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            check=True,
        )
        assert (tmp_path / seed).read_bytes() == (tmp_path / "here").read_bytes()


def test_reports_its_progress_in_bytes(tmp_path: Path) -> None:
    seen: list[int] = []
    write_stage_file(tmp_path / "x", TRACE_SCHEMA, DOCUMENT, TENSORS, progress=seen.append)
    assert sum(seen) == FIRED.nbytes + LENGTHS.nbytes


def test_refuses_data_of_another_size_than_announced(tmp_path: Path) -> None:
    for rows in (FIRED[:-1], np.concatenate([FIRED, FIRED[:1]])):
        wrong = StreamedTensor("layers.0.fired", "U8", (900, 2), partial(iter, [rows]))
        with pytest.raises(ValueError, match=f"tensor 'layers.0.fired' got {rows.nbytes} bytes"):
            write(tmp_path / "x", tensors=(wrong, TENSORS[1]))
        assert not any(tmp_path.iterdir())


def test_every_flipped_bit_of_the_data_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path)
    content = path.read_bytes()
    data_start = len(content) - FIRED.nbytes - LENGTHS.nbytes
    for byte in (data_start, data_start + 899, len(content) - LENGTHS.nbytes, len(content) - 1):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[byte] ^= 1 << bit
            path.write_bytes(damaged)
            with (
                StageFile(path, TRACE_SCHEMA) as file,
                pytest.raises(InputError, match=r"is damaged: .* does not match its digest; make it again"),
            ):
                file.check_content()


def test_every_flipped_bit_of_the_header_is_found(tmp_path: Path) -> None:
    """Flipped bits of the document's figures, which are well formed more often than not, included."""
    path = tmp_path / "x"
    write(path)
    content = path.read_bytes()
    used = len(content[: 8 + struct.unpack("<Q", content[:8])[0]].rstrip(b" "))
    random = np.random.default_rng(0)
    threshold = content.index(b'threshold\\":0.5') + len(b'threshold\\":0.')
    positions = [threshold, *range(8), *random.integers(8, used, 300).tolist()]
    for byte in positions:
        damaged = bytearray(content)
        damaged[byte] ^= 1 << int(random.integers(8)) if byte != threshold else 1
        path.write_bytes(damaged)
        with pytest.raises(InputError), StageFile(path, TRACE_SCHEMA) as file:
            file.array("layers.0.fired", "U8")
            file.array("sequence_lengths", "U32")
            file.check_content()


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with another document, its digest as it was."""
    write(path)
    header, data = header_of(path)
    document = json.loads(header["__metadata__"]["neuralink"])
    replacement = change(document)
    text = json.dumps(document) if replacement is None else replacement
    tensors = {
        "layers.0.fired": RawTensor("U8", (900, 2), data[:1800]),
        "sequence_lengths": RawTensor("U32", (2,), data[1800:]),
    }
    path.write_bytes(encode(tensors, {"neuralink": text}))
    return path


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another kind": (
        lambda d: d.update(format="neuralink-placement"),
        "is a 'neuralink-placement' file, but a 'neuralink-trace' file is needed",
    ),
    "no kind": (lambda d: d.update(format=None), "is a None file, but a 'neuralink-trace' file is needed"),
    "newer": (lambda d: d.update(version=2), "has format version 2, but this tool reads 1"),
    "version is text": (lambda d: d.update(version="1"), "has format version '1', but this tool reads 1"),
    "version is a boolean": (lambda d: d.update(version=True), "not a valid trace: at version"),
    "unknown key": (lambda d: d.update(colour="blue"), "not a valid trace: .*'colour' was unexpected"),
    "no model": (lambda d: json.dumps({k: v for k, v in d.items() if k != "model"}), "'model' is a required property"),
    "fingerprint": (lambda d: d["model"].update(fingerprint="AB" * 32), "at model.fingerprint: 'ABAB.* does not match"),
    "no blocks": (lambda d: d.update(blocks=[]), "at blocks: "),
    "threshold": (lambda d: d["blocks"][0].update(threshold=-1), r"at blocks\[0\].threshold: -1 is less than"),
    "neurons": (lambda d: d["blocks"][0].update(neurons=1.5), r"at blocks\[0\].neurons: 1.5 is not of type 'integer'"),
    "digest": (lambda d: d.update(content_sha256=None), "at content_sha256: None is not of type 'string'"),
    "no JSON": (lambda _: "{", "not valid JSON"),
    "no object": (lambda _: "[]", "not a JSON object"),
    "infinity": (lambda d: json.dumps(d).replace("0.5", "1e999"), "1e999 is out of range"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses(tmp_path: Path, name: str) -> None:
    change, complaint = WRONG[name]
    path = rewritten(tmp_path / "x.safetensors", change)
    with pytest.raises(InputError, match=complaint) as caught:
        StageFile(path, TRACE_SCHEMA)
    assert str(caught.value).startswith(f"{path}: ")


def test_refuses_other_safetensors_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}):
        path.write_bytes(encode({}, metadata))
        with pytest.raises(InputError, match=r"is not a trace file \(no 'neuralink' metadata\)"):
            StageFile(path, TRACE_SCHEMA)


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="already exists"):
        write_stage_file(path, TRACE_SCHEMA, DOCUMENT, TENSORS)
    assert path.read_bytes() == b"old"


def is_complete(path: Path) -> bool:
    with StageFile(path, TRACE_SCHEMA) as file:
        file.check_content()
        return bool(file.array("layers.0.fired", "U8").shape == FIRED.shape)


def test_every_failure_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x"
    operations = 0
    path.write_bytes(b"old")
    for _ in faults(lambda: write(path)):
        operations += 1
        assert [child.name for child in tmp_path.iterdir()] == ["x"]
        assert path.read_bytes() == b"old" or is_complete(path)
        path.write_bytes(b"old")
    assert operations >= 7
    assert is_complete(path)


def test_a_disk_that_fills_up_at_any_byte_leaves_no_file(tmp_path: Path) -> None:
    """The write that reaches the end is cut short without an error: only the next one fails."""
    path = tmp_path / "x"
    write(path)
    size = path.stat().st_size
    data_start = size - FIRED.nbytes - LENGTHS.nbytes
    path.unlink()
    for limit in (1, 4095, data_start, data_start + 1, data_start + 2, data_start + 1799, size - 8, size - 4, size - 1):
        with file_size_limit(limit), pytest.raises((OSError, NeuralinkError)):
            write(path)
        assert not any(tmp_path.iterdir())
    with file_size_limit(size):
        write(path)
    assert is_complete(path)

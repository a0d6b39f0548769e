"""Seeded mutation of every kind of file, and what must hold whatever a file says.

The short run is a test (tests/test_fuzzing.py), the long one is `make fuzz` (tests/long/fuzz.py, docs/fuzzing.md).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuralink_cli.cli.entry import run
from neuralink_cli.files.stage_file import DIGEST_KEY
from tests.checkpoints import files_of, write_checkpoint, write_random_trace
from tests.damage import INDEX, leaves, put, seal

# What a command may answer to a wrong input: nothing wrong found, or one of the documented refusals.
ALLOWED = frozenset((0, 1, 2, 3, 4, 5, 6))
ODD_VALUES: tuple[Any, ...] = (
    -1, 0, 1, 24.0, 1.5, 2**31, 2**53, 2**63, 2**64, 10**39, 1e300, -0.0, True, None, "", "x", "\0", "../../x", "a\nb",
    "\x1b[31m", "é" * 300, "x" * 5000, [], {}, [[]], {"a": {}},
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """One of every kind of file, made in a folder; each case works on a copy."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> World:
        """Make the files."""
        folder.mkdir(parents=True, exist_ok=True)
        model = write_checkpoint(folder / "model", "opt", shards=2)
        trace = write_random_trace(model, folder / "trace", tokens=120)
        world = cls(folder)
        assert quietly("cluster", trace, "-o", folder / "placement", "--effort", "fast") == 0
        for kind in INDEX:
            relayout = ("relayout", model, "--placement", folder / "placement", "-o", folder / kind, "--layout", kind)
            assert quietly(*relayout) == 0
        jobs = [
            {
                "jobname": f"r{size}",
                "groupid": size,
                "error": 0,
                "job options": {"rw": "randread", "direct": "1", "ioengine": "libaio", "iodepth": "32"},
                "read": {"io_bytes": 1000 * size, "total_ios": 1000, "bw_bytes": rate, "bw": rate // 1024},
            }
            for size, rate in ((4096, 160_000_000), (65536, 530_000_000), (262144, 940_000_000))
        ]
        (folder / "fio.json").write_text(json.dumps({"fio version": "fio-3.33", "global options": {}, "jobs": jobs}))
        assert quietly("probe", "--from-fio", folder / "fio.json", "-o", folder / "device.json") == 0
        return world


# Each kind of file: its name in the world, and the commands that read it, `{out}` being a new name.
KINDS: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "trace": ("trace", (("cluster", "{w}/trace", "-o", "{out}", "--export-graph", "{out}.graphs", "--effort", "fast"),
                        ("merge", "{w}/trace", "-o", "{out}.merged"),
                        ("bench", "{w}/bundled", "--trace", "{w}/trace", "--csv", "{out}.csv"),
                        ("inspect", "{w}/trace", "--check"), ("drift", "{w}/placement", "--trace", "{w}/trace"),
                        ("diff", "{w}/trace", "{w}/trace"))),
    "placement": ("placement", (("relayout", "{w}/model", "--placement", "{w}/placement", "-o", "{out}"),
                                ("relayout", "{w}/model", "--placement", "{w}/placement", "-o", "{out}.permuted",
                                 "--layout", "permuted"),
                                ("inspect", "{w}/placement"), ("diff", "{w}/placement", "{w}/bundled"),
                                ("drift", "{w}/placement", "--trace", "{w}/trace", "--reorder", "--effort", "fast"))),
    "config": ("model/config.json", (("relayout", "{w}/model", "--placement", "{w}/placement", "-o", "{out}"),
                                     ("inspect", "{w}/model"))),
    "shard index": ("model/model.safetensors.index.json",
                    (("relayout", "{w}/model", "--placement", "{w}/placement", "-o", "{out}"),
                     ("inspect", "{w}/model"))),
    "weights": ("model/model-00001-of-00002.safetensors",
                (("relayout", "{w}/model", "--placement", "{w}/placement", "-o", "{out}"),
                 ("inspect", "{w}/model", "--check"))),
    "flash index": ("bundled/model.flash.json", (("verify", "{w}/model", "{w}/bundled"),
                                                 ("restore", "{w}/bundled", "-o", "{out}"),
                                                 ("inspect", "{w}/bundled"),
                                                 ("drift", "{w}/bundled", "--trace", "{w}/trace"),
                                                 ("diff", "{w}/permuted", "{w}/bundled"))),
    "flash file": ("bundled/model.flash.safetensors", (("verify", "{w}/model", "{w}/bundled"),
                                                       ("restore", "{w}/bundled", "-o", "{out}"),
                                                       ("inspect", "{w}/bundled", "--check"))),
    "permuted index": ("permuted/model.permuted.json", (("verify", "{w}/model", "{w}/permuted"),
                                                        ("restore", "{w}/permuted", "-o", "{out}"),
                                                        ("inspect", "{w}/permuted", "--check"),
                                                        ("diff", "{w}/permuted", "{w}/bundled"))),
    "device": ("device.json", (("cluster", "{w}/trace", "--device", "{w}/device.json", "-o", "{out}"),
                               ("inspect", "{w}/device.json"))),
    "fio": ("fio.json", (("probe", "--from-fio", "{w}/fio.json", "-o", "{out}"), ("inspect", "{w}/fio.json"))),
}  # fmt: skip
# What is made of an output that came with exit code 0: the next stage must take it.
NEXT: dict[str, tuple[str, ...]] = {
    "cluster": ("relayout", "{w}/model", "--placement", "{out}", "-o", "{out}.next"),
    "relayout": ("verify", "{w}/model", "{out}", "--quick"),
    "merge": ("cluster", "{out}", "-o", "{out}.next", "--effort", "fast"),
    "probe": ("cluster", "{w}/trace", "--device", "{out}", "-o", "{out}.next", "--effort", "fast"),
}
# The next stage compares with a checkpoint too, which may be another: that is no fault of the output.
_ANOTHER = 5


def quietly(*arguments: object) -> int:
    """The exit code of a command."""
    return run([*map(str, arguments), "-q"])


def check_case(world: World, folder: Path, kind: str, random: np.random.Generator) -> list[str]:
    """Mutate a file of a kind, run the commands that read it, and say what was wrong with what they did."""
    copy = Path(shutil.copytree(world.folder, folder / "world", symlinks=True))
    outputs = folder / "outputs"
    outputs.mkdir()
    name, commands = KINDS[kind]
    change = mutate(copy / name, random)
    before = files_of(copy)
    problems = []
    for command in commands:
        out = outputs / "out"
        words = [word.format(w=copy, out=out) for word in command]
        code = quietly(*words)
        case = f"{kind}, {change}: `{words[0]}` gave {code}"
        if code not in ALLOWED:
            problems.append(f"{case}, which is no refusal")
        made = next((Path(words[k + 1]) for k, word in enumerate(words) if word == "-o"), None)
        if code == 0 and command[0] in NEXT and made is not None:
            after = quietly(*(word.format(w=copy, out=made) for word in NEXT[command[0]]))
            if after not in (0, _ANOTHER):
                problems.append(f"{case}, and the next stage refuses what it wrote with {after}")
        if code != 0 and made is not None and made.exists():
            problems.append(f"{case} and left an output")
        if any(path.name.endswith(".partial") for path in outputs.iterdir()):
            problems.append(f"{case} and left a .partial")
    if files_of(copy) != before:
        problems.append(f"{kind}, {change}: an input was changed")
    if {path.name for path in folder.iterdir()} != {"world", "outputs"}:
        problems.append(f"{kind}, {change}: something was written outside the outputs")
    shutil.rmtree(folder)
    return problems


def mutate(path: Path, random: np.random.Generator) -> str:
    """Change a file in one of the ways that fit it; which, in words."""
    ways: list[Callable[[Path, np.random.Generator], str]] = [_flip, _cut, _other_kind]
    ways += [_change_document] * 6
    return ways[int(random.integers(len(ways)))](path, random)


def _flip(path: Path, random: np.random.Generator) -> str:
    content = bytearray(path.read_bytes())
    place = int(random.integers(min(len(content), 20_000)))
    content[place] ^= 1 << int(random.integers(8))
    path.write_bytes(content)
    return f"bit of byte {place}"


def _cut(path: Path, random: np.random.Generator) -> str:
    size = int(random.integers(path.stat().st_size))
    os.truncate(path, size)
    return f"cut to {size} bytes"


def _other_kind(path: Path, random: np.random.Generator) -> str:
    path.unlink()
    kind = ("pipe", "directory", "dangling link", "device")[int(random.integers(4))]
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("absent" if kind == "dangling link" else "/dev/null")
    return kind


def _change_document(path: Path, random: np.random.Generator) -> str:
    """Set a value of the document to an odd one, or take a key out or in twice; digests are made to fit again."""
    with _document(path) as document:
        found = list(leaves(document.value))
        way, _ = found[int(random.integers(len(found)))]
        value = ODD_VALUES[int(random.integers(len(ODD_VALUES)))]
        put(document.value, way, value)
        return f"{'.'.join(map(str, way))} = {value!r}"[:200]


class _document:  # noqa: N801
    """The JSON document of a file, wherever it lies in it; written back at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        content = path.read_bytes()
        self._stage = content[8:9] == b"{" and content[:1] != b"{"
        self._header: dict[str, Any] = {}
        self._data = b""
        if self._stage:
            (length,) = struct.unpack("<Q", content[:8])
            self._header = json.loads(content[8 : 8 + length])
            self._data = content[8 + length :]
            metadata = self._header.get("__metadata__", {}).get("neuralink")
            self.value: Any = self._header if metadata is None else json.loads(metadata)
        else:
            self.value = json.loads(content)

    def __enter__(self) -> _document:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._stage:
            if "document_sha256" in self.value:
                seal(self._path, self.value)
            else:
                self._path.write_text(json.dumps(self.value))
            return
        if self.value is not self._header:
            import hashlib

            self.value.pop(DIGEST_KEY, None)
            text = json.dumps(self.value, sort_keys=True, separators=(",", ":"))
            digest = hashlib.sha256(self._data + text.encode()).hexdigest()
            whole = {**self.value, DIGEST_KEY: digest}
            self._header["__metadata__"]["neuralink"] = json.dumps(whole, sort_keys=True, separators=(",", ":"))
        raw = json.dumps(self._header).encode()
        self._path.write_bytes(struct.pack("<Q", len(raw)) + raw + self._data)


def cases(seed: int, count: int) -> Iterator[tuple[str, np.random.Generator]]:
    """The kinds in turn, each case with a random generator of its own."""
    kinds = list(KINDS)
    for number in range(count):
        yield kinds[number % len(kinds)], np.random.default_rng([seed, number])

"""The runtime in C against llama.cpp with mmap, under the same memory limits, on a random model of the Llama shape.

    pip install xllamacpp gguf
    make -C examples/c_runtime
    python benchmarks/against_llama_cpp.py --folder /mnt/flash --shape 1B --weights q4_0 f16

Both run the same model in the same formats, on as many threads, in turn, with nothing of their files in the page cache:
a prompt of 16 tokens, then new tokens one by one. A limit is a share of the size of llama.cpp's file. It is set with a
control group where this process may make one; llama.cpp gets what Python takes on top. `flash_run --dram` gets the
limit itself. "all" is without a limit: llama.cpp then also repacks its weights. Both keep keys and values in float16,
as llama.cpp does unless told otherwise. `flash_run` first measures the storage, and reads across gaps that pay on it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_shape import SHAPES, Shape, random_text, write_checkpoint, write_gguf

PROMPT = 16
ENGINE = Path(__file__).parent.parent / "examples/c_runtime/flash_run"


@dataclass(frozen=True)
class Run:
    """What a run took; `bytes_per_token` by the storage device's count, or that of the program."""

    tokens_per_second: float
    prompt_seconds: float
    bytes_per_token: float
    peak: int


# ---- memory limits ----


class Group:
    """A control group with a memory limit, version 1 or 2; none where none can be made.

    Every run has a new one: what the system keeps for processes that have ended counts for the next in the same group.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._limit = self._peak = ""
        self._number = 0
        self._make()

    def _make(self) -> None:
        self._number += 1
        for root, limit, peak in (
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
            ("/sys/fs/cgroup", "memory.max", "memory.peak"),
        ):
            path = Path(root) / f"neuralink-bench-{os.getpid()}-{self._number}"
            try:
                path.mkdir()
            except OSError:
                continue
            if (path / limit).exists():
                self.path, self._limit, self._peak = path, limit, peak
                return
            path.rmdir()

    @contextmanager
    def limited(self, limit: int | None) -> Iterator[None]:
        if self.path is not None:
            self.close()
            self._make()
            self._set(self._limit, str(limit) if limit else {"memory.max": "max"}.get(self._limit, "-1"))
            self._set(self._peak, "0")
        yield

    def _set(self, name: str, value: str) -> None:
        assert self.path is not None
        try:
            (self.path / name).write_text(value)
        except OSError as error:
            if name == self._limit:
                raise SystemExit(f"{self.path / name}: {error}") from None

    def join(self) -> None:
        """Called by the child before it starts its program."""
        if self.path is not None:
            (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        if self.path is None or not (self.path / self._peak).exists():
            return 0
        return int((self.path / self._peak).read_text())

    def close(self) -> None:
        for _ in range(50):
            if self.path is None:
                return
            try:
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.1)


def forget(*paths: Path) -> None:
    """Drop what the page cache holds of some files."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- the two programs ----


def run_llama(group: Group, model: Path, limit: int | None, threads: int, tokens: int, timeout: float) -> Run | None:
    """llama.cpp in a process of its own; None if it did not end in time or was killed."""
    command = [sys.executable, __file__, "--child", str(model), str(threads), str(tokens), "0" if limit else "1"]
    base = subprocess.run([*command, "base"], capture_output=True, text=True, check=True)
    forget(model)
    with group.limited(None if limit is None else limit + int(base.stdout.split()[-1])):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, preexec_fn=group.join)
        except subprocess.TimeoutExpired:
            return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"llama.cpp: exit {done.returncode}: {done.stderr[-300:]}", file=sys.stderr)
        return None
    found = json.loads(lines[-1])
    return Run(found["rate"], found["prompt"], found["read"] / tokens, group.peak() or found["peak"])


def child(model: str, threads: str, tokens: str, repack: str, *base: str) -> None:
    """One run of llama.cpp; `base` only says what Python and the library take."""
    import xllamacpp

    if base:
        print(_status("VmHWM") * 1024)
        return
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 512
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.fit_params = False
    params.cache_ram_mib = 0
    params.no_extra_bufts = repack != "1"
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = int(threads)
    server = xllamacpp.Server(params)
    prompt = [300 + 7 * k for k in range(PROMPT)]
    before = _read_bytes()
    answers: list[dict[str, Any]] = []
    request = {
        "prompt": prompt, "n_predict": int(tokens), "temperature": 0, "ignore_eos": True, "cache_prompt": False,
    }  # fmt: skip
    answer = server.handle_completions(request, lambda part: answers.append(part))
    timings = (answer if isinstance(answer, dict) else answers[-1])["timings"]
    print()
    print(
        json.dumps(
            {
                "rate": timings["predicted_per_second"],
                "prompt": timings["prompt_ms"] / 1e3,
                "read": (_read_bytes() - before)
                * timings["predicted_ms"]
                / (timings["predicted_ms"] + timings["prompt_ms"]),
                "peak": _status("VmHWM") * 1024,
            }
        ),
        flush=True,
    )
    os._exit(0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def measure_storage(engine: Path, layout: Path, profile: Path) -> None:
    """A device profile of what the layout lies on."""
    done = subprocess.run([engine, "--probe", "benchmark", layout], stdout=subprocess.PIPE, check=True)
    profile.write_bytes(done.stdout)
    reads = json.loads(done.stdout)["reads"]
    print("storage: " + ", ".join(f"{r['bytes'] // 1024} KiB {r['bytes_per_second'] / 1e6:.0f} MB/s" for r in reads))


def run_ours(
    group: Group, engine: Path, layout: Path, profile: Path, limit: int | None, threads: int, tokens: int
) -> Run | str:
    """flash_run in a process of its own; the reason if it refuses."""
    command = [
        *(engine, "--dram", limit or "100%", "--context", 512, "--threads", threads, "--keys-values", "f16"),
        *("--device", profile, "--json", layout),
    ]
    prompt = " ".join(str(300 + 7 * k) for k in range(PROMPT))
    forget(*(path for path in layout.iterdir() if path.is_file()))
    # Without a limit nothing is left to read once all that fires has been read: the second time is measured.
    requests = f"generate {tokens} {prompt}\n" * (1 if limit else 2)
    with group.limited(limit):
        done = subprocess.run(
            [str(word) for word in command], input=requests, capture_output=True, text=True, preexec_fn=group.join
        )
    figures = [line.removeprefix("figures ") for line in done.stdout.splitlines() if line.startswith("figures ")]
    if not figures:
        return (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
    found = json.loads(figures[-1])
    of = found["tokens"]
    return Run(
        of["tokens"] / of["seconds"],
        found["prompt"]["seconds"],
        of["bytes_read"] / max(of["tokens"], 1),
        group.peak() or found["peak_bytes"],
    )


# ---- the model ----


def neuralink(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "neuralink_cli", *map(str, arguments), "-q"], check=True, stdout=sys.stderr)


def prepare(folder: Path, shape: Shape, weights: str, active: float, tokens: int, device: str) -> tuple[Path, Path]:
    """The GGUF file and the layout, made once."""
    model, trace, placement = folder / "model", folder / "trace", folder / f"placement-{weights}"
    gguf, layout = folder / f"{weights}.gguf", folder / f"layout-{weights}"
    if not model.exists():
        write_checkpoint(model, shape)
    if not trace.exists():
        (folder / "text.txt").write_text(random_text(shape, tokens, 1))
        neuralink("profile", model, "--dataset", folder / "text.txt", "--max-tokens", tokens, "--active-ratio", active,
                  "--calibration-tokens", min(tokens, 1024), "-o", trace)  # fmt: skip
    stored = "source" if weights == "f16" else weights
    if not placement.exists():
        neuralink("cluster", trace, "--device", device, "--weights", stored, "--resident", "gate", "-o", placement)
    if not layout.exists():
        dense = () if weights == "f16" else ("--dense-weights", weights)
        neuralink("relayout", model, "--placement", placement, "--weights", stored, *dense, "--resident", "gate",
                  "-o", layout)  # fmt: skip
    if not gguf.exists():
        write_gguf(gguf, shape, weights)
    return gguf, layout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where model, layout and GGUF file are kept")
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--weights", nargs="+", choices=["q4_0", "q8_0", "f16"], default=["q4_0"])
    parser.add_argument("--active", default="12%", help="share of neurons that fire")
    parser.add_argument("--calibration", type=int, default=4096, help="tokens to calibrate and order on")
    parser.add_argument("--device", default="ufs4.0", help="device profile of the order")
    parser.add_argument("--limit", nargs="+", type=float, default=[0, 1.0, 0.75, 0.5, 0.35], help="shares; 0: none")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine-path", type=Path, default=ENGINE)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a run of llama.cpp")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    folder = options.folder / options.shape
    folder.mkdir(parents=True, exist_ok=True)
    group = Group()
    limits = "limited by a control group" if group.path else "NOT limited: no control group can be made here"
    print(f"{shape.weights / 1e9:.2f} B weights, {options.active} of neurons fire, {options.threads} threads, {limits}")
    print(f"{'':12} {'':9} | {'llama.cpp':^39} | {'flash_run':^39} |")
    head = f"{'tokens/s':>9} {'prompt s':>9} {'MB/token':>9} {'peak MB':>9}"
    print(f"{'weights':12} {'limit MB':>9} | {head} | {head} | {'ratio':>6}")
    try:
        for weights in options.weights:
            gguf, layout = prepare(folder, shape, weights, float(options.active.rstrip("%")) / 100, options.calibration,
                                   options.device)  # fmt: skip
            profile = folder / "storage.json"
            if weights == options.weights[0]:
                measure_storage(options.engine_path, layout, profile)
            for share in options.limit:
                limit = round(share * gguf.stat().st_size) or None
                theirs = run_llama(group, gguf, limit, options.threads, options.tokens, options.timeout)
                ours = run_ours(group, options.engine_path, layout, profile, limit, options.threads, options.tokens)
                print(_row(f"{weights} {share:4.0%}" if share else f"{weights}  all", limit, theirs, ours), flush=True)
    finally:
        group.close()


def _row(name: str, limit: int | None, theirs: Run | None, ours: Run | str) -> str:
    said = f"{limit / 1e6:9.0f}" if limit else f"{'':>9}"
    cells = [
        _cell(theirs) if theirs else f"{'killed, or not in time':39}",
        ours[:80] if isinstance(ours, str) else _cell(ours),
    ]
    ratio = f"{ours.tokens_per_second / theirs.tokens_per_second:6.2f}" if theirs and isinstance(ours, Run) else ""
    return f"{name:12} {said} | {cells[0]} | {cells[1]} | {ratio}"


def _cell(run: Run) -> str:
    return (
        f"{run.tokens_per_second:9.2f} {run.prompt_seconds:9.2f} {run.bytes_per_token / 1e6:9.2f} {run.peak / 1e6:9.0f}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()

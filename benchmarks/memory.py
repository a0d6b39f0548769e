"""Peak memory of the stages on models that are large against it: profile with a limit, the others on fused experts.

python benchmarks/memory.py --folder /on/the/disk                                   # 2.5 GB of weights, twice
python benchmarks/memory.py --folder /on/the/disk --hidden 4096 --max-memory 4GB    # 10 GB

The first model is a random OPT, profiled without a limit and with one, whose traces must be the same. The second holds
all experts of a layer in two tensors, each many times a block: what `relayout`, `verify` and `restore` hold of them is
to be compared with 1 GiB and a block. "anonymous" leaves out what is mapped from files, which the system may drop at
any time. Linux only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from relayout_speed import write_random_placement

from neuralink_cli.files.header import build_header

_EXPERTS = 16
_WORDS = 20_000


@dataclass(frozen=True)
class Peak:
    """What a command took: seconds, and at most so many MiB."""

    seconds: float
    resident: float
    anonymous: float


def measure(*arguments: object) -> Peak:
    """Run a neuralink command as a process of its own and watch its memory."""
    started, resident, anonymous = time.perf_counter(), 0, 0
    process = subprocess.Popen(
        [sys.executable, "-m", "neuralink_cli", *map(str, arguments), "-q"], stdout=subprocess.DEVNULL
    )
    # Not the system's own account of the process: that starts with the memory of this one.
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident, anonymous = max(resident, _kib(status, "VmHWM")), max(anonymous, _kib(status, "RssAnon"))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{arguments} failed")
    return Peak(time.perf_counter() - started, resident / 1024, anonymous / 1024)


def _kib(status: str, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", status)
    return int(found[1]) if found else 0


def write_opt(folder: Path, hidden: int, layers: int) -> int:
    """A random OPT with a tokenizer of single words; returns the bytes of its weights."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=1000, hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=512, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, **{f"w{k}": k for k in range(2, 1000)}}, "</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder
    )
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_fused_experts(folder: Path, layers: int, neurons: int, hidden: int) -> tuple[int, int]:
    """A checkpoint of experts alone, in bfloat16; returns the bytes of its weights and of an expert."""
    folder.mkdir(parents=True)
    config = {"model_type": "granitemoe", "num_hidden_layers": layers, "num_local_experts": _EXPERTS}
    (folder / "config.json").write_text(json.dumps(config))
    stem = "model.layers.{}.block_sparse_moe."
    specs = [
        (stem.format(layer) + name, "BF16", shape)
        for layer in range(layers)
        for name, shape in (
            ("input_linear.weight", (_EXPERTS, 2 * neurons, hidden)),
            ("output_linear.weight", (_EXPERTS, hidden, neurons)),
        )
    ]
    header = build_header(specs, {"format": "pt"})
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header.prelude)
        for start in range(0, header.data_bytes, 1 << 26):
            file.write(random.bytes(min(1 << 26, header.data_bytes - start)))
    return header.data_bytes, 3 * neurons * hidden * 2


def print_row(name: str, peak: Peak, note: str = "") -> None:
    print(f"{name:34} {peak.seconds:8.1f} {peak.resident:13.0f} {peak.anonymous:14.0f}  {note}", flush=True)


def profile_rows(work: Path, options: argparse.Namespace) -> None:
    size = write_opt(work / "opt", options.hidden, options.layers)
    (work / "text.txt").write_text(" ".join(f"w{k * k % 997 + 2}" for k in range(_WORDS)))
    run = ("profile", work / "opt", "--dataset", work / "text.txt", "--num-samples", 0, "--max-tokens", 4096)
    plain = measure(*run, "-o", work / "plain")
    print_row(f"profile, {size / 1e9:.1f} GB", plain)
    limited = measure(*run, "-o", work / "limited", "--max-memory", options.max_memory)
    same = (work / "plain").read_bytes() == (work / "limited").read_bytes()
    ratio = f"{limited.seconds / plain.seconds:.2f} x the time, {'the same trace' if same else 'ANOTHER TRACE'}"
    print_row(f"  with --max-memory {options.max_memory}", limited, ratio)


def layout_rows(work: Path, options: argparse.Namespace) -> None:
    size, block = write_fused_experts(work / "moe", options.expert_layers, options.neurons, options.hidden)
    write_random_placement(work / "moe", work / "placement")
    limit = 1024 + block / 2**20
    write = ("relayout", work / "moe", "--placement", work / "placement", "-o")
    steps = {
        "relayout": (*write, work / "flash"),
        "verify": ("verify", work / "moe", work / "flash"),
        "restore": ("restore", work / "flash", "-o", work / "restored"),
        "relayout --layout permuted": (*write, work / "permuted", "--layout", "permuted"),
    }
    for name, arguments in steps.items():
        peak = measure(*arguments)
        print_row(f"{name}, {size / 1e9:.1f} GB", peak, f"{peak.resident / limit:.2f} of 1 GiB and a block")
    if (work / "restored/model.safetensors").read_bytes() != (work / "moe/model.safetensors").read_bytes():
        raise SystemExit("what was restored differs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to use")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12, help="of the OPT")
    parser.add_argument("--max-memory", default="1GB", help="for weights, in the second profile")
    parser.add_argument("--neurons", type=int, default=4096, help="of an expert")
    parser.add_argument("--expert-layers", type=int, default=3)
    options = parser.parse_args()
    work = options.folder.absolute() / "neuralink-memory"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        print(f"{'':34} {'s':>8} {'resident MiB':>13} {'anonymous MiB':>14}")
        profile_rows(work, options)
        layout_rows(work, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()

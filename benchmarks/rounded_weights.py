"""What rounding weights costs and gains: size, perplexity, KL divergence, and what the order is worth.

python benchmarks/rounded_weights.py examples/tiny-relu --calibration examples/text/calibration.txt \
    --text examples/text/heldout.txt
python benchmarks/rounded_weights.py MODEL --calibration wiki.txt --text held-out.txt --tokens 8192

Runs the commands as a user would: profile once; for every format cluster, relayout and `verify --forward`; `bench` with
a DRAM cache. The gain is over the original order read the same way, on each device, on held-out tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from neuralink_cli.activations.trace import Trace

# Format and rounding of each row. FINER stands for the rows that decide firing in q8_0, and the rest in a format.
ROWS = (
    ("source", "nearest"),
    ("q8_0", "nearest"),
    ("q8_0", "search"),
    ("q4_0", "nearest"),
    ("q4_0", "search"),
    ("iq4_nl", "search"),
    ("FINER q4_0", "nearest"),
    ("FINER q4_0", "search"),
    ("FINER iq4_nl", "search"),
)


def neuralink(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "neuralink_cli", *map(str, arguments), "-q", "--json"]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def gains(layout: Path, trace: Path, devices: list[str], dram: str) -> list[float]:
    """What the order of a layout is worth on each device, read with collapse and cache."""
    chosen = [option for device in devices for option in ("--device", device)]
    rows = neuralink("bench", layout, "--trace", trace, "--dram", dram, *chosen)["rows"]
    return [
        row["gain"]["value"]
        for row in rows
        if row["way"]["layout"] is not None and row["way"]["collapse"] and row["way"]["cache"] != "none"
    ]


def formats_of(row: str, trace: Path) -> str:
    """The option --weights of a row."""
    if not row.startswith("FINER "):
        return row
    rest = row.removeprefix("FINER ")
    with Trace(trace) as opened:
        block = opened.info.blocks[0]
        return ",".join(f"{role}={'q8_0' if role == block.firing_role else rest}" for role in block.part_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text to profile on")
    parser.add_argument("--text", type=Path, required=True, help="other text, to compare predictions on")
    parser.add_argument("--tokens", type=int, default=4096, help="of that text")
    parser.add_argument("--max-tokens", type=int, default=32768, help="of the calibration text")
    parser.add_argument("--active-ratio", type=float, help="for activations that are never exactly zero")
    parser.add_argument("--dram", default="20%")
    parser.add_argument("--device", action="append", default=[], help="may be repeated")
    options = parser.parse_args()
    devices = options.device or ["ufs4.0", "ufs3.1"]
    print(
        f"{'weights':<32}{'rounding':<9}{'MB':>8}{'bundle':>8}{'perplexity':>11}{'change':>8}{'KL':>9}{'99 % KL':>9}"
        f"{'same':>7}" + "".join(f"{device:>10}" for device in devices)
    )
    with tempfile.TemporaryDirectory(prefix="neuralink-rounded-") as folder:
        work = Path(folder)
        ratio = [] if options.active_ratio is None else ["--active-ratio", options.active_ratio]
        text = ["--dataset", options.calibration, "--num-samples", 0, "--max-tokens", options.max_tokens]
        neuralink("profile", options.model, *text, "-o", work / "trace", *ratio)
        perplexity = 0.0
        for number, (row_weights, rounding) in enumerate(ROWS):
            weights = formats_of(row_weights, work / "trace")
            placement, layout = work / f"placement-{number}", work / f"layout-{number}"
            neuralink("cluster", work / "trace", "-o", placement, "--resident", "gate", "--weights", weights)
            made = ("--weights", weights, "--rounding", rounding, "--resident", "gate")
            size = neuralink("relayout", options.model, "--placement", placement, "-o", layout, *made)["weight_bytes"]
            index = json.loads((layout / "model.flash.json").read_text())
            row = f"{weights:<32}{rounding:<9}{size / 1e6:>8.1f}{index['blocks'][0]['stride']:>8,}"
            if weights != "source":
                told = ("--forward", "--text", options.text, "--forward-tokens", options.tokens)
                found = neuralink("verify", options.model, layout, *told)["forward"]
                perplexity = found["perplexity"]
                row += (
                    f"{found['layout_perplexity']:>11.3f}{found['perplexity_increase']:>8.2%}{found['mean_kl']:>9.5f}"
                )
                row += f"{found['p99_kl']:>9.5f}{found['same_first_choice']:>7.1%}"
            else:
                row += f"{'':>11}{'':>8}{'':>9}{'':>9}{'':>7}"
            print(
                row + "".join(f"{gain:>10.2f}" for gain in gains(layout, work / "trace", devices, options.dram)),
                flush=True,
            )
        print(f"perplexity of the source: {perplexity:.3f}")


if __name__ == "__main__":
    main()

"""The stages that a model goes through, and the table in the docs that says which families go through which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.cli.entry import run
from tests.families import FAMILY
from tests.tiny_models import TEXT, build_model, write_images

TABLE = Path(__file__).parent.parent / "docs/supported.md"
# Experts that saw fewer tokens than this keep their order: some of the tiny models' do, some do not.
MIN_TOKENS = 100
LAYOUTS = {
    "bundled": (),
    "gate": ("--resident", "gate", "--alignment", "512"),
    "permuted": ("--layout", "permuted"),
}
STAGES = ("profile", "cluster", *(f"relayout {name}" for name in LAYOUTS), "verify", "forward", "restore", "run")


@dataclass(frozen=True)
class Stages:
    """A model, what was made of it, and the exit codes of the stages."""

    family: str
    model: Path
    placement: Path
    layouts: Mapping[str, Path]
    codes: Mapping[str, int]


def make_layouts(family: str, folder: Path, *, dtype: str = "float32", shards: bool = False) -> Stages:
    """Build the model of a family in `folder` and make every kind of layout of it."""
    model = build_model(folder / "model", family, dtype=dtype, shards=shards)
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    trace, placement = folder / "trace", folder / "placement"
    data = folder / "text.txt"
    data.write_text(TEXT)
    if FAMILY[family].task == "image-encoder":
        data = write_images(folder / "pictures")
    ratio = () if FAMILY[family].exact else ("--active-ratio", "0.3")
    codes = {
        "profile": stage("profile", model, "--dataset", data, "-o", trace, *ratio),
        "cluster": stage("cluster", trace, "-o", placement, "--min-tokens", MIN_TOKENS, "--effort", "fast"),
    }
    layouts = {name: folder / name for name in LAYOUTS}
    for name, options in LAYOUTS.items():
        codes[f"relayout {name}"] = stage("relayout", model, "--placement", placement, "-o", layouts[name], *options)
    return Stages(family, model, placement, layouts, codes)


def prove(made: Stages) -> dict[str, int]:
    """Verify every layout, compare what models compute, restore, and generate text where that is what a model does."""
    text, layouts = made.model.parent / "text.txt", made.layouts
    codes = {
        "verify": max(stage("verify", made.model, layout) for layout in layouts.values()),
        "forward": max(
            stage("verify", made.model, layouts[name], "--forward", "--text", text) for name in ("gate", "permuted")
        ),
        "restore": max(
            stage("restore", layout, "-o", made.model.parent / f"{name}-restored") for name, layout in layouts.items()
        ),
    }
    if FAMILY[made.family].task == "causal-lm":
        codes["run"] = generate(made)
    return codes


def generate(made: Stages) -> int:
    """Generate text with the weights in flash, and compare with the dense model."""
    return stage(
        "run", made.layouts["gate"], "--prompt", "The river rises", "--max-new-tokens", 12, "--dram", "20%",
        "--compare", made.model,
    )  # fmt: skip


def stage(*arguments: object) -> int:
    """The exit code of a command."""
    return run([*map(str, arguments), "-q"])


def render(codes: Mapping[str, Mapping[str, int]]) -> str:
    """The table for all families, from the exit codes of their stages."""
    rows = [["model type", "as", "task", *STAGES], ["---"] * (3 + len(STAGES))]
    for name, of_family in codes.items():
        family = FAMILY[name]
        kind = family.renamed or family.model_type
        cells = [_cell(of_family.get(stage_name)) for stage_name in STAGES]
        rows.append([f"`{kind}`", "" if name == kind else name, family.task, *cells])
    return PREFACE + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _cell(code: int | None) -> str:
    return "" if code is None else "yes" if code == 0 else "no"


PREFACE = """\
# What is supported

Supported architectures, and the stages each is tested in. `make docs` generates this page from the test results; do not
edit it. For every row, the tests build a tiny random model with transformers, save it and take it through all stages.
They compare the recorded bits, the layouts and the outputs with what transformers computes. Many more model types have
the FFN of one of these; [the last section](#all-model-types-of-transformers) says what becomes of every one.

- "as" is the name of the variant, if it differs from the model type.
- "forward" compares the outputs of the original and of the layout (`verify --forward`).
- "run" generates text with the FFN weights in flash and compares it with the dense model, for `causal-lm` models only.

`minicpm` (MiniCPM, MiniCPM-S) is also known. Profiling it needs the code that comes with the model
(`--trust-remote-code`). `sparsellama` (ProSparse) and `bamboo` (TurboSparse-Mistral) do not need their own code.
`deepseek_v4` is tested with the names of tensors that its checkpoints on the hub have: transformers 5.24 cannot load
what it saves of that model, so the sweep of the last section cannot either. `gpt_oss` is also tested as MXFP4.

"""

"""Sends the smallest model of every text model type of transformers through all stages: `make sweep`.

`python -m tests.long.sweep_architectures --only llama bert` runs some types and prints what came out; all of them, with
`--output`, make the data file from which docs/supported.md gets its last section. A type passes if its layouts verify
and its permuted model computes what the original does; it is refused if a stage says why it cannot be done. Anything
else is wrong. A type without a built-in description is also tried with --infer-architecture.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tests.swept import Swept, write
from tests.tiny_models import TEXT

# Exit codes with which a stage says that it cannot be done, and why.
_REFUSALS = (2, 3, 4)
# Permuted matrices are summed in another order.
_TOLERANCE = 1e-4


def model_types() -> dict[str, str]:
    """Every model type of transformers that is made of text alone or can do with it, and its task."""
    from transformers.models.auto import modeling_auto as auto

    found = dict.fromkeys(auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, "encoder")
    found |= dict.fromkeys(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal-lm")
    found |= dict.fromkeys(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "encoder")
    found |= dict.fromkeys(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "seq2seq")
    return dict(sorted(found.items()))


def sweep(model_type: str, task: str, folder: Path) -> Swept:
    """Build the smallest model of a type in `folder` and send it through the stages."""
    from neuralink_cli.architectures.architecture import is_built_in
    from tests.smallest_models import NotBuiltError, build_smallest

    model = folder / "model"
    try:
        build_smallest(model, model_type, task)
    except NotBuiltError as error:
        return Swept(model_type, task, "not built", str(error))
    (folder / "text.txt").write_text(TEXT)
    outcome, words = _stages(model, model_type, task, folder / "own")
    # Of models of images and text, what is built may be the text model, with a type of its own.
    if is_built_in(json.loads((model / "config.json").read_text())["model_type"]) or outcome != "refused":
        return Swept(model_type, task, outcome, words)
    inferred, why = _stages(model, model_type, task, folder / "inferred", "--infer-architecture")
    return Swept(model_type, task, outcome, words, inferred, why)


def _stages(model: Path, model_type: str, task: str, folder: Path, *options: str) -> tuple[str, str]:
    """The outcome of all stages for a model, and words."""
    folder.mkdir()
    trace, placement, bundled, permuted = (folder / name for name in ("trace", "placement", "bundled", "permuted"))
    text = model.parent / "text.txt"
    commands: tuple[tuple[object, ...], ...] = (
        ("profile", model, "--dataset", text, "-o", trace, "--active-ratio", "0.3", *options),
        ("cluster", trace, "-o", placement, "--min-tokens", 20),
        ("relayout", model, "--placement", placement, "-o", bundled, *options),
        ("relayout", model, "--placement", placement, "-o", permuted, "--layout", "permuted", *options),
        ("verify", model, bundled),
        ("verify", model, permuted, "--forward", "--text", text, *options),
    )
    for command in commands:
        code, said = _run(command)
        words = said.replace(f"{model}: ", "").replace(f"{model.parent}/", "")
        if "Traceback" in words:
            return "wrong", f"{command[0]}: {words.strip().splitlines()[-1]}"
        if code:
            line = words.strip().splitlines()[-1].removeprefix("neuralink: error: ") if words.strip() else ""
            refused = code in _REFUSALS and line
            return ("refused", line) if refused else ("wrong", f"{command[0]} exits {code}: {line}")
    return _compared(model, permuted, model_type, task)


def _compared(model: Path, permuted: Path, model_type: str, task: str) -> tuple[str, str]:
    """Whether transformers computes the same with the permuted model, which must be another one."""
    import torch
    from safetensors.torch import load_file

    from tests.smallest_models import first_output, model_class

    moved = 0
    for path in model.glob("*.safetensors"):
        before, after = load_file(path), load_file(permuted / path.name)
        moved += sum(not torch.equal(before[name].reshape(-1), after[name].reshape(-1)) for name in before)
    if not moved:
        return "wrong", "the permuted model is the original"
    auto = model_class(model_type, task)
    # The models' own noise in evaluation, if they have any, is the same for both.
    outputs = []
    for directory in (model, permuted):
        torch.manual_seed(0)
        outputs.append(first_output(auto.from_pretrained(directory, dtype=torch.float32).eval(), task))
    difference = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
    if not difference <= _TOLERANCE:
        return "wrong", f"the permuted model computes something else (by {difference:.2g} of the largest output)"
    return "pass", ""


def _run(command: tuple[object, ...]) -> tuple[int, str]:
    from neuralink_cli.cli.entry import run

    said = io.StringIO()
    logging.getLogger("neuralink_cli").handlers.clear()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run([*map(str, command), "-q"])
    return code, said.getvalue()


def _warm_up() -> None:
    """Import and compile once what every child needs, and leave it out of their garbage collections."""
    import torch
    import transformers

    # No thread may be running when the process is forked.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        sweep("llama", "causal-lm", Path(folder))
    gc.freeze()


def _child(model_type: str, task: str, result: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        swept = sweep(model_type, task, Path(folder))
    Path(result).write_text(json.dumps(asdict(swept)))


def in_subprocesses(types: dict[str, str], timeout: float) -> Iterator[Swept]:
    """Sweep types one after the other, each in a process of its own that is stopped after `timeout` seconds."""
    context = multiprocessing.get_context("fork")
    _warm_up()
    with tempfile.TemporaryDirectory() as folder:
        for model_type, task in types.items():
            result = Path(folder) / "result.json"
            result.unlink(missing_ok=True)
            process = context.Process(target=_child, args=(model_type, task, str(result)))
            process.start()
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
                yield Swept(model_type, task, "wrong", f"takes more than {timeout:g} seconds")
            elif result.exists():
                yield Swept(**json.loads(result.read_text()))
            else:
                yield Swept(model_type, task, "wrong", f"its process ended with {process.exitcode}")


def main() -> int:
    """Sweep, print a line per type, and write the data file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="not all model types, but these")
    parser.add_argument("--timeout", type=float, default=120, help="seconds per type")
    parser.add_argument("--output", type=Path, help="the data file to write")
    options = parser.parse_args()
    types = model_types()
    if options.only:
        types = {name: types.get(name, "causal-lm") for name in options.only}
    began = time.monotonic()
    swept: list[Swept] = []
    for one in in_subprocesses(types, options.timeout):
        swept.append(one)
        inferred = f"; inferred: {one.inferred} {one.inferred_words}" if one.inferred else ""
        _say(f"{one.model_type}: {one.outcome} {one.words}{inferred}")
    counts = Counter(one.outcome for one in swept)
    _say(f"{len(swept)} types in {time.monotonic() - began:.0f} s: {dict(counts)}")
    if options.output is not None:
        import transformers

        write(options.output, transformers.__version__, swept)
    return 1 if any("wrong" in (one.outcome, one.inferred) for one in swept) else 0


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())

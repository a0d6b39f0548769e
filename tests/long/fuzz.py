"""The long run of the fuzzing harness: `make fuzz`, or `python -m tests.long.fuzz --cases 20000 --seed 1`."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzzing import World, cases, check_case


def main() -> int:
    """Run the cases, print every problem, and a table of what was run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    done: collections.Counter[str] = collections.Counter()
    wrong: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        silent = io.StringIO()
        with contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
            world = World.create(Path(folder) / "world")
        for number, (kind, random) in enumerate(cases(options.seed, options.cases)):
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                problems = check_case(world, Path(folder) / f"case-{number}", kind, random)
            long = [line for line in said.getvalue().splitlines() if len(line) > 500]
            done[kind] += 1
            wrong[kind] += bool(problems or long)
            for problem in [*problems, *(f"{kind}: a line of {len(line)} characters" for line in long)]:
                print(f"case {number}: {problem}\n{said.getvalue()[-600:]}", flush=True)  # noqa: T201
    for kind, count in done.items():
        print(f"| {kind} | {count:,} | {wrong[kind]} |")  # noqa: T201
    print(f"{sum(done.values()):,} cases in {time.monotonic() - began:.0f} s, {sum(wrong.values())} wrong")  # noqa: T201
    return 1 if wrong.total() else 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes docs/supported.md by taking a tiny model of every family through all stages; takes a few minutes.

Its last section is what `make sweep` left in docs/model_types.json.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import swept
from tests.stages import TABLE, make_layouts, prove, render
from tests.tiny_models import FAMILIES


def main() -> None:
    """Run everything and write the file."""
    codes = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            made = make_layouts(family, Path(folder))
            codes[family] = {**made.codes, **prove(made)}
    TABLE.write_text(render(codes) + "\n" + swept.render(*swept.read()), encoding="utf-8")


if __name__ == "__main__":
    main()

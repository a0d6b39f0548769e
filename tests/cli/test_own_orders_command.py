"""`cluster --order-from`, and names of orders that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from neuralink_cli.cli.exit_codes import INPUT, USAGE
from tests.cli.conftest import Neuralink
from tests.traces import write_clustered_trace


def test_the_command(neuralink: Neuralink, tmp_path: Path) -> None:
    write_clustered_trace(tmp_path / "t", neurons=60)
    rng = np.random.default_rng(3)
    save_file({f"layers.{k}": rng.permutation(60) for k in range(3)}, tmp_path / "o.safetensors")
    common = ("cluster", tmp_path / "t", "-o", tmp_path / "p", "--effort", "fast")
    done = neuralink(*common, "--order-from", tmp_path / "o.safetensors")
    assert done.code == 0
    assert "imported" in done.stdout
    assert neuralink(*common, "--overwrite", "--order", "imported").code == USAGE
    wrong = neuralink(*common, "--overwrite", "--order", "refind")
    assert wrong.code == USAGE
    assert "refined" in wrong.stderr
    assert neuralink(*common, "--overwrite", "--order-from", tmp_path / "absent.npz").code == INPUT

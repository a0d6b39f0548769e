"""Which data a dataset is, without reading its rows: by the digest of its files, or the commit of the hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

from neuralink_cli.calibration.local_rows import SUFFIXES, file_type
from neuralink_cli.calibration.rows import HUB_ID, local_name
from neuralink_cli.checkpoint.hub import find_dataset
from neuralink_cli.errors import InputError
from neuralink_cli.files.input_file import digest_of, require_reachable
from neuralink_cli.files.json_text import canonical


def identify_dataset(dataset: str) -> dict[str, str]:
    """The name of a dataset, and `sha256` of a local file or folder, or `revision`, the commit of a hub dataset.

    The folder that a local file lies in does not count. A folder's digest is of its files' names and digests.

    Raises:
        InputError: There is no such file or dataset, or it cannot be read.
        MissingDependencyError: It is a hub dataset, and huggingface_hub is not installed.
    """
    path = Path(dataset)
    require_reachable(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if not file.is_dir())
        listed = [[local_name(file.relative_to(path)), digest_of(file)] for file in files]
        return {"name": local_name(path.absolute()), "sha256": hashlib.sha256(canonical(listed).encode()).hexdigest()}
    if path.exists():
        return {"name": local_name(path), "sha256": digest_of(path)}
    parts = HUB_ID.fullmatch(dataset)
    if parts is None or file_type(path) in SUFFIXES:
        raise InputError("no such file", where=dataset, fix="check its path")
    return {"name": dataset, "revision": find_dataset(parts["id"], parts["revision"]).revision}

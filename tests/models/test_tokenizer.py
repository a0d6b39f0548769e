from __future__ import annotations

from pathlib import Path

import pytest

from neuralink_cli.errors import InputError
from neuralink_cli.models.tokenizer import load_tokenizer
from tests.conftest import ModelFactory


def test_a_tokenizer_that_was_not_fetched_is_named(model: ModelFactory, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in model("opt").iterdir() if path.suffix == ".json"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(InputError, match=r"tokenizer\.json: is a Git LFS pointer, not the file itself; fetch it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("../blobs/00")
    with pytest.raises(InputError, match=r"tokenizer\.json: is a link to \.\./blobs/00, which does not exist"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("lacking", [("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json")])
def test_a_checkpoint_without_a_tokenizer_says_so(
    model: ModelFactory, tmp_path: Path, family: str, lacking: tuple[str, ...]
) -> None:
    for path in model(family).glob("*.json"):
        if path.name not in lacking:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"has no tokenizer \(tokenizer\.json\); put the files of the tokenizer"):
        load_tokenizer(tmp_path)

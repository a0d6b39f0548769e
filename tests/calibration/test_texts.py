from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.calibration.texts import CorpusOptions, Sample, open_corpus
from neuralink_cli.errors import InputError, MissingDependencyError, NeuralinkError, UnsupportedError
from tests.conftest import ModelFactory


def texts(dataset: Path | str, **options: Any) -> list[str]:
    return [sample.text for sample in open_corpus(str(dataset), CorpusOptions(**options), None)]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".csv":
            import pandas

            pandas.DataFrame(rows).to_csv(path, index=False)
        case ".parquet":
            import pandas

            pandas.DataFrame(rows).to_parquet(path)
    return path


TABLES = (".json", ".jsonl", ".csv", ".parquet")
ROWS: list[dict[str, Any]] = [
    {"text": "one", "label": 1},
    {"text": "two\nlines, and a comma", "label": 2},
    {"text": "", "label": 3},
    {"text": "nul", "label": 4},
]


@pytest.mark.parametrize("suffix", TABLES)
def test_rows_of_every_file_type(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", ROWS)
    corpus = open_corpus(str(path), CorpusOptions(), None)
    assert list(corpus) == [Sample("one"), Sample("two\nlines, and a comma"), Sample("nul")]
    assert list(corpus) == list(corpus)
    assert corpus.name == f"rows{suffix}"


def test_csv_values_are_not_interpreted(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,b\nNA,1\nnull,2\nNaN,3\n")
    assert texts(path) == ["NA", "null", "NaN"]


def test_text_lines_continue_each_other(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"a\n\nb \r\nlast")
    assert list(open_corpus(str(path), CorpusOptions(), None)) == [
        Sample("a\n"),
        Sample("\n", continues=True),
        Sample("b \n", continues=True),
        Sample("last", continues=True),
    ]


def test_num_samples_does_not_count_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a\n\n \nb\nc\n")
    assert texts(path, num_samples=2) == ["a\n", "\n", " \n", "b\n"]
    assert texts(write_rows(tmp_path / "x.jsonl", ROWS), num_samples=3)[-1] == "nul"


def test_columns_are_joined(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Sort", "input": "b, a", "output": "a, b"},
        {"instruction": "Greet", "input": "", "output": "Hello"},
        {"instruction": None, "input": None, "output": None},
    ]
    for suffix in (".json", ".jsonl", ".parquet"):
        path = write_rows(tmp_path / f"alpaca{suffix}", rows)
        columns = ("instruction", "input", "output", "nothing")
        assert texts(path, text_columns=columns) == ["Sort\nb, a\na, b", "Greet\nHello"]


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_seed_shuffles_and_repeats(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lines = [f"line {i}" for i in range(200)]
    path.write_text("\n".join(lines if name == "x.txt" else [json.dumps({"text": line}) for line in lines]))
    shuffled = open_corpus(str(path), CorpusOptions(seed=3), None)
    first = [sample.text.strip() for sample in shuffled]
    assert first == [sample.text.strip() for sample in shuffled]
    assert first != lines
    assert sorted(first) == sorted(lines)
    assert first != [text.strip() for text in texts(path, seed=4)]
    # Lines that come in another order do not continue each other.
    assert not any(sample.continues for sample in shuffled)


def test_messages_go_through_the_chat_template(model: ModelFactory, tmp_path: Path) -> None:
    from neuralink_cli.models.tokenizer import load_tokenizer

    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "extra": 1}]},
        {"messages": [{"role": "user", "content": "Bye"}]},
    ]
    path = write_rows(tmp_path / "chat.jsonl", rows)
    tokenizer = load_tokenizer(model("qwen2"))
    samples = list(open_corpus(str(path), CorpusOptions(), tokenizer))
    assert samples == [
        Sample("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n", templated=True),
        Sample("<|im_start|>user\nBye<|im_end|>\n", templated=True),
    ]
    assert list(open_corpus(str(path), CorpusOptions(text_columns=("messages",)), tokenizer)) == samples
    with pytest.raises(InputError, match="chat template, and the model's tokenizer has none"):
        open_corpus(str(path), CorpusOptions(), load_tokenizer(model("gpt2")))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"line 1 the chat template fails .roles must alternate"):
        open_corpus(str(path), CorpusOptions(), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("x.txt", b"", InputError, "is empty; pass a file with data in it"),
        ("x.jsonl", b"", InputError, "is empty"),
        ("x.json", b"[]", InputError, "has no rows"),
        ("x.csv", b"text\n", InputError, "has no rows"),
        ("x.txt", b"\n \n", InputError, "has no text in it; pass a file with text"),
        ("x.jsonl", b'{"text": ""}\n', InputError, "has no text in it"),
        ("x.jsonl", b'{"body": "a", "n": 1}\n', InputError, "no column 'text', its columns are 'body', 'n'; .*--text-"),
        ("x.jsonl", b'{"text": ["a"]}\n', InputError, r"1 of 1 rows .*line 1 holds list in column 'text', not text"),
        ("x.jsonl", b'{"text": "a"\n', InputError, "1 of 1 rows cannot be read .line 1 is not JSON .Expecting"),
        ("x.json", b'[{"text": "a"}, {"text"]', InputError, "is not JSON, in row 2 .Expecting ':'"),
        ("x.json", b'[{"text": "a"}, ', InputError, "is not JSON .its array is cut off after row 1"),
        ("x.json", b'[{"text": "a"} {"text": "b"}]', InputError, "no comma or end of the array after row 1"),
        ("x.json", b"[" * 100_000, InputError, "is not JSON, in row 1"),
        ("x.txt", b"a\xff\n", InputError, "is not UTF-8 text .byte 0xff"),
        ("x.parquet", b"PAR1 not", InputError, "cannot be read as Parquet"),
        ("x.md", b"a", UnsupportedError, r"is not one of the calibration data types \.txt"),
    ],
)
def test_data_that_cannot_be_used(
    tmp_path: Path, name: str, content: bytes, error: type[NeuralinkError], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        texts(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)
    assert len(str(caught.value)) < 400


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        texts(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="no such file"):
        texts("missing.txt")
    with pytest.raises(InputError, match="is a directory"):
        texts(tmp_path)


def test_names_that_look_like_patterns(tmp_path: Path) -> None:
    (tmp_path / "a[1]*.txt").write_text("this one\n")
    (tmp_path / "a1.txt").write_text("not this\n")
    assert texts(tmp_path / "a[1]*.txt") == ["this one\n"]


def test_local_files_leave_no_trace_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert texts(write_rows(tmp_path / "x.jsonl", ROWS))
    assert not (tmp_path / "cache").exists()


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(MissingDependencyError, match=r"pip install 'neuralink-cli\[hf\]'") as caught:
        texts(tmp_path / "x.txt")
    assert isinstance(caught.value, NeuralinkError)

"""Rows of messages through a chat template: parts, tools, nulls of tables, ShareGPT, and rows of mixed kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neuralink_cli.calibration.texts import CorpusOptions, Sample, open_corpus
from neuralink_cli.errors import InputError
from neuralink_cli.models.tokenizer import load_tokenizer
from tests.conftest import ModelFactory

TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}"
    "{% for t in m.tool_calls or [] %} CALL {{ t.function.name }} {{ t.function.arguments | tojson }}{% endfor %}"
    "{{ '\\n' }}{% endfor %}"
)
PARTS_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
)


def say(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def call(name: str, **arguments: str | None) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def tool(name: str, *parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": "string"} for parameter in parameters}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def shared(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": value} for speaker, value in turns]


@pytest.fixture(scope="module")
def tokenizer(model: ModelFactory) -> Any:
    loaded = load_tokenizer(model("qwen2"))
    loaded.chat_template = TEMPLATE
    return loaded


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        columns = dict.fromkeys(key for row in rows for key in row)
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), path)
    return path


KINDS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "text or messages": (
        [{"text": "plain"}, {"messages": [say("user", "hello")]}, {"messages": [say("user", "more")]}],
        ["plain", "<user> hello\n", "<user> more\n"],
    ),
    "text and messages": ([{"text": "a title", "messages": [say("user", "hello")]}], ["a title"]),
    "the first row null": ([{"messages": None}, {"messages": [say("user", "hello")]}], ["<user> hello\n"]),
    "content in parts": (
        [{"messages": [say("user", [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}])]}],
        ["<user> hello\n"],
    ),
    "tools": (
        [
            {
                "messages": [say("user", "weather?"), say("assistant", "", tool_calls=call("weather", city="Paris"))],
                "tools": [tool("weather", "city")],
            },
            {
                "messages": [say("assistant", "", tool_calls=call("stock", ticker="X", market="NYSE"))],
                "tools": [tool("stock", "ticker", "market")],
            },
        ],
        [
            f"TOOLS {json.dumps([tool('weather', 'city')])}\n<user> weather?\n"
            '<assistant>  CALL weather {"city": "Paris"}\n',
            f"TOOLS {json.dumps([tool('stock', 'ticker', 'market')])}\n"
            '<assistant>  CALL stock {"ticker": "X", "market": "NYSE"}\n',
        ],
    ),
    "tools as JSON": (
        [{"messages": [say("user", "hi")], "tools": json.dumps([tool("t", "p")])}],
        [f"TOOLS {json.dumps([tool('t', 'p')])}\n<user> hi\n"],
    ),
    "messages as JSON": ([{"messages": json.dumps([say("user", "hi")])}], ["<user> hi\n"]),
    "ShareGPT": (
        [{"conversations": shared(("system", "Be kind."), ("human", "hello"), ("gpt", "hi"), ("human", "bye"))}],
        ["<system> Be kind.\n<user> hello\n<assistant> hi\n<user> bye\n"],
    ),
    "conversations with roles": ([{"conversations": [say("user", "hello")]}], ["<user> hello\n"]),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind(tokenizer: Any, tmp_path: Path, kind: str, suffix: str) -> None:
    rows, expected = KINDS[kind]
    path = write(tmp_path / f"rows{suffix}", rows)
    found = list(open_corpus(str(path), CorpusOptions(), tokenizer))
    if kind == "tools" and suffix == ".parquet":
        # A table has the keys of its objects in one order for all rows.
        assert [json.loads(sample.text.splitlines()[0][6:]) for sample in found] == [row["tools"] for row in rows]
        calls = [json.loads(sample.text.rsplit(" {", 1)[1].join(["{", ""])) for sample in found]
        assert calls == [{"city": "Paris"}, {"ticker": "X", "market": "NYSE"}]
    else:
        assert [sample.text for sample in found] == expected
    assert [sample.templated for sample in found] == [text.startswith(("<", "TOOLS")) for text in expected]
    drawn = list(open_corpus(str(path), CorpusOptions(seed=1), tokenizer))
    assert sorted(drawn, key=repr) == sorted(found, key=repr)


def test_nulls_of_a_json_file_are_meant(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [say("assistant", "", name=None, tool_calls=call("f", a=None))]}]
    (found,) = open_corpus(str(write(tmp_path / "rows.jsonl", rows)), CorpusOptions(), tokenizer)
    assert found == Sample('<assistant>  CALL f {"a": null}\n', templated=True)


def test_a_column_of_messages_that_is_asked_for_comes_before_text(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "a title", "messages": [say("user", "hello")]}])
    corpus = open_corpus(str(path), CorpusOptions(text_columns=("messages",)), tokenizer)
    assert [sample.text for sample in corpus] == ["<user> hello\n"]
    assert corpus.columns == ("messages",)


def test_a_template_that_takes_parts_gets_parts(model: ModelFactory, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model("qwen2"))
    tokenizer.chat_template = PARTS_TEMPLATE
    rows = [{"messages": [say("user", "hello")]}, {"messages": [say("user", [{"type": "text", "text": "more"}])]}]
    corpus = open_corpus(str(write(tmp_path / "rows.jsonl", rows)), CorpusOptions(), tokenizer)
    assert [sample.text for sample in corpus] == ["<user>hello\n", "<user>more\n"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [say("user", [{"type": "image", "url": "x"}])]}, "holds a part of type 'image', not text"),
        ({"messages": [say("user", 5)]}, "a message holds int, not text"),
        ({"messages": "[not JSON"}, "column 'messages' is not JSON"),
        ({"messages": {"role": "user"}}, "column 'messages' is not a list of messages"),
        ({"messages": [["user", "hi"]]}, "column 'messages' is not a list of messages"),
        ({"conversations": shared(("alien", "x"))}, "a message is from 'alien', which is not one of human"),
        ({"conversations": [{"who": "x"}]}, "a message has neither role nor from and value, but 'who'"),
        ({"messages": [say("user", "x")], "tools": "{"}, "column 'tools' is not JSON"),
    ],
)
def test_conversations_that_cannot_be_read(tokenizer: Any, tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=f"1 of 1 rows cannot be read .line 1 .*{reason}"):
        open_corpus(str(write(tmp_path / "rows.jsonl", [row])), CorpusOptions(), tokenizer)

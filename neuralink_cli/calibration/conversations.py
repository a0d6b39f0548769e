"""Conversations as text: rows of `messages` or `conversations` through a tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from neuralink_cli.errors import first_line

MESSAGES, CONVERSATIONS, TOOLS = "messages", "conversations", "tools"
CHAT_COLUMNS = (MESSAGES, CONVERSATIONS)
# What ShareGPT and its likes call those who speak.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_MARK = "neuralink looks for this"


class RowError(Exception):
    """A row that no text can be made of; the message says why."""


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._takes_parts: bool | None = None

    @property
    def exists(self) -> bool:
        """Whether the tokenizer has one."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def render(self, row: Mapping[str, Any], column: str, *, added_nulls: bool) -> str:
        """The text of the conversation in a column of a row, with the row's `tools` if it has any.

        Args:
            added_nulls: The row is of a table, in which every object has the keys of all others: those that it was not
                given are null. Without it only the nulls of a message itself are taken for "not given".

        Raises:
            RowError: It is none, or the template cannot take it.
        """
        messages = [self._message(message) for message in _objects(_given(row[column], added_nulls), column)]
        tools = _given(row.get(TOOLS), added_nulls)
        if isinstance(tools, str):
            tools = _parsed(tools, TOOLS)
        try:
            return self._apply(messages, tools or None)
        except Exception as error:
            raise RowError(f"the chat template fails ({first_line(error)})") from None

    def _apply(self, messages: list[dict[str, Any]], tools: Any = None) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        given = {key: value for key, value in message.items() if value is not None}
        if "role" not in given:
            given = _named_as_usual(given)
        content = given.get("content")
        if isinstance(content, list):
            texts = [_part_text(part) for part in content]
            given["content"] = [{"type": "text", "text": text} for text in texts] if self._parts else "".join(texts)
        elif isinstance(content, str) and self._parts:
            given["content"] = [{"type": "text", "text": content}]
        elif content is not None and not isinstance(content, str):
            raise RowError(f"a message holds {type(content).__name__}, not text")
        return given

    @property
    def _parts(self) -> bool:
        """Whether the template takes the text of a message only as a list of parts, as some for images do."""
        if self._takes_parts is None:
            plain, parts = (self._shows(content) for content in (_MARK, [{"type": "text", "text": _MARK}]))
            self._takes_parts = parts and not plain
        return self._takes_parts

    def _shows(self, content: Any) -> bool:
        try:
            return _MARK in self._apply([{"role": "user", "content": content}])
        except Exception:
            return False


def _objects(value: Any, column: str) -> list[Mapping[str, Any]]:
    found = _parsed(value, column) if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise RowError(f"column {column!r} is not a list of messages")
    return found


def _parsed(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"column {column!r} is not JSON ({first_line(error)})") from None


def _named_as_usual(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of ShareGPT, `from` and `value`, with `role` and `content`."""
    speaker = message.get("from")
    if not isinstance(speaker, str) or "value" not in message:
        raise RowError(f"a message has neither role nor from and value, but {', '.join(map(repr, message))}")
    role = _ROLES.get(speaker.lower())
    if role is None:
        raise RowError(f"a message is from {speaker!r}, which is not one of {', '.join(_ROLES)}")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": role, "content": message["value"], **others}


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RowError(f"a message holds a part of type {kind!r}, not text")


def _given(value: Any, added_nulls: bool) -> Any:
    """A value without the keys that are null, however deep they lie."""
    if not added_nulls:
        return value
    if isinstance(value, Mapping):
        return {key: _given(item, added_nulls) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_given(item, added_nulls) for item in value]
    return value

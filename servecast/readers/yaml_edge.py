"""YAML as people write requests: plain values, mappings and lists, nothing that a stranger's file could abuse.

PyYAML's parser gives the events, this module builds the value from them. Scalars follow the core schema of YAML 1.2
(yaml.org/spec/1.2.2, section 10.3.2), not PyYAML's YAML 1.1: ``on``, ``yes``, ``1:30``, ``1_000`` and dates are text,
``010`` is ten, ``1e3`` is a number. Keys are text whatever they look like, as in JSON: ``4090:`` is ``"4090"``.

Anchors, aliases, tags, repeated keys and a second document are refused, so the value is never larger than its text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 20
_MAX_DIGITS: Final = 400
"""More than any finite double needs; Python itself refuses to convert some thousands."""

_NULL: Final = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT: Final = re.compile(r"[-+]?[0-9]+")
_BASED: Final = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL: Final = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def load_yaml(text: str, *, name: str) -> object:
    """Value of the one document in `text`: dict (keys are str), list, str, int, float, bool or None.

    Parameters
    ----------
    text : at most 1 MiB as UTF-8, mappings and lists nested at most 20 deep.
    name : of the file, for messages.

    Raises
    ------
    ValueError
        One line: name, line, what is wrong.

    >>> load_yaml("{on: yes, 4090: 1e3, at: 1:30}", name="request.yaml")
    {'on': 'yes', '4090': 1000.0, 'at': '1:30'}
    """
    # The first comparison spares the encoding of a text that is too long in any case.
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ValueError(f"{name}: is longer than 1 MiB")
    builder = _Builder(name)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.take(event)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{name} line {line}: is not text (character {_code(error.character)})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = name if mark is None else f"{name} line {mark.line + 1}"
        raise ValueError(f"{place}: is not valid YAML ({error.problem or error.context})") from None
    return builder.value


def _code(character: str | int | bytes) -> str:
    """Code point of what the reader refused, which it gives as a number or as a character."""
    number = character if isinstance(character, int) else ord(character)
    return f"U+{number:04X}"


@dataclass(slots=True)
class _Open:
    """A mapping or a list whose end is not read yet."""

    value: dict[str, Any] | list[Any]
    key: str | None = None
    """Key that waits for its value."""
    lines: dict[str, int] = field(default_factory=dict)
    """Line of every key so far."""


class _Builder:
    """Events of one document into its value, without recursion."""

    def __init__(self, name: str) -> None:
        self.value: object = None
        self._name = name
        self._open: list[_Open] = []
        self._documents = 0

    def take(self, event: yaml.Event) -> None:
        line = 0 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise self._refusal(line, f"aliases are not allowed, got *{_cut(event.anchor)}; write the value out")
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            raise self._refusal(line, f"anchors are not allowed, got &{_cut(event.anchor)}; write the value out")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            raise self._refusal(line, f"tags are not allowed, got {_cut(event.tag)}")
        match event:
            case yaml.DocumentStartEvent():
                self._start_document(event, line)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._start_collection({} if isinstance(event, yaml.MappingStartEvent) else [], line)
            case yaml.CollectionEndEvent():
                self._open.pop()
            case yaml.ScalarEvent():
                self._scalar(event, line)

    def _start_document(self, event: yaml.DocumentStartEvent, line: int) -> None:
        self._documents += 1
        if self._documents > 1:
            raise self._refusal(line, "a second document is not allowed")
        if event.tags:
            raise self._refusal(line, "tags are not allowed, got a %TAG directive")

    def _start_collection(self, value: dict[str, Any] | list[Any], line: int) -> None:
        if len(self._open) >= MAX_DEPTH:
            raise self._refusal(line, f"is nested deeper than {MAX_DEPTH} levels")
        self._place(value, line)
        self._open.append(_Open(value))

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> None:
        parent = self._open[-1] if self._open else None
        if parent is not None and isinstance(parent.value, dict) and parent.key is None:
            self._key(parent, event.value, line)
        elif event.style:  # quoted or a block
            self._place(event.value, line)
        else:
            self._place(self._plain(event.value, line), line)

    def _key(self, parent: _Open, key: str, line: int) -> None:
        if key in parent.lines:
            raise self._refusal(line, f"key {_cut(key)!r} is given twice, first on line {parent.lines[key]}")
        parent.key, parent.lines[key] = key, line

    def _place(self, value: object, line: int) -> None:
        if not self._open:
            self.value = value
            return
        parent = self._open[-1]
        if isinstance(parent.value, list):
            parent.value.append(value)
        elif parent.key is None:
            raise self._refusal(line, "a key must be text, got a mapping or a list")
        else:
            parent.value[parent.key] = value
            parent.key = None

    def _plain(self, text: str, line: int) -> str | int | float | bool | None:
        """A scalar without quotes, by the core schema."""
        if text in _NULL:
            return None
        if text in _BOOL:
            return _BOOL[text]
        if _BASED.fullmatch(text):
            return int(text, 0)
        if _FLOAT.fullmatch(text):
            if len(text) > _MAX_DIGITS:
                raise self._refusal(line, f"a number must have at most {_MAX_DIGITS} digits, got {len(text)}")
            return int(text) if _INT.fullmatch(text) else float(text)
        return float(text.replace(".", "")) if _SPECIAL.fullmatch(text) else text

    def _refusal(self, line: int, message: str) -> ValueError:
        return ValueError(f"{self._name} line {line}: {message}")


def _cut(name: str | None) -> str:
    text = name or ""
    return text if len(text) <= 60 else text[:57] + "..."

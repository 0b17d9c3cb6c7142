"""What every versioned document shares: the rules of its parts, JSON in and out, and refusals of one line.

A document is an immutable pydantic model whose ``schema`` field names its kind and major version. A refusal names the
document, the field, the rule and the value, on one line of printable text whatever the input held.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, NoReturn, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Tokens = Annotated[int, Field(ge=1, le=1_000_000_000, strict=True)]
Finite = Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False, strict=True)]
Text = Annotated[str, Field(min_length=1, max_length=500, strict=True)]


class Document(BaseModel):
    """Rules that every part of a document shares: immutable, no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True)


D = TypeVar("D", bound=Document)


class Interval(Document):
    """A predicted value with its 90 % interval."""

    value: Finite
    lo: Finite
    hi: Finite

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.lo <= self.value <= self.hi:
            raise ValueError(f"lo <= value <= hi must hold, got {self.lo:g}, {self.value:g}, {self.hi:g}")
        return self


def refuse_unsafe_argument(value: str) -> str:
    """`value` if it can be an argument of a command: a dash would make it an option, and NUL ends an argument."""
    if value.startswith("-"):
        raise ValueError("must not start with a dash")
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


def dumps(document: Document) -> str:
    """JSON text with the keys in the order of the classes, ending in a newline."""
    data = document.model_dump(mode="json", by_alias=True)
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def loads(text: str, kind: type[D], *, name: str, schema: str) -> D:
    """The document in `text`; anything wrong is a ``ValueError`` of one line that starts with `name`."""
    try:
        data = json.loads(text, parse_constant=_constant_refuser(name), object_pairs_hook=_duplicate_refuser(name))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be JSON, got {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{name} must be JSON of a few levels, got deeper nesting") from None
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be a JSON object, got {show(data)}")
    if "schema" not in data:
        raise ValueError(f"{name}: schema must be {schema!r}, got nothing")
    return from_dict(data, kind, name=name)


def from_dict(data: Mapping[str, Any], kind: type[D], *, name: str) -> D:
    """The document with these fields; one-line errors as in :func:`loads`."""
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        raise ValueError(_one_line(error, kind, name)) from None


def json_schema(kind: type[Document], schema: str) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the document."""
    body = kind.model_json_schema(by_alias=True)
    # A default of the class is a courtesy to Python callers; in a file the version has to be stated.
    required = ["schema", *body.pop("required")]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": schema}
    return {**head, **body, "required": required}


def json_schema_text(kind: type[Document], schema: str) -> str:
    """Content of a shipped schema file."""
    return json.dumps(json_schema(kind, schema), indent=2, allow_nan=False) + "\n"


def show(value: object) -> str:
    """`value` on one line of at most 80 characters."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _constant_refuser(name: str) -> Callable[[str], NoReturn]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{name}: numbers must be finite, got {constant}")

    return refuse


def _duplicate_refuser(name: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{name}: {show(key)} must be given once, got it twice")
            found[key] = value
        return found

    return collect


_RULES: Final = {
    "missing": "must be given",
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "finite_number": "must be finite",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "tuple_type": "must be a list",
    "model_type": "must be an object",
}


def _one_line(error: ValidationError, kind: type[Document], name: str) -> str:
    """First fault of `error` as field, rule and value."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    context, rule_name = fault.get("ctx", {}), fault["type"]
    if rule_name == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), _names(kind, fault["loc"][:-1]), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{name}: {_plain(place)} is not a field{hint}, got {show(fault['input'])}"
    if rule_name == "missing":
        return f"{name}: {_plain(place)} must be given, got nothing"
    known = _RULES.get(rule_name)
    rule = known.format(**context) if known else _plain(fault["msg"].removeprefix("Value error, "))
    if ", got " in rule:  # a rule of ours that already shows the value
        return f"{name}: {place}: {rule}" if place else f"{name}: {rule}"
    return f"{name}: {place} {rule}, got {show(fault['input'])}"


def _names(kind: type[Document], place: tuple[int | str, ...]) -> list[str]:
    """Field names of the object at `place`."""
    for step in place:
        if isinstance(step, str):
            field = next((info for key, info in kind.model_fields.items() if (info.alias or key) == step), None)
            kind = (_document_in(field.annotation) if field else None) or kind
    return [info.alias or key for key, info in kind.model_fields.items()]


def _document_in(annotation: object) -> type[Document] | None:
    """The document class inside ``X``, ``X | None`` or ``tuple[X, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, Document):
        return annotation
    return next((found for found in map(_document_in, get_args(annotation)) if found is not None), None)


def _plain(text: str) -> str:
    """One line: control characters of a hostile key are shown, not printed."""
    return re.sub(r"[^\x20-\x7e]", lambda match: repr(match.group())[1:-1], text)[:200]

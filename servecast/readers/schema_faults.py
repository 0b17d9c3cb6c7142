"""What is wrong with a document, as one line: key, rule, value; the same words for all that a user writes by hand."""

from __future__ import annotations

import difflib
import re
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

_RULES: Final = {
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be <= {le:g}",
    "finite_number": "must be finite",
    "literal_error": "must be {expected}",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have {min_length} values at least",
    "too_long": "must have at most {max_length} values",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}


def one_line(error: ValidationError, document: type[BaseModel], *, schema: str) -> str:
    """The fault to fix first, of a `document` whose key ``schema`` must be `schema`."""
    faults = error.errors(include_url=False)
    # another version explains every other fault, and an unknown key a missing one
    fault = min(faults, key=lambda f: (f["loc"] != ("schema",), f["type"] != "extra_forbidden"))
    place = plain(".".join(str(part) for part in fault["loc"] if part != "[key]"))
    if fault["type"] == "extra_forbidden":
        key, known = str(fault["loc"][-1]), _known_keys(document, fault["loc"][:-1])
        near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
        hint = f"nearest: {near[0]}" if near else f"known: {', '.join(known)}"
        return f"{place}: unknown key ({hint})"
    if fault["type"] == "missing" and isinstance(fault["loc"][-1], int):  # a place of a pair
        return f"{place.rpartition('.')[0]} must have a value more, got {shown(fault['input'])}"
    if fault["type"] == "missing":
        return f"{place} must be {schema!r}, got nothing" if place == "schema" else f"{place} must be given"
    if fault["type"] == "value_error":  # a rule of ours, complete with its value
        message = fault["msg"].removeprefix("Value error, ")
        last = str(fault["loc"][-1]) if fault["loc"] else ""
        if not place or message.startswith((f"{last} ", f"{place} ", f"{place}.")):
            return message
        return f"{place} {message}" if message.startswith(("must ", "needs ")) else f"{place}: {message}"
    return f"{place} {_rule(fault['type'], fault.get('ctx', {})) or plain(fault['msg'])}, got {shown(fault['input'])}"


def _rule(kind: str, context: dict[str, Any]) -> str:
    """In our words; empty for a kind that has none."""
    if kind == "too_short" and context.get("min_length") == 1:
        return "must not be empty"
    return _RULES.get(kind, "").format(**context)


def plain(text: str) -> str:
    """One line of at most 200 characters; control characters of a hostile key are shown, not printed."""
    return re.sub(r"[^\x20-\x7e]", lambda match: ascii(match.group())[1:-1], text)[:200]


def shown(value: object) -> str:
    """`value` on one line of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_keys(document: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Keys of the mapping at `place`, in the order of the document."""
    owner = document
    for part in place:
        info = next((f for name, f in owner.model_fields.items() if (f.alias or name) == part), None)
        if info is not None:  # else a name of the user's, such as a GPU
            owner = _model_in(info.annotation) or owner
    return [info.alias or name for name, info in owner.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Document that an annotation such as ``dict[str, GpuOffer]`` or ``Lengths | None`` speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg)) is not None), None)

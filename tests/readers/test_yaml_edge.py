"""YAML at the edge. Expected values: YAML 1.2.2 section 10.3 (core schema), and the rules in the module's docstring."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.readers.yaml_edge import MAX_BYTES, MAX_DEPTH, load_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # YAML 1.2.2, example 10.9 and the tables of 10.3.2
        ("[null, Null, NULL, ~, ]", [None] * 4),
        ("[true, True, TRUE, false, False, FALSE]", [True, True, True, False, False, False]),
        ("[0, 0o7, 0x3A, -19, +12]", [0, 7, 58, -19, 12]),
        ("[0., -0.0, .5, +12e03, -2E+05]", [0.0, -0.0, 0.5, 12000.0, -200000.0]),
        ("[.inf, -.Inf, +.INF]", [math.inf, -math.inf, math.inf]),
        # what YAML 1.1 reads otherwise
        ("[on, off, yes, no, y, n, On, YES]", ["on", "off", "yes", "no", "y", "n", "On", "YES"]),
        ("[1:30, 190:20:30.15]", ["1:30", "190:20:30.15"]),
        ("[010, 08, 0b11, 1_000]", [10, 8, "0b11", "1_000"]),
        ("[1e3, 1E3, 1.5e-2, 1e]", [1000.0, 1000.0, 0.015, "1e"]),
        ("[2026-01-31, 2s, 50ms, =, <<]", ["2026-01-31", "2s", "50ms", "=", "<<"]),
        ("[0o8, 0X1F, -0x1, tRUE, .INFO, .]", ["0o8", "0X1F", "-0x1", "tRUE", ".INFO", "."]),
        # quoted scalars are text
        ("['1', \"true\", '', ~]", ["1", "true", "", None]),
        ("|\n  1\n", "1\n"),
        # keys are text
        ("{4090: 1, true: 2, on: 3, ~: 4, 1.0: 5}", {"4090": 1, "true": 2, "on": 3, "~": 4, "1.0": 5}),
        ("a: {b: [1, {c: d}]}\ne:\n- 1\n- - 2\n", {"a": {"b": [1, {"c": "d"}]}, "e": [1, [2]]}),
        ("", None),
        ("# nothing\n", None),
        ("---\n...\n", None),
        ("%YAML 1.2\n---\na: 1\n", {"a": 1}),
        ("\ufeffa: 1\n", {"a": 1}),
        ("a: 1\r\nb: ü\r\n", {"a": 1, "b": "ü"}),
    ],
)
def test_values(text: str, value: object) -> None:
    read = load_yaml(text, name="request.yaml")
    assert read == value
    assert repr(read) == repr(value)  # 1, 1.0 and True are not the same here


def test_not_a_number() -> None:
    value = load_yaml(".nan", name="request.yaml")
    assert isinstance(value, float)
    assert math.isnan(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, " line 1: anchors are not allowed, got &a; write the value out"),
        ("a: 1\nb: *a\n", " line 2: aliases are not allowed, got *a; write the value out"),
        ("a: 1\n&k b: 2\n", " line 2: anchors are not allowed, got &k; write the value out"),
        (
            "a: 1\nb: !!python/object/apply:os.system [id]\n",
            " line 2: tags are not allowed, got tag:yaml.org,2002:python/object/apply:os.system",
        ),
        ("a: !!str 1\n", " line 1: tags are not allowed, got tag:yaml.org,2002:str"),
        ("a: ! 1\n", " line 1: tags are not allowed, got !"),
        ("!local {a: 1}\n", " line 1: tags are not allowed, got !local"),
        ("!!map\na: 1\n", " line 1: tags are not allowed, got tag:yaml.org,2002:map"),
        ("%TAG ! tag:x,2000:\n---\na: 1\n", " line 1: tags are not allowed, got a %TAG directive"),
        ("a: 1\nb: 2\na: 3\n", " line 3: key 'a' is given twice, first on line 1"),
        ("x:\n  'a': 1\n  a: 3\n", " line 3: key 'a' is given twice, first on line 2"),
        ("a: 1\n---\nb: 2\n", " line 2: a second document is not allowed"),
        ("? [1, 2]\n: 3\n", " line 1: a key must be text, got a mapping or a list"),
        ("a: [1,\nb: 2\n", " line 3: is not valid YAML (expected ',' or ']', but got '<stream end>')"),
        ("a: 1\n\tb: 2\n", " line 2: is not valid YAML (found character '\\t' that cannot start any token)"),
        ("a: 1\nb: \x07\n", " line 2: is not text (character U+0007)"),
        ("a: \ud800\n", " line 1: is not text (character U+D800)"),
        ("a: b: c\n", " line 1: is not valid YAML (mapping values are not allowed here)"),
        (f"a: {'9' * 5000}\n", " line 1: a number must have at most 400 digits, got 5000"),
        ("a: '" + "x" * (2 << 20) + "'", ": is longer than 1 MiB"),
        ("a: '" + "ü" * (MAX_BYTES // 2) + "'", ": is longer than 1 MiB"),
        ("[" * 100_000, " line 1: is nested deeper than 20 levels"),
        ("- " * 100_000, " line 1: is nested deeper than 20 levels"),
        ("".join("  " * i + f"k{i}:\n" for i in range(30)), " line 21: is nested deeper than 20 levels"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'request.yaml{message}')}$") as caught:
        load_yaml(text, name="request.yaml")
    assert len(str(caught.value)) < 200


def test_limits_are_inclusive() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert load_yaml(deep, name="x") is not None
    with pytest.raises(ValueError, match=r"^x line 1: is nested deeper than 20 levels$"):
        load_yaml(f"[{deep}]", name="x")
    assert load_yaml("#" * MAX_BYTES, name="x") is None
    with pytest.raises(ValueError, match=r"^x: is longer than 1 MiB$"):
        load_yaml("#" * (MAX_BYTES + 1), name="x")


@given(st.text(st.sampled_from("ab:-[]{},&*!|>'\"%#?@ \n\t~01.e"), max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        load_yaml(text, name="x.yaml")
    except ValueError as error:
        refused = str(error)
    else:
        return
    assert refused.startswith("x.yaml")
    assert "\n" not in refused

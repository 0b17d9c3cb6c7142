"""Every example in a docstring of the installed package runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

MODULES = sorted(
    one.name
    for room in ("", ".model", ".readers", ".solvers", ".calibration", ".policies", ".reports", ".cli")
    for one in pkgutil.iter_modules(importlib.import_module(f"servecast{room}").__path__, f"servecast{room}.")
    if not one.ispkg
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0

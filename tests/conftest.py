"""Fixtures and settings that every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("default", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session")
def data_path() -> Callable[..., Path]:
    """Path of a public data set's file under SERVECAST_DATA; the test is skipped where it is absent."""
    root = Path(os.environ.get("SERVECAST_DATA") or Path(__file__).parents[2] / "shared" / "data")

    def path(*parts: str) -> Path:
        found = root.joinpath(*parts)
        if not found.exists():
            pytest.skip(f"public data not found: {'/'.join(parts)} (set SERVECAST_DATA)")
        return found

    return path

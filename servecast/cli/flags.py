"""Which options a user typed, as against those that stand at their default."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.core import ParameterSource


def given_flags(names: Iterable[str]) -> list[str]:
    """Those of `names` that were given on the command line of the running command, as options (``--rate-scale``)."""
    context = click.get_current_context()
    typed = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return [f"--{name.replace('_', '-')}" for name in typed]

"""``servecast init``: a commented request file."""

from __future__ import annotations

from pathlib import Path

import click

from servecast.cli.errors import guard


@click.command("init")
@click.argument("path", default="request.yaml", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print where it went as JSON.")
@guard()
def command(path: Path, force: bool, as_json: bool) -> None:
    """Write a commented plan request to PATH (request.yaml)."""
    from servecast.cli.output import to_json, write_atomic
    from servecast.cli.request import template

    if path.exists() and not force:
        raise ValueError(f"{path}: exists; --force replaces it")
    write_atomic(path, template())
    if as_json:
        click.echo(to_json({"schema": "servecast.init/1", "wrote": str(path)}), nl=False)
    else:
        click.echo(f"wrote {path}; next: servecast plan {path}")

"""The command line: one small file per command, imported when it is called."""

from __future__ import annotations

import os
from importlib import import_module

import click

# matrices here are small and many: threads of the linear algebra library cost more than they save, most of all where
# cores are shared; read when numpy is loaded, which is later, and left alone where the user has set it
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

COMMANDS = {
    "plan": "Cheapest way to serve a workload within its latency limits.",
    "fleet": "Cheapest mix of GPU types for the request classes of a trace.",
    "schedule": "Replicas over the time of a trace at least cost: when to start and stop them.",
    "predict": "TTFT, TPOT and throughput of one operating point, or of a table of them.",
    "speculate": "Draft length by batch size for speculative decoding, as the engine's own file.",
    "simulate": "Replay a trace on a fleet, request by request.",
    "trace": "What a request trace holds, with its statistics and a chart.",
    "calibrate": "Measure this machine: microbenchmarks, fits, a machine profile.",
    "profile": "Show, compare and check profiles.",
    "validate": "Check predictions against a live run, with budgets written beforehand.",
    "init": "Write a commented plan request to start from.",
    "list": "Models, GPUs and profiles that are known by name.",
}


class LazyGroup(click.Group):
    """Commands by name; a command's module is imported only when it runs or is asked for its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 (click's signature)
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"servecast.cli.{cmd_name}_command").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 (click's)
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            ctx.fail(f"no such command {args[0][:40]!r}{hint}; commands: {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:  # noqa: ARG001 (click's signature)
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"servecast {version('servecast')}")
        ctx.exit()


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def main() -> None:
    """Forecast how an LLM inference service will behave, and decide how to run it."""

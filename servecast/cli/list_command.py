"""``servecast list``: names that can be used."""

from __future__ import annotations

import click

from servecast.cli.errors import guard


@click.command("list")
@click.argument("what", type=click.Choice(["models", "gpus", "profiles", "machines", "engines"]))
@click.option("--json", "as_json", is_flag=True, help="Print records as JSON.")
@guard()
def command(what: str, as_json: bool) -> None:
    """Models, GPUs, profiles, measured machines or engines that are known by name."""
    from servecast.cli.output import to_json

    readers = {"models": _models, "gpus": _gpus, "profiles": _profiles, "machines": _machines, "engines": _engines}
    records = readers[what]()
    if as_json:
        click.echo(to_json({"schema": "servecast.list/1", what: records}), nl=False)
        return
    for record in records:
        name, *rest = record.values()
        click.echo(f"{name!s:<44} " + "  ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in rest))


def _models() -> list[dict[str, object]]:
    from servecast.readers.catalogues import llm, llm_names

    return [
        {
            "name": one.name,
            "params_total": float(one.params_total),
            "params_active": float(one.params_active),
            "kv_bytes_per_token_bf16": one.kv_bytes_per_token(),
            "native_format": one.expert_format or one.native_format,
        }
        for one in map(llm, llm_names())
    ]


def _gpus() -> list[dict[str, object]]:
    from servecast.readers.catalogues import gpu, gpu_names

    return [
        {
            "name": one.name,
            "title": one.title,
            "memory_bytes": one.memory_bytes,
            "bandwidth_bytes_per_s": one.bandwidth_bytes_per_s,
            "bf16_flops": one.bf16_flops,
        }
        for one in map(gpu, gpu_names())
    ]


def _profiles() -> list[dict[str, object]]:
    from servecast.calibration.profile import read_document, shipped_profiles

    found = []
    for name in shipped_profiles():
        document = read_document(name)
        origin = document.provenance
        found.append({"name": name, "date": origin.date, "runs": origin.runs_fitted, "gpus": ", ".join(origin.devices)})
    return found


def _machines() -> list[dict[str, object]]:
    from servecast.calibration.machine_profile import read_machine, shipped_machines

    found: list[dict[str, object]] = []
    for name in shipped_machines():
        facts = read_machine(name).provenance
        found.append({"name": name, "date": facts.date, "device": facts.device})
    return found


def _engines() -> list[dict[str, object]]:
    from servecast.policies import ENGINES, parse_engine

    return [{"name": name, "newest": parse_engine(name)[1]} for name in ENGINES]

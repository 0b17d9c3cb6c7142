"""Files of a speculation table: the table itself, what its engine loads, and a script that starts one server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

from servecast.policies import rendering, sglang_speculation, trtllm_speculation, vllm_speculation
from servecast.policies.speculation import Finding, Level, SpeculationTable, dumps, only_length

TABLE_FILE: Final = "speculation.json"
VLLM_FILE: Final = "vllm_speculation.json"

_ENGINES: Final[Mapping[str, ModuleType]] = {
    "vllm": vllm_speculation,
    "sglang": sglang_speculation,
    "trtllm": trtllm_speculation,
}


def emit_speculation(table: SpeculationTable, *, allow_static: bool = False, force: bool = False) -> dict[str, str]:
    """File name to content. The launch script expects the engine's file in its own directory.

    An engine version without a schedule is refused, unless `allow_static` asks for the table's best single length. An
    engine that would drop the schedule is refused, unless `force` asks for the file all the same.
    """
    files = {TABLE_FILE: dumps(table)}
    if table.engine == "vllm":
        files |= _vllm_files(table, allow_static=allow_static, force=force)
    elif table.engine == "sglang":
        files |= _sglang_files(table, allow_static=allow_static, force=force)
    else:
        files |= _trtllm_files(table, allow_static=allow_static, force=force)
    return files


def findings(table: SpeculationTable) -> list[Finding]:
    """Every limit of the table's engine and version that its schedule meets, errors first."""
    found: list[Finding] = _ENGINES[table.engine].findings(table)
    return sorted(found, key=lambda finding: finding.level is not Level.ERROR)


def advice(table: SpeculationTable) -> list[str]:
    """The planner's remarks, then those on the engine's own adaptive mode."""
    return [*table.advice, *_ENGINES[table.engine].advice(table)]


def heading(table: SpeculationTable, length: int | None = None) -> str:
    """Comment lines for the top of a file: what wrote it, from what, what it promises, what to mind.

    `length` is the one draft length of the file, None where it holds the schedule.
    """
    origin = table.provenance
    lines = [
        f"Written by servecast {rendering.quoted(origin.servecast)} for {table.engine} {table.engine_version}"
        f" on {rendering.quoted(origin.date)}",
        f"step costs {rendering.quoted(origin.profile)}, acceptance {rendering.quoted(origin.acceptance)}",
    ]
    for part, forecast in zip(table.segments, table.predicted, strict=True):
        goodput, tpot = forecast.goodput_tokens_per_s, forecast.tpot_s
        lines.append(
            f"batch {part.lo} to {part.hi}: draft {part.draft_length},"
            f" {goodput.value:.4g} tok/s ({goodput.lo:.4g} to {goodput.hi:.4g}),"
            f" TPOT {tpot.value:.4g} s ({tpot.lo:.4g} to {tpot.hi:.4g})"
        )
    if length is not None and length != only_length(table):
        lines.append(f"not that schedule: draft {length} at every batch size, so these figures do not apply")
    lines += [f"{finding.level}: {rendering.quoted(finding.message)}" for finding in findings(table)]
    lines += [f"advice: {rendering.quoted(text)}" for text in advice(table)]
    return "".join(f"# {line}\n" for line in lines)


def _vllm_files(table: SpeculationTable, *, allow_static: bool, force: bool) -> dict[str, str]:
    length = vllm_speculation.written_length(table, allow_static=allow_static, force=force)
    config = vllm_speculation.speculative_config(table, allow_static=allow_static, force=force)
    command = vllm_speculation.serve_arguments(table, allow_static=allow_static, force=force)
    script = rendering.shell_script(heading(table, length), command)
    return ({VLLM_FILE: json.dumps(config) + "\n"} if config else {}) | {"vllm_speculation.sh": script}


def _sglang_files(table: SpeculationTable, *, allow_static: bool, force: bool) -> dict[str, str]:
    length = sglang_speculation.written_length(table, allow_static=allow_static, force=force)
    command = sglang_speculation.launch_arguments(table, allow_static=allow_static, force=force)
    comments, name = heading(table, length), "sglang_speculation.sh"
    if length is not None:
        return {name: rendering.shell_script(comments, command)}
    file = sglang_speculation.CONFIG_FILE
    script = rendering.shell_script(comments, command, ("--speculative-adaptive-config", file))
    return {file: _json(sglang_speculation.adaptive_config(table, force=force)), name: script}


def _trtllm_files(table: SpeculationTable, *, allow_static: bool, force: bool) -> dict[str, str]:
    length = trtllm_speculation.written_length(table, allow_static=allow_static, force=force)
    options = trtllm_speculation.options(table, allow_static=allow_static, force=force)
    command = trtllm_speculation.serve_arguments(table)
    comments, name = heading(table, length), "trtllm_speculation.sh"
    if not options:
        return {name: rendering.shell_script(comments, command)}
    file = trtllm_speculation.OPTIONS_FILE
    script = rendering.shell_script(comments, command, ("--extra_llm_api_options", file))
    return {file: comments + rendering.yaml_body(options), name: script}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"

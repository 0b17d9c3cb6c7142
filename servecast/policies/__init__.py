"""A solver's decision into files that serving engines load; strings only, the caller writes them.

`table` is the versioned document that carries the decision; one module per engine (`vllm`, `sglang`, `trtllm`) turns it
into that engine's own file and command, by engine version. :func:`emit` gives everything for one table.
"""

from __future__ import annotations

import difflib
from types import MappingProxyType
from typing import Final

from servecast.policies import rendering, sglang, trtllm, vllm
from servecast.policies.table import PolicyTable, dumps, from_dict, json_schema, loads
from servecast.policies.versions import show_version

__all__ = ["ENGINES", "PolicyTable", "dumps", "emit", "from_dict", "json_schema", "loads", "parse_engine"]

ENGINES: Final = MappingProxyType({engine.name: engine for engine in (vllm.ENGINE, sglang.ENGINE, trtllm.ENGINE)})
"""Engines by name, with their known versions and options."""

_SPELLINGS: Final = {"tensorrt-llm": "trtllm", "tensorrt_llm": "trtllm", "trt-llm": "trtllm", "trt_llm": "trtllm"}


def emit(table: PolicyTable) -> dict[str, str]:
    """File name to content: the table, the engine's file where it has one, and a script that starts one replica.

    The launch script expects the engine's file in its own directory.
    """
    files = {"policy.json": dumps(table)}
    if table.engine == "vllm":
        command = vllm.model_command(table)
        files[vllm.CONFIG_FILE] = vllm.serve_config(table)
        files["vllm.sh"] = rendering.launch_script(table, command, ("--config", vllm.CONFIG_FILE))
    elif table.engine == "sglang":
        files["sglang.sh"] = sglang.launch_script(table)
    else:
        command = trtllm.serve_arguments(table)
        files[trtllm.OPTIONS_FILE] = trtllm.llm_api_options(table)
        option = ("--extra_llm_api_options", trtllm.OPTIONS_FILE)
        files["trtllm.sh"] = rendering.launch_script(table, command, option)
    return files


def parse_engine(text: str) -> tuple[str, str]:
    """Engine and version of ``engine@version``; without a version the newest known one.

    >>> parse_engine("vllm@0.32"), parse_engine("trtllm")
    (('vllm', '0.32'), ('trtllm', '1.2.1'))
    """
    name, at, version = text.strip().partition("@")
    name = name.strip().lower()
    name = _SPELLINGS.get(name, name)
    engine = ENGINES.get(name)
    if engine is None:
        near = difflib.get_close_matches(name, ENGINES, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {text[:60]!r}{hint}")
    if not at:
        return name, show_version(engine.newest)
    version = version.strip()
    engine.check(version)
    return name, version

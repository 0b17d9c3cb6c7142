"""What every engine file shares: its heading, its memory arithmetic, safe quoting of names, the launch script."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from servecast.policies.table import Memory, PolicyTable

SIXTEEN_BIT = frozenset({"bf16", "fp16"})
"""Formats an engine converts between while it loads."""


def quoted(text: str) -> str:
    r"""`text` on one line of printable ASCII, for a comment: a newline in a name must not end the comment.

    >>> quoted("a\nb")
    '"a\\nb"'
    """
    return json.dumps(text)


def heading(table: PolicyTable) -> str:
    """Comment lines for the top of a file: what wrote it, from what, what it promises."""
    origin, predicted = table.provenance, table.predicted
    figures = ", ".join(
        f"{name} {interval.value:.4g} s ({interval.lo:.4g} to {interval.hi:.4g})"
        for name, interval in (
            ("TTFT p50", predicted.ttft_p50_s),
            ("p99", predicted.ttft_p99_s),
            ("TPOT p50", predicted.tpot_p50_s),
            ("p99", predicted.tpot_p99_s),
        )
    )
    lines = [
        f"Written by servecast {quoted(origin.servecast)} for {table.engine} {table.engine_version}"
        f" on {quoted(origin.date)}",
        f"profile {quoted(origin.profile)}, trace {quoted(origin.trace)}, seed {origin.seed}",
        f"{table.replicas} x (tp {table.tp} x pp {table.pp}) on {quoted(table.gpu)}, {table.cost_usd_per_hour:g} USD/h",
        f"predicted with 90 % interval: {figures}",
    ]
    if table.replicas > 1:
        lines.append(f"start {table.replicas} servers with these options behind one load balancer")
    return "".join(f"# {line}\n" for line in lines)


class _OneLineDumper(yaml.SafeDumper):
    """Writes a string that is not printable ASCII in double quotes with escapes, so that it stays on its line."""


def _one_line_string(dumper: _OneLineDumper, text: str) -> yaml.ScalarNode:
    style = None if text.isascii() and text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OneLineDumper.add_representer(str, _one_line_string)


def yaml_file(table: PolicyTable, options: Mapping[str, Any]) -> str:
    """Heading and `options` as YAML of one line per scalar, in the order given, ASCII only."""
    return heading(table) + yaml_body(options)


def yaml_body(options: Mapping[str, Any]) -> str:
    """`options` as YAML of one line per scalar, in the order given, ASCII only."""
    body: str = yaml.dump(
        dict(options),
        Dumper=_OneLineDumper,
        sort_keys=False,
        allow_unicode=False,
        default_flow_style=False,
        width=10**6,
    )
    return body


def free_for_kv(table: PolicyTable) -> tuple[Memory, float]:
    """Memory of one GPU and the bytes its share leaves for the KV cache. [B]"""
    memory = table.memory
    if memory is None:
        raise ValueError(
            f"policy table: memory must be given for {table.engine}, whose memory option differs, got nothing"
        )
    kv_bytes = table.gpu_memory_utilization * memory.gpu_bytes - memory.weight_bytes - memory.overhead_bytes
    if kv_bytes <= 0.0:
        raise ValueError(
            "policy table: gpu_memory_utilization must leave memory for the KV cache, "
            f"got {table.gpu_memory_utilization:g}, {-kv_bytes:.3g} B too little"
        )
    return memory, kv_bytes


def floor_fraction(value: float) -> float:
    """Rounded down to four digits, so that a printed share never asks for more memory than was planned.

    >>> floor_fraction(0.87659)
    0.8765
    """
    return math.floor(value * 1e4) / 1e4


def loads_as_published(table: PolicyTable) -> bool:
    """Whether the checkpoint already has the weights in `table.precision`, as far as the table says."""
    published = table.checkpoint_format
    return published == table.precision or {published, table.precision} <= SIXTEEN_BIT


def launch_script(table: PolicyTable, command: Sequence[str], file_option: tuple[str, str] | None = None) -> str:
    """POSIX sh that starts one replica of the table, see :func:`shell_script`."""
    return shell_script(heading(table), command, file_option)


def shell_script(comments: str, command: Sequence[str], file_option: tuple[str, str] | None = None) -> str:
    """POSIX sh that replaces itself by `command`; what the user adds to the script is appended to the command.

    `comments` are comment lines for its top, `file_option` an option and the name of a file that lies beside the
    script.
    """
    words = [shlex.quote(word) for word in command]
    if file_option is not None:
        option, name = file_option
        words += [option, '"$(dirname -- "$0")"/' + shlex.quote(name)]
    return f'#!/bin/sh\n{comments}set -eu\nexec {" ".join(words)} "$@"\n'

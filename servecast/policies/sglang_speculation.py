"""SGLang: the file of ``--speculative-adaptive-config`` and the speculative options of ``sglang.launch_server``.

Facts, read in the released packages of SGLang 0.5.10.post1, 0.5.11, 0.5.12, 0.5.12.post1, 0.5.13, 0.5.13.post1, 0.5.14,
0.5.15.post1 to 0.5.18 and 0.5.23 (``sglang/srt/speculative/adaptive_spec_params.py``, ``sglang/srt/server_args.py``,
``sglang/srt/arg_groups/speculative_hook.py``):

- ``--speculative-adaptive`` and its file are in 0.5.11 and not in 0.5.10.post1. Up to 0.5.12.post1 the file is one flat
  set of at least two candidates; from 0.5.13 on its keys are batch sizes, which is the form written here.
- A key of digits is the lowest batch size of its entry. The batch is padded to the captured graph size first; then the
  largest key that is not above it applies, and below the smallest key the smallest one. One candidate leaves the
  controller no choice, so each entry pins its draft length. 0 is a candidate from 0.5.14 on.
- ``--speculative-num-steps`` has to be a candidate of some entry; draft tokens are steps + 1 when topk is 1.
- Other algorithms than EAGLE and EAGLE3, topk other than 1, attention DP, multi-layer EAGLE, two-batch overlap and
  pdmux: a warning, and ``--speculative-num-steps`` holds throughout.
- DFLASH and DSPARK take the length from ``--speculative-num-draft-tokens`` and force steps to 1; NGRAM takes it from
  the same option.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Final

from servecast.policies.documents import show
from servecast.policies.speculation import (
    Finding,
    SpeculationTable,
    dense_lengths,
    error,
    length_to_write,
    missing_feature,
    only_length,
    warning,
)
from servecast.policies.versions import Engine, Option, Version, parse_version, show_version

CONFIG_FILE: Final = "sglang_speculation.json"
"""Where the launch script expects the schedule."""

SCHEDULE: Final = "speculative_adaptive_config by batch size"
"""The schedule in words, since the option is older than its form."""

ENGINE: Final = Engine(
    name="sglang",
    oldest=(0, 5, 10, 1),
    newest=(0, 5, 23, 0),
    options={
        "speculative-adaptive": Option(since=(0, 5, 11, 0), switch=True),
        "speculative-adaptive-config": Option(since=(0, 5, 11, 0)),
        "speculative-adaptive-config by batch size": Option(since=(0, 5, 13, 0)),
    },
)
"""Versions whose speculative options were read."""

_ALGORITHMS: Final[Mapping[str, tuple[str, Version]]] = {
    "eagle": ("EAGLE", (0, 5, 10, 1)),
    "eagle3": ("EAGLE3", (0, 5, 10, 1)),
    "mtp": ("NEXTN", (0, 5, 10, 1)),
    "draft_model": ("STANDALONE", (0, 5, 10, 1)),
    "ngram": ("NGRAM", (0, 5, 10, 1)),
    "dflash": ("DFLASH", (0, 5, 11, 0)),
    "dspark": ("DSPARK", (0, 5, 17, 0)),
}
"""Name of a method and the oldest version read that handles it in its speculative options."""

_ADAPTIVE: Final = frozenset({"eagle", "eagle3", "mtp"})
_STEPS: Final = _ADAPTIVE | {"draft_model"}
_ZERO_IS_A_CANDIDATE: Version = (0, 5, 14, 0)


def adaptive_config(table: SpeculationTable, *, force: bool = False) -> dict[str, Any]:
    """Contents of the file: lowest batch size of each segment to its one draft length.

    >>> from servecast.policies.sglang_speculation import read_sglang_schedule
    >>> read_sglang_schedule({"1": {"candidate_steps": [5]}, "3": {"candidate_steps": [1]}}, 4)
    [5, 5, 1, 1]
    """
    if written_length(table, force=force) is not None:
        raise ValueError("segments must have more than one draft length for a schedule, got one")
    return {str(part.lo): {"candidate_steps": [part.draft_length]} for part in table.segments}


def speculative_arguments(table: SpeculationTable, *, allow_static: bool = False, force: bool = False) -> list[str]:
    """Options without the file of a schedule; empty where the table never drafts.

    A table of one length needs no file. `allow_static` writes the table's best single length where SGLang has no use
    for the schedule, `force` the schedule that it would drop.
    """
    length = written_length(table, allow_static=allow_static, force=force)
    name = _algorithm(table)
    if length == 0:
        return []
    words = ["--speculative-algorithm", name]
    if table.draft_model is not None:
        words += ["--speculative-draft-model-path", table.draft_model]
    steps = max(dense_lengths(table)) if length is None else length
    if table.method in _STEPS:
        words += ["--speculative-num-steps", str(steps), "--speculative-eagle-topk", "1"]
    if table.method == "ngram":
        words += ["--speculative-ngram-max-bfs-breadth", "1"]
    words += ["--speculative-num-draft-tokens", str(steps + 1)]
    return words if length is not None else [*words, "--speculative-adaptive"]


def launch_arguments(table: SpeculationTable, *, allow_static: bool = False, force: bool = False) -> list[str]:
    """The command without the file of a schedule."""
    words = ["python", "-m", "sglang.launch_server", "--model-path", table.model]
    words += ["--max-running-requests", str(table.max_batch)]
    if table.data_parallel > 1:
        words += ["--dp-size", str(table.data_parallel)]
    return words + speculative_arguments(table, allow_static=allow_static, force=force)


def written_length(table: SpeculationTable, *, allow_static: bool = False, force: bool = False) -> int | None:
    """The one length of the options, or None for a schedule; a one-line error where neither is possible."""
    return length_to_write(table, findings(table), allow_static=allow_static, force=force)


def findings(table: SpeculationTable) -> list[Finding]:
    """Every limit of the table's version that its schedule meets; none for a table of one length."""
    if only_length(table) is not None:
        return []
    if gap := missing_feature(ENGINE, SCHEDULE, table.engine_version):
        return [error("version", gap)]
    version = ENGINE.check(table.engine_version)
    return [
        *check_zero(dense_lengths(table), version),
        *check_combination(method=table.method),
        *check_replicas(table.data_parallel),
    ]


def check_zero(lengths: Sequence[int], version: Version) -> list[Finding]:
    """Draft length 0: refused before 0.5.14, and afterwards not the same as a server without speculation."""
    if 0 not in lengths:
        return []
    if version < _ZERO_IS_A_CANDIDATE:
        since = show_version(_ZERO_IS_A_CANDIDATE)
        return [error("idle", f"sglang {show_version(version)} has no draft length 0 (since {since})")]
    return [warning("idle", "draft length 0 still pays for an armed drafter, unlike no speculation")]


def check_combination(
    *,
    method: str,
    topk: int = 1,
    dp_attention: bool = False,
    multi_layer_eagle: bool = False,
    two_batch_overlap: bool = False,
    pdmux: bool = False,
) -> list[Finding]:
    """Combinations under which SGLang warns and keeps one length."""
    reasons = {
        f"method {method}": method not in _ADAPTIVE,
        f"topk {topk}": topk != 1,
        "attention DP": dp_attention,
        "multi-layer EAGLE": multi_layer_eagle,
        "two-batch overlap": two_batch_overlap,
        "pdmux": pdmux,
    }
    return [
        error("combination", f"sglang drops the schedule with {reason} and keeps one length", can_force=True)
        for reason, holds in reasons.items()
        if holds
    ]


def check_replicas(data_parallel: int) -> list[Finding]:
    """Data parallel replicas have a schedule each; with attention DP SGLang drops it."""
    if data_parallel <= 1:
        return []
    return [warning("data_parallel", "sglang drops the schedule if --enable-dp-attention is added")]


def check_graph_edges(config: Mapping[str, Any], captured: Sequence[int]) -> list[Finding]:
    """Keys behind a captured graph size: elsewhere padding moves the edge down to the next size below it."""
    sizes = sorted(captured)
    return [
        warning("edge", f"key {key} must be a captured size + 1 to act from {key} on, got {show(list(sizes))}")
        for key in sorted(_pinned(config))[1:]
        if sizes and key - 1 < sizes[-1] and key - 1 not in sizes
    ]


def advice(table: SpeculationTable) -> list[str]:
    """Where SGLang has a mode of its own that does more than a table."""
    if table.method not in _ADAPTIVE or missing_feature(ENGINE, SCHEDULE, table.engine_version):
        return []
    return [
        "sglang follows the observed acceptance where an entry has several candidate_steps: add neighbours of these "
        "lengths where acceptance changes over the day, and measure against the pinned ones"
    ]


def read_sglang_schedule(config: Mapping[str, Any], max_batch: int, captured: Sequence[int] = ()) -> list[int]:
    """Draft length at batch size 1 to `max_batch` as SGLang routes it; `captured` are the graph sizes, if any."""
    if max_batch < 1:
        raise ValueError(f"max_batch must be >= 1, got {max_batch}")
    pinned, sizes = _pinned(config), sorted(captured)
    keys = sorted(pinned)

    def length(batch: int) -> int:
        place = bisect_left(sizes, batch)
        padded = sizes[place] if place < len(sizes) else batch
        return pinned[keys[max(0, bisect_right(keys, padded) - 1)]]

    return [length(batch) for batch in range(1, max_batch + 1)]


def _pinned(config: Mapping[str, Any]) -> dict[int, int]:
    """Lowest batch size to the one candidate there; other keys are defaults of the controller and are passed over."""
    found = {}
    for key, entry in config.items():
        if not (key.isascii() and key.isdigit()):
            continue
        steps = entry.get("candidate_steps") if isinstance(entry, Mapping) else None
        if not isinstance(steps, list) or not steps or not all(isinstance(step, int) and step >= 0 for step in steps):
            raise ValueError(f"candidate_steps of {key} must be a list of whole numbers >= 0, got {show(steps)}")
        if len(set(steps)) != 1:
            raise ValueError(f"candidate_steps of {key} must be one length in a schedule, got {show(steps)}")
        found[int(key)] = int(steps[0])
    if not found:
        raise ValueError(f"speculative_adaptive_config must have a key of digits, got {show(list(config))}")
    return found


def _algorithm(table: SpeculationTable) -> str:
    ENGINE.check(table.engine_version)
    if table.method not in _ALGORITHMS:
        raise ValueError(f"sglang method must be one of {', '.join(_ALGORITHMS)}, got {table.method}")
    name, since = _ALGORITHMS[table.method]
    if parse_version(table.engine_version) < since:
        raise ValueError(
            f"sglang {table.engine_version} is not known to have method {table.method} (since {show_version(since)})"
        )
    return name

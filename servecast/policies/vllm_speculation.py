"""vLLM: the value of ``--speculative-config`` with ``num_speculative_tokens_per_batch_size``.

Facts, read in the released packages of vLLM 0.10.0, 0.22.1, 0.23.0, 0.24.0, 0.25.1, 0.26.0, 0.27.1 and 0.28.0 to 0.33.0
(``vllm/v1/spec_decode/dynamic/utils.py``, ``vllm/config/vllm.py``, ``vllm/config/speculative.py``,
``vllm/v1/core/sched/scheduler.py``):

- The schedule (pull request 32374) is in 0.24.0 and not in 0.23.0. Its reading rules did not change up to 0.33.0: a
  list of [lo, hi, K] with both ends included, in any order, from batch size 1, no overlap; each value goes through
  ``int()``. A gap and the tail up to ``max_num_seqs`` take the K before them, and K is cut to
  ``num_speculative_tokens`` in silence.
- The batch size that is looked up counts every request scheduled in the step, prefills included.
- Data parallel: from 0.26.0 on the schedule is dropped with a warning and ``num_speculative_tokens`` holds throughout.
  0.24.0 and 0.25.1 keep it, and ranks that choose different lengths can wait for each other for ever.
- Model runner v1 (and every runner in 0.24.0) replaces full graphs by PIECEWISE; v2 keeps them from 0.25.1 on.
- From 0.33.0 on model runner v1 drops the schedule for methods other than n-gram, EAGLE, EAGLE-3, MTP, draft model and
  DFlash. The documentation names EAGLE, EAGLE-3 and DFlash as tested.
- ``enable_adaptive_verification`` is in 0.28.0 and not in 0.27.1; it takes method dspark only.

0.25.0 was not read: what is first seen in 0.25.1 counts from there.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Final

from servecast.policies.documents import show
from servecast.policies.speculation import (
    Finding,
    SpeculationTable,
    error,
    length_to_write,
    missing_feature,
    only_length,
    warning,
)
from servecast.policies.versions import Engine, Option, Version, parse_version, show_version

SCHEDULE: Final = "num_speculative_tokens_per_batch_size"
"""Key of the schedule inside ``--speculative-config``."""

ENGINE: Final = Engine(
    name="vllm",
    oldest=(0, 10, 0, 0),
    newest=(0, 33, 0, 0),
    options={
        "num-speculative-tokens-per-batch-size": Option(since=(0, 24, 0, 0)),
        "enable-adaptive-verification": Option(since=(0, 28, 0, 0)),
    },
)
"""Versions whose speculative configuration was read."""

_METHODS: Final[Mapping[str, Version]] = {
    "eagle": (0, 10, 0, 0),
    "eagle3": (0, 10, 0, 0),
    "ngram": (0, 10, 0, 0),
    "mtp": (0, 22, 1, 0),
    "draft_model": (0, 22, 1, 0),
    "dflash": (0, 22, 1, 0),
    "suffix": (0, 22, 1, 0),
    "dspark": (0, 25, 1, 0),
}
"""Oldest version read that knows the method's name."""

_TESTED: Final = frozenset({"eagle", "eagle3", "dflash"})
_RUNNER_V1: Final = _TESTED | {"ngram", "mtp", "draft_model"}
_V2_KEEPS_FULL_GRAPHS: Version = (0, 25, 1, 0)
_DROPS_UNDER_DATA_PARALLEL: Version = (0, 26, 0, 0)
_V1_DROPS_OTHER_METHODS: Version = (0, 33, 0, 0)


def speculative_config(table: SpeculationTable, *, allow_static: bool = False, force: bool = False) -> dict[str, Any]:
    """Value of ``--speculative-config``; empty where the table never drafts, since the server then needs no drafter.

    A table of one length is written without a schedule, which costs nothing. `allow_static` writes the table's best
    single length where vLLM has no use for the schedule, `force` the schedule that it would drop.
    """
    length = written_length(table, allow_static=allow_static, force=force)
    _check_method(table)
    if length == 0:
        return {}
    config: dict[str, Any] = {"method": table.method}
    if table.draft_model is not None:
        config["model"] = table.draft_model
    if length is not None:
        return {**config, "num_speculative_tokens": length}
    ranges = [[part.lo, part.hi, part.draft_length] for part in table.segments]
    return {**config, "num_speculative_tokens": table.num_speculative_tokens, SCHEDULE: ranges}


def written_length(table: SpeculationTable, *, allow_static: bool = False, force: bool = False) -> int | None:
    """The one length of the configuration, or None for a schedule; a one-line error where neither is possible."""
    return length_to_write(table, findings(table), allow_static=allow_static, force=force)


def serve_arguments(table: SpeculationTable, *, allow_static: bool = False, force: bool = False) -> list[str]:
    """The command that serves the table, ready for a process without a shell."""
    config = speculative_config(table, allow_static=allow_static, force=force)
    words = ["vllm", "serve", table.model, "--max-num-seqs", str(table.max_batch)]
    if table.data_parallel > 1:
        words += ["--data-parallel-size", str(table.data_parallel)]
    if config:
        words += ["--speculative-config", json.dumps(config)]
    if table.model_runner is None:
        return words
    return ["env", f"VLLM_USE_V2_MODEL_RUNNER={int(table.model_runner == 'v2')}", *words]


def findings(table: SpeculationTable) -> list[Finding]:
    """Every limit of the table's version that its schedule meets; none for a table of one length."""
    if only_length(table) is not None:
        return []
    if gap := missing_feature(ENGINE, SCHEDULE, table.engine_version):
        return [error("version", gap)]
    version = ENGINE.check(table.engine_version)
    config = {
        "num_speculative_tokens": table.num_speculative_tokens,
        SCHEDULE: [[part.lo, part.hi, part.draft_length] for part in table.segments],
    }
    return [
        *check_ranges(config, table.max_batch),
        *check_lengths(config),
        *check_idle(config),
        *check_data_parallel(table.data_parallel, version),
        *check_graphs(table.model_runner, version),
        *check_method(table.method, table.model_runner, version),
    ]


def check_ranges(config: Mapping[str, Any], max_num_seqs: int) -> list[Finding]:
    """Ranges from 1, without overlap (vLLM refuses the file) and without a gap (the K before it is used)."""
    found, expected = [], 1
    for lo, hi, _ in sorted(_entries(config)):
        if lo < expected:
            found.append(error("overlap", f"{SCHEDULE} must not overlap, got a range from {lo} after {expected - 1}"))
        elif lo > expected and expected == 1:
            found.append(error("start", f"{SCHEDULE} must start at batch size 1, got {lo}"))
        elif lo > expected:
            found.append(warning("gap", f"{SCHEDULE} leaves {expected} to {lo - 1} to the range before"))
        expected = max(expected, hi + 1)
    if expected <= max_num_seqs:
        found.append(warning("tail", f"{SCHEDULE} leaves {expected} to {max_num_seqs} to the last range"))
    return found


def check_lengths(config: Mapping[str, Any]) -> list[Finding]:
    """K <= num_speculative_tokens, which sizes buffers and graphs; vLLM would cut K in silence."""
    most = _whole(config["num_speculative_tokens"])
    return [
        error("length", f"draft length must be <= num_speculative_tokens {most}, got {length} from {lo} to {hi}")
        for lo, hi, length in _entries(config)
        if length > most
    ]


def check_idle(config: Mapping[str, Any]) -> list[Finding]:
    """Ranges of K = 0 keep the drafter in step and the cache slots reserved: slower than a server without drafts."""
    return [
        warning("idle", f"draft length 0 from {lo} to {hi} still pays for an armed drafter, unlike no speculation")
        for lo, hi, length in _entries(config)
        if length == 0
    ]


def check_data_parallel(data_parallel: int, version: Version) -> list[Finding]:
    """A schedule needs data parallel size 1."""
    if data_parallel <= 1:
        return []
    effect = "drops the schedule" if version >= _DROPS_UNDER_DATA_PARALLEL else "may deadlock with a schedule"
    message = f"data_parallel must be 1 with a schedule, got {data_parallel}: vllm {show_version(version)} {effect}"
    return [error("data_parallel", message, can_force=True)]


def check_graphs(model_runner: str | None, version: Version) -> list[Finding]:
    """Full graphs are kept by model runner v2 only."""
    if model_runner == "v2" and version >= _V2_KEEPS_FULL_GRAPHS:
        return []
    runner = "model runner v1" if version >= _V2_KEEPS_FULL_GRAPHS else f"vllm {show_version(version)}"
    return [warning("graphs", f"{runner} replaces full graphs by PIECEWISE under a schedule, so steps take longer")]


def check_method(method: str, model_runner: str | None, version: Version) -> list[Finding]:
    """Methods documented as tested; methods for which model runner v1 drops the schedule."""
    if version >= _V1_DROPS_OTHER_METHODS and model_runner == "v1" and method not in _RUNNER_V1:
        message = f"model runner v1 of vllm {show_version(version)} drops the schedule for method {method}"
        return [error("method", message, can_force=True)]
    if method in _TESTED:
        return []
    return [warning("method", f"vllm documents a schedule as tested with eagle, eagle3 and dflash, not with {method}")]


def advice(table: SpeculationTable) -> list[str]:
    """Where vLLM has a mode of its own that does better than a table."""
    if table.method != "dspark" or missing_feature(ENGINE, "enable_adaptive_verification", table.engine_version):
        return []
    return [
        "vllm sizes the verification of dspark drafts itself with enable_adaptive_verification: prefer it to this "
        "table above a few dozen requests, and measure below; it needs model runner v2 and full graphs, and takes "
        "neither LoRA nor pipeline parallelism"
    ]


def read_vllm_schedule(config: Mapping[str, Any], max_num_seqs: int) -> list[int]:
    """Draft length at batch size 1 to `max_num_seqs` as vLLM reads `config`; an empty one is no speculation.

    >>> read_vllm_schedule({"num_speculative_tokens": 3, SCHEDULE: [[1, 2, 4], [5, 8, 1]]}, 10)
    [3, 3, 3, 3, 1, 1, 1, 1, 1, 1]
    """
    if max_num_seqs < 1:
        raise ValueError(f"max_num_seqs must be >= 1, got {max_num_seqs}")
    if not config:
        return [0] * max_num_seqs
    most = _whole(config.get("num_speculative_tokens"))
    if most < 1:
        raise ValueError(f"num_speculative_tokens must be > 0, got {most}")
    if config.get(SCHEDULE) is None:
        return [most] * max_num_seqs
    entries = sorted(_entries(config))
    previous = 0
    for lo, hi, length in entries:
        if lo < 1 or hi < lo or length < 0:
            raise ValueError(f"{SCHEDULE} entry must be 1 <= lo <= hi and K >= 0, got [{lo}, {hi}, {length}]")
        if lo <= previous:
            raise ValueError(f"{SCHEDULE} must not overlap, got a range from {lo} after {previous}")
        previous = hi
    if entries[0][0] != 1:
        raise ValueError(f"{SCHEDULE} must start at batch size 1, got {entries[0][0]}")
    starts = [lo for lo, _, _ in entries]
    return [min(most, entries[bisect_right(starts, batch) - 1][2]) for batch in range(1, max_num_seqs + 1)]


def _entries(config: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """The schedule as whole numbers, cut by ``int()`` as in vLLM."""
    value = config.get(SCHEDULE)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{SCHEDULE} must be a list of [lo, hi, K], got {show(value)}")
    entries = []
    for entry in value:
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 3:
            raise ValueError(f"{SCHEDULE} entry must be [lo, hi, K], got {show(entry)}")
        lo, hi, length = map(_whole, entry)
        entries.append((lo, hi, length))
    return entries


def _whole(value: object) -> int:
    try:
        return int(value)  # type: ignore[call-overload,no-any-return]  # vLLM calls int() on whatever is there
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{SCHEDULE} must hold numbers, got {show(value)}") from None


def _check_method(table: SpeculationTable) -> None:
    ENGINE.check(table.engine_version)
    since = _METHODS[table.method]
    if parse_version(table.engine_version) < since:
        raise ValueError(
            f"vllm {table.engine_version} is not known to have method {table.method} (since {show_version(since)})"
        )

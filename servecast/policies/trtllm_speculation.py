"""TensorRT-LLM: ``speculative_config`` of the options file, with ``draft_len_schedule``.

Facts, read in the public repository (``tensorrt_llm/llmapi/llm_args.py``, ``tensorrt_llm/_torch/speculative``), in its
pull requests and in its release notes:

- ``draft_len_schedule`` came with pull request 8194, merged on 18 November 2025. The release that follows is 1.2.0; its
  own files were not read, so 1.2.0 is derived from the date. Keys are **lower** bounds: {1: 4, 4: 2, 8: 0} drafts 4
  from 1, 2 from 4, 0 from 8. Key 1 has to be there and to hold ``max_draft_len``. Only the n-gram and the two-model
  drafter read the schedule.
- Pull request 10860, in the notes of 1.3.0rc8 and not of 1.3.0rc7, made the keys **upper** bounds: {4: 4, 8: 2, 32: 1}
  drafts 4 up to 4, 2 up to 8, 1 up to 32, and nothing above. The smallest key has to hold ``max_draft_len``. Graphs are
  padded to the next captured batch size of the same draft length, which needs lengths that do not rise. EAGLE-3 on the
  one-model path reads it; pull request 12262 adds MTP, DFlash and draft models (its candidate was not established).
  The n-gram drafter still looks its keys up as lower bounds.
- ``max_concurrency`` switches drafting off above a batch size. Upper-bound versions refuse it beside a schedule, and
  turn it alone into {max_concurrency: max_draft_len}.
- Pull request 16888 (open) reports that a one-model drafter which is skipped leaves its own state behind: requests that
  live through a range of length 0 lose most of their acceptance afterwards.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from enum import StrEnum
from itertools import pairwise
from typing import Any, Final

from servecast.policies.documents import show
from servecast.policies.speculation import (
    Finding,
    SpeculationTable,
    error,
    length_to_write,
    only_length,
    parse_candidate,
    refuse_errors,
    warning,
)

OPTIONS_FILE: Final = "trtllm_speculation.yaml"
"""Where the launch command expects the options."""

SCHEDULE: Final = "draft_len_schedule"

_OLDEST: Final = "1.0.0"
_FIRST_SCHEDULE: Final = "1.2.0"
_UPPER_BOUNDS: Final = "1.3.0rc8"
_NEWEST: Final = "1.4.0rc1"

_TYPES: Final = {
    "eagle3": "Eagle3",
    "mtp": "MTP",
    "ngram": "NGram",
    "draft_model": "Draft_Target",
    "dflash": "DFlash",
}
_READS_LOWER: Final = frozenset({"ngram", "draft_model"})


class KeyMeaning(StrEnum):
    """What a key of ``draft_len_schedule`` bounds."""

    LOWER = "lower"
    UPPER = "upper"


def key_meaning(version: str) -> KeyMeaning:
    """How `version` reads the keys of a schedule.

    >>> key_meaning("1.2.1").value, key_meaning("1.3.0rc8").value
    ('lower', 'upper')
    """
    if gap := _missing(version):
        raise ValueError(gap)
    return KeyMeaning.UPPER if parse_candidate(version) >= parse_candidate(_UPPER_BOUNDS) else KeyMeaning.LOWER


def decoding_config(table: SpeculationTable, *, allow_static: bool = False, force: bool = False) -> dict[str, Any]:
    """The section ``speculative_config``; empty where the table never drafts.

    A table of one length is written without a schedule. `allow_static` writes the table's best single length where the
    schedule cannot be written, `force` a schedule that the method's drafter is not known to read.
    """
    length = written_length(table, allow_static=allow_static, force=force)
    kind = _decoding_type(table)
    if length == 0:
        return {}
    config: dict[str, Any] = {"decoding_type": kind}
    most = table.segments[0].draft_length if length is None else length
    config["max_draft_len"] = most
    if table.method == "mtp":
        # The older name of the same number, which older versions need and later ones drop beside the newer name.
        config["num_nextn_predict_layers"] = most
    if table.draft_model is not None:
        config["speculative_model"] = table.draft_model
    return config if length is not None else {**config, SCHEDULE: _schedule(table)}


def written_length(table: SpeculationTable, *, allow_static: bool = False, force: bool = False) -> int | None:
    """The one length of the section, or None for a schedule; a one-line error where neither is possible."""
    return length_to_write(table, findings(table), allow_static=allow_static, force=force)


def options(table: SpeculationTable, *, allow_static: bool = False, force: bool = False) -> dict[str, Any]:
    """Contents of the options file."""
    config = decoding_config(table, allow_static=allow_static, force=force)
    return {"speculative_config": config} if config else {}


def serve_arguments(table: SpeculationTable) -> list[str]:
    """The command without its options file."""
    return ["trtllm-serve", table.model, "--backend", "pytorch", "--max_batch_size", str(table.max_batch)]


def findings(table: SpeculationTable) -> list[Finding]:
    """Every limit of the table's version that its schedule meets; none for a table of one length."""
    if only_length(table) is not None:
        return []
    if gap := _missing(table.engine_version):
        return [error("version", gap)]
    meaning = key_meaning(table.engine_version)
    first = table.segments[0].draft_length
    if first == 0:
        return [error("first", f"{SCHEDULE} must start with max_draft_len, which is > 0, got draft length 0")]
    config = {"max_draft_len": first, SCHEDULE: _schedule(table)}
    return [
        *check_first(config, meaning),
        *check_lengths(config),
        *check_order(config, meaning),
        *check_concurrency(config, meaning),
        *check_idle(config, meaning),
        *check_method(table.method, meaning),
    ]


def check_first(config: Mapping[str, Any], meaning: KeyMeaning) -> list[Finding]:
    """The first entry holds max_draft_len; with lower bounds it is that of batch size 1."""
    entries, most = _entries(config), _max_draft_len(config)
    key = min(entries)
    if meaning is KeyMeaning.LOWER and key != 1:
        return [error("start", f"{SCHEDULE} must have key 1, got {key} as its smallest")]
    if entries[key] != most:
        return [error("first", f"{SCHEDULE} of key {key} must be max_draft_len {most}, got {entries[key]}")]
    return []


def check_lengths(config: Mapping[str, Any]) -> list[Finding]:
    """No entry above max_draft_len."""
    most = _max_draft_len(config)
    return [
        error("length", f"{SCHEDULE} must be <= max_draft_len {most}, got {length} at key {key}")
        for key, length in sorted(_entries(config).items())
        if length > most
    ]


def check_order(config: Mapping[str, Any], meaning: KeyMeaning) -> list[Finding]:
    """Lengths that do not rise with the batch, which the padding of graphs relies on where keys are upper bounds."""
    if meaning is KeyMeaning.LOWER:
        return []
    return [
        error("order", f"{SCHEDULE} must not rise with the batch size, got {after} at key {key} after {before}")
        for (_, before), (key, after) in pairwise(sorted(_entries(config).items()))
        if after > before
    ]


def check_concurrency(config: Mapping[str, Any], meaning: KeyMeaning) -> list[Finding]:
    """No max_concurrency beside a schedule of upper bounds."""
    if meaning is KeyMeaning.LOWER or config.get("max_concurrency") is None or config.get(SCHEDULE) is None:
        return []
    return [
        error("concurrency", f"max_concurrency must be left out beside {SCHEDULE}, got {config['max_concurrency']}")
    ]


def check_idle(config: Mapping[str, Any], meaning: KeyMeaning) -> list[Finding]:
    """Entries of length 0, after which a one-model drafter has lost its place."""
    keys = [key for key, length in sorted(_entries(config).items()) if length == 0]
    after = ", and requests that live through it lose acceptance" if meaning is KeyMeaning.UPPER else ""
    return [
        warning("idle", f"draft length 0 at key {key} keeps the drafter loaded, unlike no speculation{after}")
        for key in keys
    ]


def check_method(method: str, meaning: KeyMeaning) -> list[Finding]:
    """Methods whose drafter is known to read the schedule with this meaning."""
    if meaning is KeyMeaning.LOWER and method not in _READS_LOWER:
        message = f"method {method} must be ngram or draft_model where {SCHEDULE} has lower bounds: others ignore it"
        return [error("method", message, can_force=True)]
    if meaning is KeyMeaning.UPPER and method == "ngram":
        message = f"method ngram reads {SCHEDULE} as lower bounds although this version checks it as upper bounds"
        return [error("method", message, can_force=True)]
    if meaning is KeyMeaning.UPPER and method != "eagle3":
        return [warning("method", f"{SCHEDULE} reached method {method} in a later candidate than {_UPPER_BOUNDS}")]
    return []


def advice(table: SpeculationTable) -> list[str]:
    """What the command cannot say, and modes of TensorRT-LLM that act beside a table."""
    count = table.data_parallel
    replicas = [f"start {count} of these servers behind one load balancer, one a replica"] if count > 1 else []
    if _missing(table.engine_version):
        return replicas
    return [
        *replicas,
        "trtllm turns speculation off for good once its rolling acceptance falls below a threshold that is set: "
        "leave the threshold unset while comparing with the figures of this table",
    ]


def read_trtllm_schedule(config: Mapping[str, Any], version: str, max_batch: int) -> list[int]:
    """Draft length at batch size 1 to `max_batch` as `version` reads a decoding section; an empty one drafts nothing.

    >>> read_trtllm_schedule({"max_draft_len": 4, "draft_len_schedule": {2: 4, 3: 2}}, "1.3.0rc8", 5)
    [4, 4, 2, 0, 0]
    """
    if max_batch < 1:
        raise ValueError(f"max_batch must be >= 1, got {max_batch}")
    if not config:
        return [0] * max_batch
    meaning, most, limit = key_meaning(version), _max_draft_len(config), config.get("max_concurrency")
    if limit is not None and (not _is_whole(limit) or limit < 0):
        raise ValueError(f"max_concurrency must be a whole number >= 0, got {show(limit)}")
    if config.get(SCHEDULE) is None:
        return [most if limit is None or batch <= limit else 0 for batch in range(1, max_batch + 1)]
    refuse_errors([*check_first(config, meaning), *check_lengths(config), *check_concurrency(config, meaning)])
    entries = _entries(config)
    keys = sorted(entries)
    if meaning is KeyMeaning.LOWER:
        lengths = [entries[keys[bisect_right(keys, batch) - 1]] for batch in range(1, max_batch + 1)]
        return [0 if limit is not None and batch > limit else length for batch, length in enumerate(lengths, 1)]
    places = [bisect_left(keys, batch) for batch in range(1, max_batch + 1)]
    return [entries[keys[place]] if place < len(keys) else 0 for place in places]


def _schedule(table: SpeculationTable) -> dict[int, int]:
    upper = key_meaning(table.engine_version) is KeyMeaning.UPPER
    return {(part.hi if upper else part.lo): part.draft_length for part in table.segments}


def _missing(version: str) -> str | None:
    """One line if `version` has no schedule, None if it has; a version that was not checked is refused."""
    number = parse_candidate(version)
    if number < parse_candidate(_FIRST_SCHEDULE):
        return f"trtllm {version} has no {SCHEDULE} (since {_FIRST_SCHEDULE})"
    _check_known(version)
    return None


def _check_known(version: str) -> None:
    number = parse_candidate(version)
    if number < parse_candidate(_OLDEST):
        raise ValueError(f"trtllm {version} is older than {_OLDEST}, the oldest version known")
    if number[:2] > parse_candidate(_NEWEST)[:2]:
        raise ValueError(f"trtllm {version} is newer than {_NEWEST}, the newest version known")


def _decoding_type(table: SpeculationTable) -> str:
    _check_known(table.engine_version)
    if table.method not in _TYPES:
        raise ValueError(f"trtllm method must be one of {', '.join(_TYPES)}, got {table.method}")
    return _TYPES[table.method]


def _entries(config: Mapping[str, Any]) -> dict[int, int]:
    """The schedule with whole numbers as keys and values."""
    value = config.get(SCHEDULE)
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{SCHEDULE} must be a mapping of batch size to draft length, got {show(value)}")
    for key, length in value.items():
        if not _is_whole(key) or key < 1:
            raise ValueError(f"{SCHEDULE} key must be a whole number >= 1, got {show(key)}")
        if not _is_whole(length) or length < 0:
            raise ValueError(f"{SCHEDULE} of key {key} must be a whole number >= 0, got {show(length)}")
    return dict(value)


def _max_draft_len(config: Mapping[str, Any]) -> int:
    most = config.get("max_draft_len")
    if not isinstance(most, int) or not _is_whole(most) or most < 1:
        raise ValueError(f"max_draft_len must be a whole number >= 1, got {show(most)}")
    return most


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""A server's own view of a run: its Prometheus metrics before and after, and their difference.

Names are vLLM's (0.32.0): histograms ``vllm:request_queue_time_seconds``, ``..._prefill_time_...``,
``..._decode_time_...`` and ``..._inference_time_...`` count finished requests; ``vllm:cache_config_info`` carries the
KV cache as labels. Counters end in ``_total``. Engines behind one address are summed. A metric that is not there is
None, never 0.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from servecast.readers.acceptance_counters import SpeculationCounters, counters_from_text

MAX_BYTES = 64 << 20
_LINE = re.compile(r"(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?[0-9]+)?\s*")
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_DRAFTS = "vllm:spec_decode_num_drafts"
PHASES = {
    "queue": "vllm:request_queue_time_seconds",
    "prefill": "vllm:request_prefill_time_seconds",
    "decode": "vllm:request_decode_time_seconds",
    "inference": "vllm:request_inference_time_seconds",
    "e2e": "vllm:e2e_request_latency_seconds",
    "ttft": "vllm:time_to_first_token_seconds",
}
"""Histogram of each phase of a request; inference is prefill and decode."""
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
    "cached_tokens": "vllm:prefix_cache_hits_total",
    "engine_steps": "vllm:iteration_tokens_total_count",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSnapshot:
    """Running totals of one scrape."""

    source: str
    """Names the scrape in messages."""
    phase_s: dict[str, tuple[float, float]]
    """By phase: (sum [s], number of requests)."""
    totals: dict[str, float]
    """By name of :data:`COUNTERS`."""
    kv_blocks: int | None
    """Of one engine: blocks of the KV cache."""
    block_tokens: int | None
    speculation: SpeculationCounters | None
    """None where the server does not speculate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWindow:
    """What happened between two scrapes."""

    requests: int
    """Finished, by the queue time's histogram."""
    phase_s: dict[str, float]
    """By phase: sum over the window's requests. [s]"""
    phase_mean_s: dict[str, float]
    """By phase: mean of the window's requests; a phase without a request has none."""
    totals: dict[str, float]
    kv_blocks: int | None
    block_tokens: int | None
    speculation: SpeculationCounters | None
    """Differences. Acceptance at one draft length: ``counters_between`` of the two scrapes."""


def scrape(url: str, *, timeout_s: float = 10.0) -> str:
    """Text of ``/metrics``; one line of ValueError where there is none."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url must be http://HOST:PORT, got {url!r}")
    address = url.rstrip("/").removesuffix("/v1") + "/metrics"
    # loopback and cluster addresses are reached directly, whatever proxy the environment names
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=timeout_s) as answer:
            data = bytes(answer.read(MAX_BYTES + 1))
    except urllib.error.HTTPError as error:
        raise ValueError(f"{address} answered {error.code}") from None
    except OSError as error:
        raise ValueError(f"{address} could not be read: {getattr(error, 'reason', error)}") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"{address} must be at most {MAX_BYTES} bytes")
    return data.decode("utf-8", "replace")


def snapshot(text: str, *, source: str = "metrics", model: str | None = None) -> EngineSnapshot:
    """Totals of a scrape; `model` (label model_name) chooses where several are served."""
    sums: dict[str, float] = {}
    cache: dict[str, str] = {}
    for name, labels, value in _samples(text, source):
        if name == "vllm:cache_config_info":
            cache = labels  # has no model's name
        elif model is None or labels.get("model_name", model) == model:
            sums[name] = sums.get(name, 0.0) + value
    if not any(name.startswith("vllm:") for name in sums):
        raise ValueError(f"{source}: has no metric of vLLM" + (f" for model {model!r}" if model is not None else ""))
    speculation = None
    if f"{_DRAFTS}_total" in sums:
        speculation = counters_from_text(Path(source), text, model=model)
    return EngineSnapshot(
        source=source,
        phase_s={
            phase: (sums[f"{name}_sum"], sums[f"{name}_count"])
            for phase, name in PHASES.items()
            if f"{name}_sum" in sums and f"{name}_count" in sums
        },
        totals={name: sums[metric] for name, metric in COUNTERS.items() if metric in sums},
        kv_blocks=_whole(cache.get("num_gpu_blocks")),
        block_tokens=_whole(cache.get("block_size")),
        speculation=speculation,
    )


def window(first: EngineSnapshot, second: EngineSnapshot) -> EngineWindow:
    """Second less first; a total that fell is a restart, and refused."""
    phases: dict[str, tuple[float, float]] = {}
    for phase, (total, count) in second.phase_s.items():
        before = first.phase_s.get(phase, (0.0, 0.0))
        phases[phase] = (
            _risen(first, second, f"{phase} sum", before[0], total),
            _risen(first, second, f"{phase} count", before[1], count),
        )
    return EngineWindow(
        requests=round(phases.get("queue", (0.0, 0.0))[1]),
        phase_s={phase: total for phase, (total, _) in phases.items()},
        phase_mean_s={phase: total / count for phase, (total, count) in phases.items() if count > 0.0},
        totals={
            name: _risen(first, second, name, first.totals.get(name, 0.0), value)
            for name, value in second.totals.items()
        },
        kv_blocks=second.kv_blocks,
        block_tokens=second.block_tokens,
        speculation=_speculation_window(first, second),
    )


def _speculation_window(first: EngineSnapshot, second: EngineSnapshot) -> SpeculationCounters | None:
    after = second.speculation
    if after is None:
        return None
    before = first.speculation
    earlier = before.accepted_per_position if before is not None else ()
    padded = earlier + (0.0,) * (len(after.accepted_per_position) - len(earlier))

    def risen(name: str) -> float:
        start = 0.0 if before is None else getattr(before, name)
        return _risen(first, second, name, start, getattr(after, name))

    return SpeculationCounters(
        source=f"{first.source} to {second.source}",
        drafts=risen("drafts"),
        draft_tokens=risen("draft_tokens"),
        accepted_tokens=risen("accepted_tokens"),
        accepted_per_position=tuple(
            _risen(first, second, f"accepted at position {j}", old, new)
            for j, (old, new) in enumerate(zip(padded, after.accepted_per_position, strict=False))
        ),
    )


def _risen(first: EngineSnapshot, second: EngineSnapshot, name: str, before: float, after: float) -> float:
    if after < before:
        raise ValueError(
            f"{second.source}: {name} must not fall after {first.source}, got {after:g} after {before:g}: the engine "
            "restarted, or the scrapes are in the wrong order"
        )
    return after - before


def _samples(text: str, source: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("vllm:"):
            continue
        match = _LINE.fullmatch(line)
        try:
            value = float(match["value"]) if match is not None else float("nan")
        except ValueError:
            match = None
        if match is None:
            raise ValueError(f"{source}: line {number} is not Prometheus text, got {line[:60]!r}")
        yield match["name"], dict(_LABEL.findall(match["labels"] or "")), value


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdecimal() else None

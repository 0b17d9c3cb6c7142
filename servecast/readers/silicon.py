"""The measured-server table of AIConfigurator (``silicon_sample.csv`` and files laid out like it), one row per run.

Two conventions of that table need translation. *Parallel widths*: where tensor and expert parallelism were both
switched on, a part of the rows states their product (the run ``tp8 ep8`` stands as 64 = 8 x 8 ranks, with timings
identical to its twin that states 8), and where attention is data parallel, a part repeats the GPU count in both
``tp_size`` and ``attention_dp_size``. :func:`widths` gives back the GPUs that were there. *Load*: `batch_size` is per
attention replica, `concurrency` of the client; where `concurrency` is empty the load was not a closed loop that the
log states.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SiliconRow:
    """One measured operating point; seconds, tokens; NaN where the source is empty."""

    id: str
    group: str
    fold: int
    model: str
    system: str
    engine: str
    engine_version: str
    precision: str
    tp: int
    dp: int
    ep: int
    pp: int
    clients: float
    """In flight on one attention replica."""
    load_stated: bool
    """The client's concurrency is in the log."""
    isl: float
    osl: float
    ttft_s: float
    tpot_s: float
    aic_ttft_s: float
    aic_tpot_s: float
    wip: bool
    """Tagged work in progress by the publisher."""


def read_silicon(path: Path) -> list[SiliconRow]:
    """Rows of a table in the silicon table's own columns, in file order."""
    with path.open(newline="", encoding="utf-8") as lines:
        return [_row(record) for record in csv.DictReader(lines)]


def widths(tp: int, dp: int | None, moe_tp: int, ep: int, *, shared_load: int = 1) -> tuple[int, int, int]:
    """(tp, dp, ep) in GPUs from the widths as stated; `dp` is None where the table leaves it empty.

    `shared_load` is concurrency / batch size: above 1 without a stated `dp` it reveals attention data parallelism.

    >>> widths(64, 1, 8, 8), widths(1, 64, 8, 8), widths(4, 4, 1, 16), widths(8, 1, 1, 8)
    ((8, 1, 8), (1, 8, 8), (1, 4, 4), (8, 1, 8))
    """
    ep, moe_tp = max(ep, 1), max(moe_tp, 1)
    if dp is None:
        if ep > 1 and shared_load == tp:
            return 1, tp, min(ep, tp)
        return tp, 1, min(ep, tp)
    dp = max(dp, 1)
    if ep == moe_tp > 1 and tp * dp == moe_tp * ep:
        return (1, ep, ep) if tp == 1 else (ep, 1, ep)
    if dp > 1 and tp == dp and ep == tp * dp:
        return 1, dp, dp
    return tp, dp, min(ep, tp * dp)


def stated_precision(record: Mapping[str, str]) -> str:
    """Weight format of a row: the GEMM's own where stated, else the run's, else 16 bit."""
    stated = record.get("gemm_quant_mode") or record.get("precision") or "bf16"
    return "bf16" if stated in {"nan", ""} else stated


def stated_load(record: Mapping[str, str]) -> tuple[int, int, int, float]:
    """(tp, dp, ep, clients of one attention replica) of a row in the table's own columns; NaN where no load stands.

    Raises
    ------
    ValueError : a column is not a number.
    """
    batch, concurrency = _number(record, "batch_size"), _number(record, "concurrency")
    tp, stated_dp = max(_whole(record, "tp_size"), 1), _number(record, "attention_dp_size")
    shared = int(concurrency // batch) if concurrency > 0 and batch > 0 else 1
    given = None if math.isnan(stated_dp) else int(stated_dp)
    gpus_tp, dp, ep = widths(
        tp, given, _whole(record, "moe_tp_size"), _whole(record, "moe_ep_size"), shared_load=shared
    )
    # where the stated widths were products, so is the number of replicas that share the load
    inflated = gpus_tp * dp != tp * max(given or 1, 1)
    by_client = not math.isnan(concurrency) and (inflated or math.isnan(batch))
    return gpus_tp, dp, ep, concurrency / dp if by_client else batch


def _row(record: Mapping[str, str]) -> SiliconRow:
    tp, dp, ep, clients = stated_load(record)
    return SiliconRow(
        id=record.get("id", ""),
        group=record.get("group", ""),
        fold=int(record.get("fold") or -1),
        model=record["model_path"],
        system=record["system"],
        engine=record["backend"],
        engine_version=record.get("backend_version", ""),
        precision=stated_precision(record),
        tp=tp,
        dp=dp,
        ep=ep,
        pp=max(_whole(record, "pp_size"), 1),
        clients=clients,
        load_stated=bool(record.get("concurrency")),
        isl=_number(record, "isl"),
        osl=_number(record, "osl"),
        ttft_s=_number(record, "silicon_ttft_ms") * 1e-3,
        tpot_s=_number(record, "silicon_tpot_ms") * 1e-3,
        aic_ttft_s=_number(record, "aic_ttft_ms") * 1e-3,
        aic_tpot_s=_number(record, "aic_tpot_ms") * 1e-3,
        wip=record.get("wip", "").startswith("1"),
    )


def _number(record: Mapping[str, str], name: str) -> float:
    text = (record.get(name) or "").strip()
    try:
        value = float(text) if text else math.nan
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text[:40]!r}") from None
    if math.isinf(value):
        raise ValueError(f"{name} must be finite, got {text[:40]!r}")
    return value


def _whole(record: Mapping[str, str], name: str) -> int:
    value = _number(record, name)
    return 0 if math.isnan(value) else int(value)


def inconsistent_series(rows: Iterable[SiliconRow], *, drop: float = 0.7) -> set[str]:
    """Ids of runs in a series whose TPOT falls below `drop` of its own value at a smaller load.

    A series is one configuration and length pair at rising load. More sequences never make a step 30 % shorter, so such
    a series measured something else (another build, a partial run); fits leave it out, scores show it apart.
    """
    series: dict[tuple[object, ...], list[SiliconRow]] = {}
    for row in rows:
        key = (row.group, row.engine_version, row.precision, row.tp, row.dp, row.ep, row.isl, row.osl)
        series.setdefault(key, []).append(row)
    flagged: set[str] = set()
    for members in series.values():
        ordered = sorted(members, key=lambda row: row.clients)
        for row in ordered:
            before = [other.tpot_s for other in ordered if other.clients < row.clients]
            if before and row.tpot_s < drop * max(before):
                flagged |= {member.id for member in ordered}
                break
    return flagged

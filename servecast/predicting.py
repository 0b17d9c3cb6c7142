"""Operating points from a table or from flags, and their predictions."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.deployment import Deployment, divisibility_error
from servecast.model.forecast import Points, Profile, bounds, forecast
from servecast.policies import parse_engine
from servecast.readers.deployments import deployment
from servecast.readers.silicon import stated_load, stated_precision

COLUMNS = ("model", "gpu", "engine", "precision", "tp", "pp", "dp", "ep", "concurrency", "isl", "osl")
"""Columns of an input table; precision, tp, pp, dp and ep may be left out."""
REQUIRED = ("model", "gpu", "engine", "concurrency", "isl", "osl")
SILICON_NAMES = {"model_path": "model", "system": "gpu", "backend": "engine", "tp_size": "tp", "pp_size": "pp"}
"""The measured-server table's own names, where they differ."""
RESULTS = ("ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s")
NODE_GPUS = 8
"""GPUs of a usual node."""
MAX_DEGREE = 65536
MAX_ROWS = 5_000_000
MAX_LINE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One operating point as asked; `clients` are those of one attention replica."""

    model: str
    gpu: str
    engine: str
    precision: str = "auto"
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    concurrency: float
    isl: float
    osl: float
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Prediction of one point; every number None where the status is not ``ok`` or ``extrapolated``."""

    status: str
    reason: str = ""
    values: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """(value, lo, hi) by result name."""


def predict(points: Sequence[Point | str], *, profile: str = SHIPPED) -> list[Outcome]:
    """Predict every point; a string stands for a row that could not be read, and says why."""
    loaded = load_profile(profile)
    outcomes: dict[int, Outcome] = {}
    # position in `made`, or why there is no such deployment
    known: dict[tuple[object, ...], int | str] = {}
    made: list[Deployment] = []
    engines: list[str] = []
    kept: list[int] = []
    asked: list[Point] = []
    index: list[int] = []
    for position, point in enumerate(points):
        if isinstance(point, str):
            outcomes[position] = Outcome(status="unsupported", reason=point)
            continue
        key = (point.model, point.gpu, point.engine, point.precision, point.tp, point.pp, point.dp, point.ep)
        if key not in known:
            one = _deployment(point)
            if isinstance(one, str):
                known[key] = one
            else:
                known[key] = len(made)
                made.append(one)
                engines.append(parse_engine(point.engine)[0])
        found = known[key]
        if isinstance(found, str):
            outcomes[position] = Outcome(status="unsupported", reason=found)
            continue
        kept.append(position)
        asked.append(point)
        index.append(found)
    if kept:
        outcomes.update(zip(kept, _forecast(loaded, made, engines, np.array(index), asked), strict=True))
    return [outcomes[position] for position in range(len(points))]


def _forecast(
    profile: Profile,
    made: Sequence[Deployment],
    engines: Sequence[str],
    index: NDArray[np.intp],
    asked: Sequence[Point],
) -> list[Outcome]:
    """Outcomes of points that run ``made[index[i]]`` on ``engines[index[i]]``."""
    replicas = np.array([one.dp for one in made])[index]
    clients = np.array([row.concurrency for row in asked]) / replicas
    isl, osl = np.array([row.isl for row in asked]), np.array([row.osl for row in asked])
    points = Points(deployments=tuple(made), engines=tuple(engines), index=index, clients=clients, isl=isl, osl=osl)
    result = forecast(profile, points)
    ttft, tpot = result.ttft_s, result.tpot_s
    ttft_lo, ttft_hi = bounds(profile, points, "ttft", ttft)
    tpot_lo, tpot_hi = bounds(profile, points, "tpot", tpot)
    in_flight = clients * replicas
    after = np.maximum(osl - 1.0, 0.0)
    columns = {
        "ttft_s": (ttft, ttft_lo, ttft_hi),
        "tpot_s": (tpot, tpot_lo, tpot_hi),
        "e2e_s": tuple(t + after * p for t, p in ((ttft, tpot), (ttft_lo, tpot_lo), (ttft_hi, tpot_hi))),
    }
    e2e, e2e_lo, e2e_hi = columns["e2e_s"]
    columns["output_tokens_per_s"] = (in_flight * osl / e2e, in_flight * osl / e2e_hi, in_flight * osl / e2e_lo)
    reasons = [_outside(profile, one) for one in made]
    table = {name: np.stack(triple, axis=1).tolist() for name, triple in columns.items()}
    outcomes: list[Outcome] = []
    for i, point in enumerate(asked):
        if not math.isfinite(ttft[i]):
            reason = _no_room(made[index[i]], result.kv_tokens[i])
            outcomes.append(Outcome(status="does_not_fit", reason=reason))
            continue
        outside = [text for text in (reasons[index[i]], _range(profile, point, clients[i])) if text]
        outcomes.append(
            Outcome(
                status="extrapolated" if outside else "ok",
                reason="; ".join([point.note, *outside] if point.note else outside),
                values={name: tuple(triples[i]) for name, triples in table.items()},
            )
        )
    return outcomes


def _deployment(point: Point) -> Deployment | str:
    """What the point names, or why there is no such deployment."""
    try:
        engine = parse_engine(point.engine)[0]
        one = deployment(
            point.model, point.gpu, engine, point.precision, tp=point.tp, pp=point.pp, dp=point.dp, ep=point.ep
        )
    except (ValueError, OSError) as error:
        return str(error)
    reason = divisibility_error(one.llm, one.tp, one.pp, one.dp, one.ep)
    # wide groups that do not divide the heads are measured, since engines pad them; other misfits cannot run
    padded = reason is not None and reason.startswith("tp must") and point.tp <= one.llm.heads
    return one if reason is None or padded else reason


def _outside(profile: Profile, one: Deployment) -> str:
    uneven = divisibility_error(one.llm, one.tp, one.pp, one.dp, one.ep)
    if uneven is not None:
        return f"{uneven}; taken as padded"
    if (one.gpu.name, one.llm.is_moe) not in profile.known_gpus:
        kind = "a mixture of experts" if one.llm.is_moe else "a dense model"
        return f"no server run of {kind} on {one.gpu.name} in the profile"
    if one.llm.name not in profile.known_models:
        return f"no server run of {one.llm.name} in the profile"
    return ""


def _range(profile: Profile, point: Point, clients: float) -> str:
    for name, value in (("clients", clients), ("isl", point.isl), ("osl", point.osl)):
        low, high = profile.ranges[name]
        if not low <= value <= high:
            return f"{name} {value:g} outside the calibrated {low:g} to {high:g}"
    return ""


def _no_room(one: Deployment, kv_tokens: float) -> str:
    need, have = one.weight_bytes_per_gpu / 1e9, one.gpu.memory_bytes / 1e9
    if kv_tokens <= 0.0:
        return f"{need:.1f} GB of weights per GPU leave no room for a cache in {have:.0f} GB"
    return f"the KV cache holds {kv_tokens:.0f} tokens, less than one prompt"


def read_points(path: Path) -> tuple[list[str], list[dict[str, str]], list[Point | str]]:
    """Column names, rows as read, and each row as a point (or as the reason why it is none).

    Raises
    ------
    ValueError : not a table with the columns of :data:`COLUMNS`, or of the measured-server table.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(_bounded(file, path))
        try:
            names = next(reader, [])
            # a short row lacks its last columns, an overlong one keeps what the header names
            rows = [
                dict(zip(names, row, strict=False)) for _, row in zip(range(MAX_ROWS + 1), reader, strict=False) if row
            ]
        except csv.Error as error:
            raise ValueError(f"{path}: {error}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: is not UTF-8 text") from None
    if not names:
        raise ValueError(f"{path}: is empty")
    known = {SILICON_NAMES.get(name, name) for name in names}
    needed = [name for name in REQUIRED if name not in known and not (name == "concurrency" and "batch_size" in known)]
    if needed:
        raise ValueError(f"{path}: column {needed[0]} is missing, found {', '.join(names[:12])}")
    if not rows:
        raise ValueError(f"{path}: has a header and no rows")
    if len(rows) > MAX_ROWS:
        raise ValueError(f"{path}: has more than {MAX_ROWS} rows")
    silicon = "model_path" in names and "tp_size" in names
    stands = {ours: theirs for theirs, ours in SILICON_NAMES.items() if theirs in names}
    column = {name: stands.get(name, name) for name in COLUMNS}
    return names, rows, [_point(row, column, silicon=silicon) for row in rows]


def _bounded(lines: Any, path: Path) -> Any:
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE:
            raise ValueError(f"{path} line {number}: is longer than 1 MiB")
        if "\0" in line:
            raise ValueError(f"{path} line {number}: is not text")
        yield line


def _point(row: Mapping[str, str], column: Mapping[str, str], *, silicon: bool) -> Point | str:
    """A row as a point, or why it is none; `column` gives the table's name of each of ours."""
    text = {name: row.get(theirs, "").strip() for name, theirs in column.items()}
    try:
        isl, osl = (_positive(name, text[name], least=1.0) for name in ("isl", "osl"))
        pp = _whole("pp", text["pp"])
        if silicon and "concurrency" in row and not row["concurrency"].strip():
            raise ValueError("concurrency must be a positive number, got nothing: the log does not state the load")
        if silicon:
            precision = stated_precision(row)
            tp, dp, ep, clients = stated_load(row)
            concurrency = clients * dp
        else:
            precision = text["precision"] or "auto"
            tp, dp, ep = (_whole(name, text[name]) for name in ("tp", "dp", "ep"))
            concurrency = _positive("concurrency", text["concurrency"])
        if not concurrency > 0.0:
            raise ValueError("concurrency must be a positive number, got nothing")
        note = ""
        if not silicon and ep > 1 and tp * dp == ep * ep and tp * dp > NODE_GPUS:
            # the measured-server table states such products, and no node is that wide
            tp, dp = (ep, 1) if tp > 1 else (1, ep)
            note = f"width {ep * ep} with {ep} expert groups read as {ep} GPUs"
    except ValueError as error:
        return str(error)
    return Point(
        model=text["model"],
        gpu=text["gpu"],
        engine=text["engine"].lower(),
        precision=precision,
        tp=tp,
        pp=pp,
        dp=dp,
        ep=ep,
        concurrency=concurrency,
        isl=isl,
        osl=osl,
        note=note,
    )


def _number(name: str, rule: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} must be {rule}, got {text[:40]!r}") from None


def _whole(name: str, text: str) -> int:
    """A parallel degree; 1 where the table has none."""
    value = _number(name, "a whole number", text or "1")
    if not (0.0 <= value <= MAX_DEGREE and value == int(value)):
        raise ValueError(f"{name} must be a whole number, got {text[:40]!r}")
    return max(int(value), 1)


def _positive(name: str, text: str, *, least: float = 0.0) -> float:
    value = _number(name, "a positive number", text) if text else math.nan
    if not (0.0 < value < 1e12 and value >= least):
        rule = f"at least {least:g}" if 0.0 < value < least else "a positive number"
        raise ValueError(f"{name} must be {rule}, got {repr(text[:40]) if text else 'nothing'}")
    return value


def table_text(names: Sequence[str], rows: Sequence[Mapping[str, str]], outcomes: Sequence[Outcome]) -> str:
    """CSV of the input columns followed by the results; a result is empty where there is none."""
    added = [f"{name}{end}" for name in RESULTS for end in ("", "_lo", "_hi")] + ["status", "reason"]
    kept = [name for name in names if name not in added]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*kept, *added])
    for row, outcome in zip(rows, outcomes, strict=True):
        numbers = [
            "" if name not in outcome.values else f"{value:.6g}"
            for name in RESULTS
            for value in outcome.values.get(name, ("", "", ""))
        ]
        writer.writerow([*(row.get(name) or "" for name in kept), *numbers, outcome.status, outcome.reason])
    return out.getvalue()


def outcome_document(point: Point, outcome: Outcome) -> dict[str, Any]:
    """One prediction as the documented JSON object."""
    return {
        "schema": "servecast.prediction/1",
        **{name: getattr(point, name) for name in COLUMNS},
        "status": outcome.status,
        "reason": outcome.reason,
        **{
            name: dict(zip(("value", "lo", "hi"), outcome.values[name], strict=True))
            if name in outcome.values
            else None
            for name in RESULTS
        },
    }

"""The measured-server table: widths and loads as the runs had them, and runs that contradict themselves."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.readers.silicon import SiliconRow, inconsistent_series, read_silicon, stated_precision, widths

HEADER = (
    "id,group,fold,model_path,system,precision,backend,backend_version,mode,isl,osl,batch_size,concurrency,tp_size,"
    "silicon_ttft_ms,silicon_tpot_ms,aic_ttft_ms,aic_tpot_ms,aic_error,gemm_quant_mode,moe_quant_mode,pp_size,"
    "attention_dp_size,moe_tp_size,moe_ep_size,measured_date,wip"
)
DEFAULTS = {
    "id": "x",
    "group": "g",
    "fold": "1",
    "model_path": "m",
    "system": "h200_sxm",
    "backend": "vllm",
    "isl": "1024",
    "osl": "128",
    "batch_size": "16",
    "concurrency": "16",
    "tp_size": "8",
    "silicon_ttft_ms": "100",
    "silicon_tpot_ms": "10",
}


def table(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, HEADER.split(","), restval="")
        writer.writeheader()
        writer.writerows(DEFAULTS | row for row in rows)
    return path


def row(tmp_path: Path, **fields: str) -> SiliconRow:
    return read_silicon(table(tmp_path / "agg.csv", fields))[0]


# ---- widths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "dp", "moe_tp", "ep", "expected"),
    [
        # Origin: aic-silicon rows; the twin run of the first, third and fifth states the plain widths with equal
        # timings.
        (64, 1, 8, 8, (8, 1, 8)),  # tp8 ep8, stated as the product
        (8, 1, 1, 8, (8, 1, 8)),
        (1, 64, 8, 8, (1, 8, 8)),  # attention data parallel, product again
        (1, 8, 1, 8, (1, 8, 8)),
        (16, 1, 4, 4, (4, 1, 4)),
        (1, 16, 4, 4, (1, 4, 4)),
        # the GPU count stands in both tp and dp
        (4, 4, 1, 16, (1, 4, 4)),
        (2, 2, 1, 4, (1, 2, 2)),
        # nothing to translate
        (1, 1, 1, 1, (1, 1, 1)),
        (8, 1, 8, 1, (8, 1, 1)),
        (4, 1, 4, 1, (4, 1, 1)),
        (64, 1, 64, 1, (64, 1, 1)),
        (2, 0, 0, 0, (2, 1, 1)),
    ],
)
def test_widths_in_gpus(tp: int, dp: int, moe_tp: int, ep: int, expected: tuple[int, int, int]) -> None:
    assert widths(tp, dp, moe_tp, ep) == expected


@pytest.mark.parametrize(
    ("tp", "moe_tp", "ep", "shared_load", "expected"),
    [
        # Origin: hand. Where the replica count is not stated, a client load that is tp times the batch reveals it.
        (8, 1, 8, 8, (1, 8, 8)),
        (4, 1, 4, 4, (1, 4, 4)),
        (8, 2, 4, 8, (1, 8, 4)),
        (4, 1, 4, 1, (4, 1, 4)),
        (4, 4, 1, 1, (4, 1, 1)),
        (2, 1, 1, 2, (2, 1, 1)),
    ],
)
def test_widths_without_a_stated_replica_count(
    tp: int, moe_tp: int, ep: int, shared_load: int, expected: tuple[int, int, int]
) -> None:
    assert widths(tp, None, moe_tp, ep, shared_load=shared_load) == expected


@given(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8, 16]), st.data())
def test_consistent_widths_stay_as_they_are(tp: int, dp: int, data: st.DataObject) -> None:
    # Origin: invariance. Attention ranks = expert ranks (tp dp = moe_tp ep) is the plain convention, but for two
    # patterns that the table uses for something else: moe_tp = ep > 1, and tp = dp with ep = tp dp.
    gpus = tp * dp
    ep = data.draw(st.sampled_from([width for width in (1, 2, 4, 8, 16) if gpus % width == 0]))
    moe_tp = gpus // ep
    if (ep == moe_tp > 1) or (dp > 1 and tp == dp and ep == gpus):
        return
    assert widths(tp, dp, moe_tp, ep) == (tp, dp, ep)


def test_twins_of_the_table_get_the_same_widths(data_path: Callable[..., Path]) -> None:
    # Origin: the data. One run stands in several rows (equal timings to four digits) with different stated widths.
    path = data_path("aic-silicon", "agg.csv")
    twins = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for record, found in zip(csv.DictReader(file), read_silicon(path), strict=True):
            names = ("model_path", "system", "backend", "isl", "osl", "silicon_ttft_ms", "silicon_tpot_ms")
            twins[tuple(record[name] for name in names)].append((record, found))
    disagreeing = 0
    for runs in twins.values():
        stated = {tuple(r[n] for n in ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")) for r, _ in runs}
        disagreeing += len(stated) > 1
        assert len({(one.tp, one.dp, one.ep, one.clients) for _, one in runs}) == 1
    assert disagreeing >= 50


def test_no_row_of_the_table_runs_on_more_gpus_than_a_rack_has(data_path: Callable[..., Path]) -> None:
    # Origin: hardware. 8 GPUs a node, 72 in a GB200 rack; two nodes of HGX at most otherwise.
    for one in read_silicon(data_path("aic-silicon", "agg.csv")):
        assert one.tp * one.dp * one.pp <= (72 if one.system.startswith("gb") else 16), one.id
        assert one.tp * one.dp % one.ep == 0, one.id


# ---- one row -----------------------------------------------------------------------------------------------------


def test_a_row_in_si_units(tmp_path: Path) -> None:
    # Origin: hand.
    one = row(
        tmp_path,
        id="a",
        aic_ttft_ms="50",
        aic_tpot_ms="",
        precision="fp8",
        backend_version="0.12.0",
        wip="1",
        pp_size="2",
        moe_tp_size="8",
        moe_ep_size="1",
        attention_dp_size="1",
    )
    assert (one.ttft_s, one.tpot_s, one.aic_ttft_s) == pytest.approx((0.1, 0.01, 0.05), rel=1e-12)
    assert math.isnan(one.aic_tpot_s)
    assert (one.tp, one.dp, one.ep, one.pp, one.clients) == (8, 1, 1, 2, 16.0)
    assert (one.precision, one.engine, one.engine_version, one.fold, one.wip) == ("fp8", "vllm", "0.12.0", 1, True)
    assert one.load_stated


@pytest.mark.parametrize(
    ("batch", "concurrency", "tp", "dp", "moe_tp", "ep", "clients"),
    [
        # Origin: the data's own notes: batch_size is per attention replica, concurrency of the client.
        ("16", "16", "8", "1", "1", "8", 16.0),
        ("32", "256", "1", "8", "1", "8", 32.0),
        ("4", "256", "1", "64", "8", "8", 32.0),  # divided by the product of the widths: 256 clients on 8 replicas
        ("16", "64", "1", "16", "4", "4", 16.0),
    ],
)
def test_clients_of_one_replica(
    tmp_path: Path, batch: str, concurrency: str, tp: str, dp: str, moe_tp: str, ep: str, clients: float
) -> None:
    one = row(
        tmp_path,
        batch_size=batch,
        concurrency=concurrency,
        tp_size=tp,
        attention_dp_size=dp,
        moe_tp_size=moe_tp,
        moe_ep_size=ep,
    )
    assert one.clients == pytest.approx(clients, rel=1e-12)


def test_a_load_that_the_log_does_not_state(tmp_path: Path) -> None:
    one = row(tmp_path, concurrency="")
    assert not one.load_stated
    assert one.clients == 16.0


@pytest.mark.parametrize(
    ("gemm", "precision", "expected"),
    [("nvfp4", "fp4", "nvfp4"), ("", "fp8", "fp8"), ("", "", "bf16"), ("nan", "fp8", "bf16")],
)
def test_precision_of_a_row(gemm: str, precision: str, expected: str) -> None:
    # Origin: the data's own notes: "empty means unquantised where precision is also empty".
    assert stated_precision({"gemm_quant_mode": gemm, "precision": precision}) == expected


def test_the_whole_table_is_read(data_path: Callable[..., Path]) -> None:
    # Origin: the data's own notes: 2 281 rows, folds 0-4; the flagged model has 21 rows.
    rows = read_silicon(data_path("aic-silicon", "agg.csv"))
    assert len(rows) == 2281
    assert {one.fold for one in rows} == {0, 1, 2, 3, 4}
    assert sum(one.model == "nvidia/Llama-3.1-8B-Instruct-FP8" for one in rows) == 21
    assert all(one.ttft_s > 0.0 and one.tpot_s > 0.0 and one.clients >= 1.0 for one in rows)


# ---- series that contradict themselves ------------------------------------------------------------------------


@pytest.fixture
def series(tmp_path: Path) -> list[SiliconRow]:
    template = row(tmp_path)
    tpot = {1: 0.010, 4: 0.012, 16: 0.020, 64: 0.040}
    return [replace(template, id=f"c{c}", clients=float(c), tpot_s=value) for c, value in tpot.items()]


def test_a_rising_series_is_consistent(series: list[SiliconRow]) -> None:
    assert inconsistent_series(series) == set()


@pytest.mark.parametrize(("value", "flagged"), [(0.0085, False), (0.0083, True)])
def test_a_fall_below_seven_tenths_flags_the_whole_series(
    series: list[SiliconRow], value: float, flagged: bool
) -> None:
    # Origin: hand. 0.7 x 12 ms = 8.4 ms at the next load.
    broken = [replace(one, tpot_s=value) if one.id == "c16" else one for one in series]
    assert inconsistent_series(broken) == ({one.id for one in series} if flagged else set())


def test_the_order_of_rows_does_not_matter(series: list[SiliconRow]) -> None:
    broken = [replace(one, tpot_s=0.001) if one.id == "c64" else one for one in series]
    assert inconsistent_series(broken) == inconsistent_series(broken[::-1]) == {one.id for one in series}


def test_other_configurations_are_other_series(series: list[SiliconRow]) -> None:
    # Origin: hand. Half the step time at a larger load on twice the GPUs contradicts nothing.
    other = [replace(one, id=f"{one.id}'", tp=16, tpot_s=one.tpot_s / 4) for one in series]
    assert inconsistent_series([*series, *other]) == set()
    longer = [replace(one, id=f"{one.id}''", isl=4096.0, tpot_s=one.tpot_s / 4) for one in series]
    assert inconsistent_series([*series, *longer]) == set()


def test_repeats_of_one_load_are_no_contradiction(series: list[SiliconRow]) -> None:
    # Origin: hand. Two runs at the same load may differ; only a smaller load counts.
    repeat = replace(series[0], id="again", tpot_s=0.001)
    assert inconsistent_series([series[0], repeat]) == set()


def test_few_rows_of_the_table_contradict_themselves(data_path: Callable[..., Path]) -> None:
    # Origin: regression (weakest). 34 of 2 281 when this was written; a rule that flags more hides errors of the model.
    rows = read_silicon(data_path("aic-silicon", "agg.csv"))
    assert 0 < len(inconsistent_series(rows)) <= 60

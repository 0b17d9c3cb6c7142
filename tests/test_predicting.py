"""Predictions of operating points. Expected values: the public silicon table's own rows under two spellings, identities
between the results (Little's law, e2e), and rules of monotony."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.predicting import (
    COLUMNS,
    RESULTS,
    Outcome,
    Point,
    outcome_document,
    predict,
    read_points,
    table_text,
)

DataPath = Callable[..., Path]
Table = tuple[list[str], list[dict[str, str]], list[Point | str]]

HEADER = ",".join(COLUMNS)
GOOD = "llama-3.1-8b,h100,vllm,auto,1,1,1,1,16,1000,200"
STATUSES = {"ok", "extrapolated", "does_not_fit", "unsupported"}


def point(**changed: Any) -> Point:
    given_: dict[str, Any] = {
        "model": "llama-3.1-8b",
        "gpu": "h100",
        "engine": "vllm",
        "concurrency": 16.0,
        "isl": 1000.0,
        "osl": 200.0,
    }
    return Point(**{**given_, **changed})


def value(outcome: Outcome, name: str) -> float:
    return outcome.values[name][0]


def write(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "rows.csv"
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


@pytest.fixture(scope="module")
def silicon(data_path: DataPath) -> Table:
    return read_points(data_path("aic-silicon", "agg.csv"))


@pytest.fixture(scope="module")
def predicted(silicon: Table) -> list[Outcome]:
    return predict(silicon[2])


# ---- the silicon table ---------------------------------------------------------------------------------


def test_every_row_has_a_status_and_nearly_all_numbers(silicon: Table, predicted: list[Outcome]) -> None:
    """Documented: coverage of at least 95 % of the 2281 aggregated rows; without numbers there is a reason."""
    assert len(predicted) == len(silicon[1]) == 2281
    assert {one.status for one in predicted} <= STATUSES
    with_numbers = [one for one in predicted if one.values]
    assert len(with_numbers) >= 0.95 * 2281
    assert {one.status for one in with_numbers} <= {"ok", "extrapolated"}
    assert all(one.reason for one in predicted if one.status != "ok")


def test_intervals_of_the_table(predicted: list[Outcome]) -> None:
    """Rules: finite and positive, lo <= value <= hi."""
    for name in RESULTS:
        numbers = np.array([one.values[name] for one in predicted if one.values])
        assert np.all(np.isfinite(numbers))
        assert np.all(numbers > 0.0)
        assert np.all(numbers[:, 1] <= numbers[:, 0])
        assert np.all(numbers[:, 0] <= numbers[:, 2])


def test_identities_of_the_table(silicon: Table, predicted: list[Outcome]) -> None:
    """Definitions: e2e = ttft + (osl - 1) tpot; Little: output rate = requests in flight x osl / e2e."""
    both = [(p, o) for p, o in zip(silicon[2], predicted, strict=True) if isinstance(p, Point) and o.values]
    osl, in_flight = (np.array([getattr(p, name) for p, _ in both]) for name in ("osl", "concurrency"))
    ttft, tpot, e2e, rate = (np.array([o.values[name] for _, o in both]) for name in RESULTS)
    np.testing.assert_allclose(e2e, ttft + (osl - 1.0)[:, np.newaxis] * tpot, rtol=1e-12)
    np.testing.assert_allclose(rate, (in_flight * osl)[:, np.newaxis] / e2e[:, [0, 2, 1]], rtol=1e-12)


def test_order_of_rows_does_not_matter(silicon: Table, predicted: list[Outcome]) -> None:
    """Relabelling: a shuffled table gives the shuffled answers; a row alone gives its own."""
    order = np.random.default_rng(7).permutation(len(predicted))
    again = predict([silicon[2][i] for i in order])
    for i, found in zip(order, again, strict=True):
        assert (found.status, found.reason) == (predicted[i].status, predicted[i].reason)
        for name in found.values:
            np.testing.assert_allclose(found.values[name], predicted[i].values[name], rtol=1e-9)
    alone = predict([silicon[2][0]])[0]
    np.testing.assert_allclose(alone.values["tpot_s"], predicted[0].values["tpot_s"], rtol=1e-9)


def plainly_stated(row: dict[str, str]) -> bool:
    """Widths and load mean the same in both spellings: no data or expert parallelism, as many clients as the batch."""
    single = all(row[name] in {"", "0", "1"} for name in ("attention_dp_size", "moe_ep_size"))
    return single and bool(row["gemm_quant_mode"]) and row["concurrency"] == row["batch_size"] != ""


def test_our_column_names_give_the_same_numbers(silicon: Table, predicted: list[Outcome], tmp_path: Path) -> None:
    """The same rows under both spellings; at least half of the table translates one to one."""
    kept = [i for i, row in enumerate(silicon[1]) if plainly_stated(row)]
    assert len(kept) >= 1000
    names = ("model_path", "system", "backend", "gemm_quant_mode", "tp_size", "pp_size", "batch_size", "isl", "osl")
    ours = "model,gpu,engine,precision,tp,pp,concurrency,isl,osl"
    path = write(tmp_path, *(",".join(silicon[1][i][name] for name in names) for i in kept), header=ours)
    for i, found in zip(kept, predict(read_points(path)[2]), strict=True):
        assert found.status == predicted[i].status
        for name in found.values:
            np.testing.assert_allclose(found.values[name], predicted[i].values[name], rtol=1e-12)


def test_table_of_results(silicon: Table, predicted: list[Outcome]) -> None:
    """Documented: inputs, then each result with _lo and _hi, status and reason; six digits, empty where none."""
    names, rows, _ = silicon
    found = list(csv.DictReader(io.StringIO(table_text(names, rows, predicted))))
    assert list(found[0])[: len(names)] == names
    ends = [f"{name}{end}" for name in RESULTS for end in ("", "_lo", "_hi")]
    assert list(found[0])[len(names) :] == [*ends, "status", "reason"]
    for row, record, outcome in zip(rows, found, predicted, strict=True):
        assert record["status"] == outcome.status
        assert {name: record[name] for name in names} == row
        if outcome.values:
            assert float(record["ttft_s"]) == pytest.approx(value(outcome, "ttft_s"), rel=1e-5)
        else:
            assert record["ttft_s"] == ""


# ---- rows of a user ------------------------------------------------------------------------------------


def test_columns_that_may_be_left_out(tmp_path: Path) -> None:
    """Rule: precision auto and widths of 1 are the defaults, whether the column is absent or empty."""
    short = read_points(
        write(tmp_path, "llama-3.1-8b,h100,vllm,16,1000,200", header="model,gpu,engine,concurrency,isl,osl")
    )
    empty = read_points(write(tmp_path, "llama-3.1-8b,h100,vllm,,,,,,16,1000,200"))
    assert short[2] == empty[2] == read_points(write(tmp_path, GOOD))[2] == [point()]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (GOOD.replace("16,", "many,"), "number"),
        (GOOD.replace("16,", "nan,"), "concurrency must be a positive number"),
        (GOOD.replace("16,", "-1,"), "concurrency must be a positive number"),
        (GOOD.replace("16,", "inf,"), "concurrency must be a positive number"),
        (GOOD.replace("16,", ","), "concurrency must be a positive number, got nothing"),
        (GOOD.replace("1000", "0"), "isl must be a positive number"),
        (GOOD.replace(",200", ","), "osl must be a positive number, got nothing"),
        (GOOD.replace("auto,1", "auto,1.5"), "tp must be a whole number"),
        (GOOD.replace("auto,1", "auto,-2"), "tp must be a whole number"),
        (GOOD.replace("auto,1", "auto,64"), "tp must divide the 32 attention heads"),
        (GOOD.replace("llama-3.1-8b", "llama-3.1-9b"), "nearest: .*Llama-3.1-8B"),
        (GOOD.replace("h100", "h101"), "gpu must be a catalogue name, got 'h101'"),
        (GOOD.replace("vllm", "llama.cpp"), "engine must be one of vllm, sglang, trtllm"),
        (GOOD.replace("auto", "fp3"), "fp3"),
        ("llama-3.1-8b,h100,vllm", "must be a positive number, got nothing"),
    ],
)
def test_a_bad_row_says_why_and_spares_the_others(row: str, reason: str, tmp_path: Path) -> None:
    """Rule: status unsupported with the reason, no numbers; the rows around it are as if it were not there."""
    before, bad, after = predict(read_points(write(tmp_path, GOOD, row, GOOD))[2])
    assert (bad.status, dict(bad.values)) == ("unsupported", {})
    assert re.search(reason, bad.reason)
    assert before.values == after.values == predict([point()])[0].values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (HEADER + "\n", "has a header and no rows"),
        (GOOD + "\n", "column model is missing"),
        (HEADER.replace(",isl", "") + "\n" + GOOD + "\n", "column isl is missing"),
        (HEADER + "\n" + "x" * (2 << 20) + "\n", "longer than 1 MiB"),
        (HEADER + "\n" + GOOD + "\0\n", "is not text"),
    ],
)
def test_no_table(text: str, message: str, tmp_path: Path) -> None:
    """Rule: one line that names the file and what is wrong."""
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_points(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit() -> None:
    """Hand: 70.55e9 parameters of 2 bytes are 141.1 GB; an L40S has 48 GB."""
    found = predict([point(model="llama-3.1-70b", gpu="l40s")])[0]
    assert (found.status, dict(found.values)) == ("does_not_fit", {})
    assert "141.1 GB" in found.reason
    assert "48 GB" in found.reason


def test_outside_the_profile_is_extrapolated() -> None:
    """Rule: numbers stay, the status and the reason say what left the range."""
    for changed, word in (({"gpu": "l40s"}, "l40s"), ({"isl": 60_000.0}, "isl"), ({"concurrency": 1e5}, "clients")):
        found = predict([point(**changed)])[0]
        assert found.status == "extrapolated"
        assert word in found.reason
        assert math.isfinite(value(found, "ttft_s"))
    assert predict([point()])[0].status == "ok"


def test_nothing_in_nothing_out() -> None:
    assert predict([]) == []


def test_document_of_a_point() -> None:
    """Documented: the inputs, each result as {value, lo, hi} or null."""
    document = outcome_document(point(), predict([point()])[0])
    assert [document[name] for name in ("model", "tp", "concurrency")] == ["llama-3.1-8b", 1, 16.0]
    assert all(set(document[name]) == {"value", "lo", "hi"} for name in RESULTS)
    missing = outcome_document(point(gpu="x"), predict([point(gpu="x")])[0])
    assert [missing[name] for name in RESULTS] == [None] * 4


# ---- physics -------------------------------------------------------------------------------------------


def series(name: str, points: Sequence[Point]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([value(one, name) for one in predict(points)])


@given(
    st.sampled_from(["vllm", "sglang", "trtllm"]),
    st.sampled_from(["h100", "h200", "b200", "l40s"]),
    st.lists(st.integers(1, 256), min_size=2, max_size=6, unique=True),
    st.integers(128, 8000),
    st.integers(100, 2000),
)
@settings(max_examples=40)
def test_more_clients_are_slower_each_and_faster_together(
    engine: str, gpu: str, clients: list[int], isl: int, osl: int
) -> None:
    """Rule: TPOT and the rate of all do not fall with the number of clients, outputs as long as calibrated."""
    points = [
        point(engine=engine, gpu=gpu, concurrency=float(n), isl=float(isl), osl=float(osl)) for n in sorted(clients)
    ]
    for name in ("tpot_s", "output_tokens_per_s"):
        numbers = series(name, points)
        assert np.all(np.diff(numbers) >= -1e-3 * numbers[1:])


@given(
    st.sampled_from(["h100", "b200", "l40s"]), st.lists(st.integers(128, 16000), min_size=2, max_size=6, unique=True)
)
@settings(max_examples=40)
def test_longer_prompts_take_longer(gpu: str, lengths: list[int]) -> None:
    """Rule: TTFT and TPOT do not fall with the prompt's length."""
    points = [point(gpu=gpu, isl=float(n), concurrency=4.0) for n in sorted(lengths)]
    for name in ("ttft_s", "tpot_s"):
        numbers = series(name, points)
        assert np.all(np.diff(numbers) >= -1e-3 * numbers[1:])


def test_a_step_is_not_faster_than_memory() -> None:
    """Hand: reading 15.0 GB of weights (8.03e9 parameters of 2 bytes, less the input table) at 3.35 TB/s is 4.5 ms."""
    assert value(predict([point(concurrency=1.0)])[0], "tpot_s") > 4.4e-3
    assert value(predict([point(concurrency=1.0, tp=8)])[0], "tpot_s") > 4.4e-3 / 8.0

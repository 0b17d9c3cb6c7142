"""Tables of measured cells: small files with values by hand, one-line refusals, the public sweeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.model.speculation_cells import SpeculationCells
from servecast.readers import speculation_cells as reader
from servecast.readers.speculation_cells import read_cells

HEADER = "batch_size,draft_length,tok_s_per_request\n"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(content: str | bytes) -> Path:
        path = tmp_path / "cells.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return written


def refused(path: Path, message: str, **options: Any) -> None:
    """Refusal of one line: the file, then `message`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        read_cells(path, **options)
    assert str(caught.value) == f"{path}: {message}"


def same(first: SpeculationCells, second: SpeculationCells, *, rtol: float = 1e-12) -> None:
    for name in ("batch", "gamma", "tok_s_per_request", "mean_acceptance_length", "context", "armed"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=rtol)


FULL = """model,batch_size,draft_length,tok_s_per_request,mean_acceptance_length,context_tokens,armed,remark
m,1,0,100,,512,0,off
m,1,0,90,1,512,1,idle
m,8,3, 150.5 ,2.75,,,
"""


def test_every_column(write: Write) -> None:
    # Origin: hand.
    cells = read_cells(write(FULL))
    np.testing.assert_array_equal(cells.batch, [1, 1, 8])
    np.testing.assert_array_equal(cells.gamma, [0, 0, 3])
    assert cells.gamma.dtype == np.int64
    np.testing.assert_array_equal(cells.tok_s_per_request, [100.0, 90.0, 150.5])
    np.testing.assert_array_equal(cells.mean_acceptance_length, [math.nan, 1.0, 2.75])
    np.testing.assert_array_equal(cells.context, [512, 512, math.nan])
    np.testing.assert_array_equal(cells.armed, [False, True, False])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tok_s_per_request", ("125", "80")),
        ("tpot_s", ("0.008", "0.0125")),
        ("tpot_ms", ("8", "12.5")),
        ("output_tok_s", ("125", "1280")),
    ],
)
def test_units_of_speed(write: Write, name: str, values: tuple[str, str]) -> None:
    # Origin: hand. 8 ms per token at batch 1, 12.5 ms at batch 16 where all requests yield 1280 tokens/s.
    cells = read_cells(write(f"batch_size,draft_length,{name}\n1,2,{values[0]}\n16,2,{values[1]}\n"))
    np.testing.assert_allclose(cells.tok_s_per_request, [125.0, 80.0], rtol=1e-14)


def test_of_several_speeds_the_measured_per_request_one_counts(write: Write) -> None:
    # Origin: reference page 6.2; the aggregate over the batch is 5 to 9 % lower, prefill and ramp included.
    text = "batch_size,draft_length,output_tok_s,tok_s_per_request\n64,0,2774,45.7\n"
    assert read_cells(write(text)).tok_s_per_request.tolist() == [45.7]


@settings(max_examples=30)
@given(order=st.permutations(range(8)), seed=st.integers(0, 5))
def test_order_of_columns_and_rows_is_free(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], seed: int
) -> None:
    path = tmp_path_factory.mktemp("cells") / "cells.csv"
    path.write_text(FULL, encoding="utf-8")
    expected = read_cells(path)
    table = [line.split(",") for line in FULL.splitlines()]
    rows = np.random.default_rng(seed).permutation(3)
    shuffled = [table[0], *(table[1 + i] for i in rows)]
    path.write_text("\n".join(",".join(row[i] for i in order) for row in shuffled), encoding="utf-8")
    same(read_cells(path), expected.take(rows))


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + FULL.encode(),
        FULL.replace("\n", "\r\n").encode(),
        FULL.replace("\n", "\n\n").encode(),
        ("\n" + FULL + ",,,,,,,\n\n").encode(),
        FULL.replace("m,", '"m",').replace("off", '"switched off, ""by hand"""').encode(),
        FULL.replace("idle", '"two\nlines"').encode(),
        FULL.replace("model,batch_size", " model , batch_size ").replace("m,8", "m ,8").encode(),
    ],
    ids=["byte order mark", "CRLF", "blank lines", "empty rows", "quotes", "line break in quotes", "spaces"],
)
def test_ways_to_write_the_same_table(write: Write, content: bytes) -> None:
    expected = read_cells(write(FULL))
    same(read_cells(write(content)), expected)


def test_cells_to_predict_need_no_speed(write: Write) -> None:
    path = write("batch_size,draft_length\n4,2\n8,3\n")
    assert np.isnan(read_cells(path, speed_required=False).tok_s_per_request).all()
    refused(
        path, "one of tok_s_per_request, tpot_s, tpot_ms, output_tok_s must be a column, got batch_size, draft_length"
    )
    some = write(HEADER + "4,2,\n8,3,50\n")
    np.testing.assert_array_equal(read_cells(some, speed_required=False).tok_s_per_request, [math.nan, 50.0])
    refused(some, "line 2: tok_s_per_request must be a finite number, got ''")


@pytest.mark.parametrize("label", reader.LABELS)
def test_a_file_is_one_sweep(write: Write, label: str) -> None:
    header = f"{label},{HEADER}"
    refused(
        write(header + "a,1,0,100\nb,1,2,150\n"), f"{label} must be the same in all cells of a sweep, got 'a' and 'b'"
    )
    assert read_cells(write(header + "a,1,0,100\na ,1,2,150\n")).size == 2


def test_labels_do_not_change_the_numbers(write: Write) -> None:
    plain = read_cells(write(HEADER + "1,0,100\n8,2,150\n"))
    labelled = "hardware,model," + HEADER + "H100,x,1,0,100\nH100,x,8,2,150\n"
    same(read_cells(write(labelled)), plain)
    other = "other_hardware,date," + HEADER + "H100,1,1,0,100\nA100,2,8,2,150\n"
    same(read_cells(write(other)), plain)  # columns without a meaning may differ


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (
            "batchsize,draft_length,tpot_s\n1,0,1\n",
            "column batch_size must be given (is it 'batchsize'?), got batchsize, draft_length, tpot_s",
        ),
        ("batch_size,x,tpot_s\n1,0,1\n", "column draft_length must be given, got batch_size, x, tpot_s"),
        (
            "batch_size,draft_length,tpot_s,tpot_s\n1,0,1,1\n",
            "column tpot_s must be given once, got it 2 times",
        ),
        (
            '"batch\nsize",draft_length\n',
            "column batch_size must be given (is it 'batch size'?), got batch size, draft_length",
        ),
        (HEADER, "must hold cells, got a header alone"),
        (HEADER + "\n\n", "must hold cells, got a header alone"),
        (HEADER + "x,0,100\n", "line 2: batch_size must be a finite number, got 'x'"),
        (HEADER + "1,0,100\n\n,0,100\n", "line 4: batch_size must be a finite number, got ''"),
        (HEADER + "nan,0,100\n", "line 2: batch_size must be a finite number, got 'nan'"),
        (HEADER + "1_0,0,100\n", "line 2: batch_size must be a finite number, got '1_0'"),
        (HEADER + "0,0,100\n", "line 2: batch_size must be >= 1, got 0"),
        (HEADER + "-4,0,100\n", "line 2: batch_size must be >= 1, got -4"),
        (HEADER + "1,1.5,100\n", "line 2: draft_length must be a whole number, got '1.5'"),
        (HEADER + "1,,100\n", "line 2: draft_length must be a whole number, got ''"),
        (HEADER + "1,-1,100\n", "line 2: draft_length must be in 0 to 1024, got -1"),
        (HEADER + "1,1025,100\n", "line 2: draft_length must be in 0 to 1024, got 1025"),
        (HEADER + "1,1e300,100\n", "line 2: draft_length must be in 0 to 1024, got 1e+300"),
        (HEADER + "1,0,\n", "line 2: tok_s_per_request must be a finite number, got ''"),
        (HEADER + "1,0,inf\n", "line 2: tok_s_per_request must be a finite number, got 'inf'"),
        (HEADER + "1,0,0\n", "line 2: tok_s_per_request must be > 0, got 0"),
        (HEADER + "1,0,-3\n", "line 2: tok_s_per_request must be > 0, got -3"),
        (HEADER + f"1,0,{'9' * 50}x\n", f"line 2: tok_s_per_request must be a finite number, got '{'9' * 40}'"),
        # a decimal comma, and a row cut short
        (HEADER + "1,0,100\n1,2,150,5\n", "line 3: must have 3 fields as the header has, got 4"),
        (HEADER + "1,0,100\n1,2\n", "line 3: must have 3 fields as the header has, got 2"),
        (HEADER + '1,0,"100\n1,2,150\n', "line 3: must be valid CSV, got unexpected end of data"),
        (
            "batch_size,draft_length,tok_s_per_request,armed\n1,0,100,yes\n",
            "line 2: armed must be a finite number, got 'yes'",
        ),
        ("batch_size,draft_length,tok_s_per_request,armed\n1,0,100,2\n", "line 2: armed must be 0 or 1, got 2"),
        (
            "batch_size,draft_length,tok_s_per_request,armed\n1,3,100,1\n",
            "armed goes with draft_length 0 only, got True at batch_size 1, draft_length 3",
        ),
        (
            "batch_size,draft_length,tok_s_per_request,mean_acceptance_length\n1,2,100,3.5\n",
            "mean_acceptance_length must lie in [1, draft_length + 1], got 3.5 at batch_size 1, draft_length 2",
        ),
        (
            "batch_size,draft_length,tok_s_per_request,context_tokens\n1,2,100,-5\n",
            "context must be >= 0, got -5.0 at batch_size 1, draft_length 2",
        ),
        (HEADER.encode() + b"1,0,\xff\n", "line 2 is not UTF-8 text (byte 0xff)"),
        (HEADER.encode() + b"1,0,1\x0000\n", "line 2 is not text (zero byte)"),
    ],
)
def test_refused(write: Write, content: str | bytes, message: str) -> None:
    refused(write(content), message)


def test_a_field_without_end_is_refused(write: Write) -> None:
    # Origin: the csv module's own limit of 131072 characters.
    path = write(HEADER.replace("\n", ",remark\n") + "1,0,100," + "x" * 140_000)
    refused(path, "line 2: must be valid CSV, got field larger than field limit (131072)")


def test_a_huge_file_is_refused_unread(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(HEADER + "1,0,100\n" * 200_000)
    monkeypatch.setattr(reader, "MAX_BYTES", 1 << 20)
    refused(path, "is larger than 1 MiB")
    monkeypatch.setattr(reader, "MAX_BYTES", 16 << 20)
    monkeypatch.setattr(reader, "MAX_CELLS", 1000)
    refused(path, "must hold at most 1000 cells, got 200000")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_cells(tmp_path / "missing.csv")
    refused(tmp_path, "is a directory, not a CSV table")


noise = st.binary(max_size=120) | st.text(alphabet='1234567890,."\n_-e', max_size=120).map(str.encode)


@settings(max_examples=60)
@given(content=noise | noise.map(lambda rows: HEADER.encode() + rows))
def test_any_bytes_give_cells_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "cells.csv"
    path.write_bytes(content)
    try:
        cells = read_cells(path)
    except ValueError as error:
        refusal = str(error)
    else:
        assert np.isfinite(cells.tok_s_per_request).all()
        return
    assert refusal.startswith(f"{path}: ")
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("name", "size", "batch", "gamma", "speed"),
    [
        # Origin: reference pages 6.2, 6.3, 6.5: the printed cells; TPOT 4.29 ms, 1265 tokens/s over 16 requests.
        ("dspark_v4pro_8xb300", 24, 16, 5, 128.9),
        ("sglang_qwen3_235b", 18, 64, 2, 3693 / 64),
        ("sglang_glm47_fp8", 34, 16, 1, 1265 / 16),
        ("vllm_llama31_8b_eagle3_bs1", 4, 1, 7, 1e3 / 4.29),
        ("vllm_dsv4_dspark_rocm", 14, 256, 7, 7852.42 / 256),
    ],
)
def test_public_sweeps(
    data_path: Callable[..., Path], name: str, size: int, batch: int, gamma: int, speed: float
) -> None:
    cells = read_cells(data_path("speculation", f"{name}.csv"))
    assert cells.size == size
    (found,) = cells.tok_s_per_request[(cells.batch == batch) & (cells.gamma == gamma)]
    assert found == pytest.approx(speed, rel=1e-4)

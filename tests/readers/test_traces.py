"""Reading traces: every format, every refusal, and the shipped example."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import servecast
from servecast.model.arrivals import arrival_statistics, length_statistics
from servecast.readers.trace_formats import describe_formats, match_columns
from servecast.readers.traces import FORMAT_NAMES, read_trace

PLAIN = b"t_s,n_in,n_out\n0.5,10,1\n1.5,20,2\n4.0,30,3\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n"
    "2023-11-16 18:17:04.0319600,3180,8\n"
    "2023-11-16 18:17:04.0781490,110,27\n"
)
MOONCAKE = [
    {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 3000, "input_length": 700, "output_length": 6, "hash_ids": [0, 2]},
]


def jsonl(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def writer(content: str | bytes, name: str = "trace.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return writer


FORMS = [
    pytest.param(PLAIN.decode(), [0.0, 1.0, 3.5], [10, 20, 30], id="plain"),
    pytest.param(PLAIN.decode().replace("\n", "\r\n"), [0.0, 1.0, 3.5], [10, 20, 30], id="windows line ends"),
    pytest.param("\ufeff" + PLAIN.decode(), [0.0, 1.0, 3.5], [10, 20, 30], id="byte order mark"),
    pytest.param(
        "\n\n" + PLAIN.decode().replace("\n", "\n\n").rstrip(), [0.0, 1.0, 3.5], [10, 20, 30], id="blank lines"
    ),
    pytest.param(
        'id,completion_tokens,prompt_tokens,arrival_s\na,1,10.0,0\n"b",2,20,1e0\n', [0.0, 1.0], [10, 20], id="synonyms"
    ),
    pytest.param(
        jsonl(
            [{"timestamp_s": 7, "input_tokens": 10, "output_tokens": 1}] * 1
            + [{"timestamp_s": 9.5, "input_tokens": 20, "output_tokens": 2}]
        ),
        [0.0, 2.5],
        [10, 20],
        id="plain json lines",
    ),
    pytest.param(AZURE, [0.0, 0.052, 0.098189], [4808, 3180, 110], id="azure 2023"),
    pytest.param(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 23:59:59.009930+00:00,5,1\n2024-05-11 00:00:00.009930+00:00,6,1\n",
        [0.0, 1.0],
        [5, 6],
        id="azure 2024",
    ),
    pytest.param(jsonl(MOONCAKE), [0.0, 3.0], [600, 700], id="mooncake json lines"),
    pytest.param(
        "timestamp_ms,input_length,output_length,hash_ids\n0,600,5,0 1\n3000,700,6,0 2\n",
        [0.0, 3.0],
        [600, 700],
        id="mooncake csv",
    ),
    pytest.param(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,,3.1,ChatGPT,472,18,490,API log\n45,,0.2,ChatGPT,99,0,99,API log\n47,,9,GPT-4,1087,230,1317,API log\n",
        [0.0, 42.0],
        [472, 1087],
        id="burstgpt",
    ),
    pytest.param(
        "Timestamp,Model,Request Tokens,Response_tokens\n5,ChatGPT,472,18\n47,GPT-4,1087,230\n",
        [0.0, 42.0],
        [472, 1087],
        id="burstgpt, older header",
    ),
    pytest.param(
        jsonl(
            {"input_toks": n, "output_toks": 2, "arrival_time_ns": t, "input_tok_ids": [1, 2]}
            for t, n in ((4_059_740, 7), (1_004_059_740, 8))
        ),
        [0.0, 1.0],
        [7, 8],
        id="llmservingsim workload",
    ),
    pytest.param(
        jsonl({"input_toks": n, "output_toks": 2, "arrival_time": t} for t, n in ((1.7e9, 7), (1.7e9 + 2.5, 8))),
        [0.0, 2.5],
        [7, 8],
        id="llmservingsim benchmark",
    ),
]


@pytest.mark.parametrize(("text", "t_s", "n_in"), FORMS)
@pytest.mark.parametrize("zipped", [False, True])
def test_formats(text: str, t_s: list[float], n_in: list[int], zipped: bool, write: Callable[..., Path]) -> None:
    data = text.encode()
    # a name that says nothing: formats are recognised by content
    trace = read_trace(write(gzip.compress(data) if zipped else data, "requests.dat"))
    np.testing.assert_allclose(trace.t_s, t_s, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(trace.n_in, n_in)
    assert (trace.t_s.dtype, trace.n_in.dtype, trace.n_out.dtype) == (np.float64, np.int64, np.int64)
    assert trace.name == "requests.dat"


def test_failed_burstgpt_requests_are_counted(write: Callable[..., Path]) -> None:
    rows = "Timestamp,Request tokens,Response tokens\n1,5,0\n2,5,7\n3,5,7\n4,5,0\n"
    trace = read_trace(write(rows))
    assert trace.t_s.tolist() == [0.0, 1.0]
    assert trace.notes == ("2 failed requests (0 output tokens) left out",)


@pytest.mark.parametrize(
    "text", [jsonl(MOONCAKE), "timestamp_ms,input_length,output_length,hash_ids\n0,600,5,0 1\n3000,700,6,0 2\n"]
)
def test_prefix_blocks_only_on_request(text: str, write: Callable[..., Path]) -> None:
    path = write(text)
    assert (read_trace(path).prefix_blocks, read_trace(path).block_tokens) == (None, 0)
    kept = read_trace(path, prefixes=True)
    assert (kept.prefix_blocks, kept.block_tokens) == (((0, 1), (0, 2)), 512)


def test_runs(write: Callable[..., Path]) -> None:
    path = write("run,t_s,n_in,n_out\na,0,1,1\na,2,1,1\nb,0,5,1\nb,1,6,1\n", "runs.csv.gz")
    trace = read_trace(path, run="b")
    assert (trace.name, trace.n_in.tolist(), trace.t_s.tolist()) == ("runs:b", [5, 6], [0.0, 1.0])
    with pytest.raises(ValueError, match=r"holds 2 runs; choose one with run=\.\.\.: a, b$"):
        read_trace(path)
    with pytest.raises(ValueError, match=r"has no run 'c', only a, b$"):
        read_trace(path, run="c")


def test_one_run_needs_no_choice(write: Callable[..., Path]) -> None:
    assert read_trace(write("run,t_s,n_in,n_out\na,0,1,1\na,2,1,1\n")).t_s.tolist() == [0.0, 2.0]


def test_names_of_formats_are_listed() -> None:
    assert FORMAT_NAMES == ("azure", "mooncake", "burstgpt", "llmservingsim", "plain")
    assert all(name in describe_formats() for name in FORMAT_NAMES)
    assert match_columns(["T_s", "N-in", "n out"]).n_in == "N-in"


HEAD = "t_s,n_in,n_out\n"
BAD = [
    pytest.param("", {}, "is empty", id="empty"),
    pytest.param("\n \n\n", {}, "is empty", id="only blank lines"),
    pytest.param(gzip.compress(b""), {}, "is empty", id="empty gzip"),
    pytest.param(HEAD, {}, "has a header but no requests", id="only a header"),
    pytest.param(HEAD + "0,1,1\n", {}, "must hold at least 2 requests, got 1", id="one request"),
    pytest.param(b"\x89PNG\r\n\x1a\n\0\0\0", {}, "line 1 is not UTF-8 text (byte 0x89)", id="binary"),
    pytest.param(HEAD.encode() + b"0,1,1\n1,\xff,1\n", {}, "line 3 is not UTF-8 text (byte 0xff)", id="garbled"),
    pytest.param(HEAD + "0,1,1\n1,\0,1\n", {}, "line 3 is not text (zero byte)", id="zero byte"),
    pytest.param("\ufeffa".encode("utf-16"), {}, "line 1 is not UTF-8 text", id="utf-16"),
    pytest.param(gzip.compress(PLAIN)[:-9], {}, "is a damaged gzip file", id="cut gzip"),
    pytest.param(b"\x1f\x8b\x08junkjunkjunkjunk", {}, "is a damaged gzip file", id="broken gzip"),
    pytest.param(
        "t_s,n_in\n0,1\n",
        {},
        "line 1, column n_out or output_tokens or completion_tokens is missing "
        "for a trace of format plain, found t_s, n_in",
        id="missing column",
    ),
    pytest.param(
        "TIMESTAMP,GeneratedTokens\n",
        {},
        "column contexttokens is missing for a trace of format azure",
        id="missing azure",
    ),
    pytest.param(
        "a,b\n1,2\n",
        {},
        "no known trace format has the columns a, b; accepted are azure (timestamp",
        id="unknown header",
    ),
    pytest.param("t_s;n_in;n_out\n", {}, "columns must be separated by commas", id="semicolons"),
    pytest.param("0,1,1\n1,1,1\n", {}, "column '1' appears twice", id="no header"),
    pytest.param("t_s,t_s,n_in,n_out\n", {}, "column 't_s' appears twice", id="column twice"),
    pytest.param(
        "t_s,n_in,input_tokens,n_out\n", {}, "columns n_in and input_tokens name the same quantity", id="two synonyms"
    ),
    pytest.param(HEAD + "0,1,1\n1e300,1,1\n", {}, "column t_s must span 1e+08 s at most, got 1e+300 s", id="span"),
    pytest.param(HEAD + "0,1,1\n2,1,1\n1,1,1\n", {}, "line 4, column t_s must not decrease, got '1'", id="unsorted"),
    pytest.param(HEAD + "0,1,1\nnan,1,1\n", {}, "line 3, column t_s must be a finite number, got 'nan'", id="nan time"),
    pytest.param(HEAD + "0,1,1\ninf,1,1\n", {}, "line 3, column t_s must be a finite number, got 'inf'", id="inf time"),
    pytest.param(HEAD + "-1,1,1\n0,1,1\n", {}, "line 2, column t_s must be >= 0, got '-1'", id="negative time"),
    pytest.param(
        HEAD + "0,1,1\nsoon,1,1\n", {}, "line 3, column t_s must be a number, got 'soon'", id="time is a word"
    ),
    pytest.param(HEAD + "0,1,1\n\n1,0,1\n", {}, "line 4, column n_in must be at least 1, got '0'", id="zero tokens"),
    pytest.param(
        HEAD + "0,1,1\n1,1,-5\n", {}, "line 3, column n_out must be at least 1, got '-5'", id="negative tokens"
    ),
    pytest.param(
        HEAD + "0,1,1\n1,1.5,1\n", {}, "line 3, column n_in must be a whole number, got '1.5'", id="part of a token"
    ),
    pytest.param(HEAD + "0,1,1\n1,,1\n", {}, "line 3, column n_in must be a number, got ''", id="no value"),
    pytest.param(
        HEAD + "0,1,1\n1,1e12,1\n", {}, "line 3, column n_in must be at most 1000000000, got '1e12'", id="absurd tokens"
    ),
    pytest.param(HEAD + "0,1,1\n1,1\n", {}, "line 3 must have 3 columns as the header has, got 2", id="short row"),
    pytest.param(HEAD + "0,1,1\n1,1,1,1\n", {}, "line 3 must have 3 columns as the header has, got 4", id="long row"),
    pytest.param(HEAD + '0,1,1\n1,"1,1\n', {}, "line 3 is not valid CSV", id="open quote"),
    pytest.param(
        HEAD + "5,1,1\n5,1,1\n",
        {},
        "all 2 requests have the same arrival time, so a rate is undefined",
        id="one instant",
    ),
    pytest.param(AZURE + "yesterday,1,1\n", {}, "line 5, column TIMESTAMP must be a UTC time such as", id="not a date"),
    pytest.param(AZURE + "2023-13-16 18:17:04,1,1\n", {}, "line 5, column TIMESTAMP must be a UTC time", id="month 13"),
    pytest.param(AZURE + "now,1,1\n", {}, "line 5, column TIMESTAMP must be a UTC time", id="now"),
    pytest.param(
        AZURE + "2023-11-16 18:17:05+02:00,1,1\n", {}, "line 5, column TIMESTAMP must be a UTC time", id="other zone"
    ),
    pytest.param(
        AZURE + "2023-11-16 18:17:04.0781489,1,1\n",
        {},
        "line 5, column TIMESTAMP must not decrease",
        id="dates unsorted",
    ),
    pytest.param(jsonl(MOONCAKE) + "{oops\n", {}, "line 3 is not valid JSON, got '{oops'", id="invalid JSON"),
    pytest.param(jsonl(MOONCAKE) + "[" * 100_000 + "\n", {}, "line 3 is not valid JSON", id="deep JSON"),
    pytest.param(jsonl(MOONCAKE) + "7\n", {}, "line 3 must be one JSON object per line, got '7'", id="JSON number"),
    pytest.param(json.dumps(MOONCAKE), {}, "line 1 must be one JSON object per line", id="JSON array"),
    pytest.param(
        jsonl(MOONCAKE) + '{"timestamp": 9}\n', {}, "line 3, column input_length is missing", id="key missing"
    ),
    pytest.param(
        jsonl([*MOONCAKE, MOONCAKE[1] | {"input_length": True}]),
        {},
        "line 3, column input_length must be a number, got True",
        id="JSON true",
    ),
    pytest.param(
        jsonl([*MOONCAKE, MOONCAKE[1] | {"input_length": None}]),
        {},
        "line 3, column input_length must be a number, got None",
        id="JSON null",
    ),
    pytest.param(
        jsonl(MOONCAKE) + '{"timestamp": NaN, "input_length": 1, "output_length": 1}\n',
        {},
        "line 3, column timestamp must be a finite number, got nan",
        id="JSON NaN",
    ),
    pytest.param(
        jsonl(MOONCAKE) + '{"timestamp": 1' + "0" * 5000 + "}\n",
        {},
        "line 3 is not valid JSON",
        id="endless JSON number",
    ),
    pytest.param(
        jsonl([MOONCAKE[0] | {"hash_ids": ["x"]}, MOONCAKE[1]]),
        {"prefixes": True},
        "line 1, column hash_ids must be a list of whole numbers, got ['x']",
        id="bad prefixes",
    ),
    pytest.param(
        PLAIN, {"prefixes": True}, "line 1 prefixes were asked for, but there is no column hash_ids", id="no prefixes"
    ),
    pytest.param(PLAIN, {"run": "a"}, "run 'a' was asked for, but there is no column run", id="no runs"),
    pytest.param(HEAD + "0,1,1\n" + "7" * (1 << 21), {}, "line 3 is longer than 1 MiB", id="long line"),
    pytest.param(
        HEAD + "0,1,1\n" + "7" * (1 << 21) + "\n", {}, "line 3 is longer than 1 MiB", id="long line with an end"
    ),
]


@pytest.mark.parametrize(("content", "options", "message"), BAD)
def test_refusals(content: str | bytes, options: dict[str, Any], message: str, write: Callable[..., Path]) -> None:
    path = write(content, "bad.txt")
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared below, without regex escapes
        read_trace(path, **options)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text
    assert len(text) < len(str(path)) + 600


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.csv: no such file"):
        read_trace(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="is a directory, not a trace file"):
        read_trace(tmp_path)


def test_line_numbers_beyond_the_first_block(write: Callable[..., Path]) -> None:
    rows = [f"{i}.000000,100,10\n" for i in range(150_000)]
    rows[140_000] = "140000.0,100,ten\n"
    with pytest.raises(ValueError, match="line 140002, column n_out must be a number, got 'ten'"):
        read_trace(write(HEAD + "".join(rows)))


def test_order_is_checked_across_blocks(write: Callable[..., Path]) -> None:
    rows = "".join(f"{i % 99_999}.0000,100,10\n" for i in range(99_998))
    assert len(rows) > 1 << 20
    with pytest.raises(ValueError, match="line 100000, column t_s must not decrease, got '0'"):
        read_trace(write(HEAD + rows + "0,1,1\n"))


def test_two_gigabytes_in_one_line_take_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.csv"
    path.write_text(HEAD)
    os.truncate(path, 1 << 31)  # a sparse file: no disk, no time
    message, peak = _refused_with_peak_memory(path)
    assert "line 2 is longer than 1 MiB" in message
    assert peak < 16 << 20


def test_gzip_bomb_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as bomb:
        bomb.write(HEAD.encode())
        for _ in range(200):
            bomb.write(b"1" * (1 << 20))
    message, peak = _refused_with_peak_memory(path)
    assert "line 2 is longer than 1 MiB" in message
    assert peak < 16 << 20


def test_number_of_lines_is_bounded(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servecast.readers.traces.MAX_LINES", 1000)
    with pytest.raises(ValueError, match="has more than 1000 lines"):
        read_trace(write(gzip.compress(HEAD.encode() + b"\n" * 5000 + b"0,1,1\n")))


def _refused_with_peak_memory(path: Path) -> tuple[str, int]:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="line") as caught:
            read_trace(path)
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_progress_reaches_the_end(data_path: Callable[..., Path]) -> None:
    path = data_path("azure-llm-2023", "conv.csv.gz")
    seen: list[tuple[int, int]] = []
    read_trace(path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)
    assert seen == sorted(seen)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, 10**7), st.integers(1, 10**6), st.integers(1, 10**6)), min_size=2, max_size=30
    ).filter(lambda rows: len({row[0] for row in rows}) > 1)
)
def test_csv_and_json_lines_agree(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int]]) -> None:
    rows = sorted(rows)
    folder = tmp_path_factory.mktemp("both")
    names = ("t_s", "n_in", "n_out")
    (folder / "a.csv").write_text("\n".join([",".join(names), *(f"{t / 1e3!r},{i},{o}" for t, i, o in rows)]))
    (folder / "a.jsonl").write_text(jsonl(dict(zip(names, (t / 1e3, i, o), strict=True)) for t, i, o in rows))
    one, other = read_trace(folder / "a.csv"), read_trace(folder / "a.jsonl")
    np.testing.assert_array_equal(one.t_s, other.t_s)
    np.testing.assert_array_equal(one.n_in, [row[1] for row in rows])
    np.testing.assert_array_equal(one.n_out, other.n_out)
    assert one.name == other.name == "a"


def test_import_stays_light() -> None:
    code = (
        "import sys, servecast.readers.traces; "
        "print([name for name in ('pandas', 'scipy', 'altair', 'torch', 'pydantic') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.strip() == "[]"


def test_shipped_example_has_the_published_statistics() -> None:
    trace = read_trace(Path(str(servecast.__file__)).parent / "examples" / "chat.csv.gz")
    arrivals, lengths = arrival_statistics(trace.t_s), length_statistics(trace.n_in, trace.n_out)
    # reference/workloads section 4, Azure conversation: rate 5.53, cv 1.09, IDC(60 s) 16, log-normal fits
    assert arrivals.rate_rps == pytest.approx(5.5, rel=0.02)
    assert arrivals.gap_cv == pytest.approx(1.09, rel=0.02)
    assert 10.0 < dict(arrivals.idc)[60.0] < 20.0
    assert lengths.p50_in == pytest.approx(np.exp(6.63), rel=0.05)
    assert lengths.p50_out == pytest.approx(np.exp(5.02), rel=0.05)
    assert (lengths.max_in, lengths.max_out) == (14050.0, 1000.0)


def test_example_generator_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "make_chat_trace.py"
    make = runpy.run_path(str(script))["write_trace"]
    make(tmp_path / "a.gz")
    time.sleep(1.1)  # an archive that carried its date would differ now
    make(tmp_path / "b.gz")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    shipped = Path(str(servecast.__file__)).parent / "examples" / "chat.csv.gz"
    assert gzip.decompress(shipped.read_bytes()) == gzip.decompress((tmp_path / "a.gz").read_bytes())

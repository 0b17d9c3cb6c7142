"""The plan request. Expected values: what the file says, by hand; messages from the rules of the document."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from servecast.cli.request import PlanRequest, read_request, request_from_flags, resolve_trace, template
from servecast.model.slo import Slo
from servecast.model.workload import FixedLength, LognormalLength, UniformLength

MINIMAL = """\
schema: servecast.plan/1
workload: {trace: chat.csv}
model: llama-3.1-8b
gpus: {h200: {usd_per_hour: 3.5}}
slo: {ttft_p99: 2s}
"""

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "request.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(path: Path) -> str:
    """Message of the refused file, without the folder."""
    with pytest.raises((ValueError, OSError)) as caught:
        read_request(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.replace(str(path), "request.yaml")


# ---- template ----------------------------------------------------------------------------------------


def test_template_is_a_request_for_the_shipped_trace(write: Write) -> None:
    request = read_request(write(template()))
    assert request.model == "meta-llama/Llama-3.1-8B-Instruct"
    assert request.slos() == (
        Slo(metric="ttft", percentile=99.0, limit_s=2.0),
        Slo(metric="tpot", percentile=99.0, limit_s=0.05),
    )
    assert [(o.gpu.name, o.usd_per_hour, o.limit) for o in request.offers()] == [
        ("h100_sxm", 2.9, 16),
        ("l40s", 1.1, None),
    ]
    assert (request.engine, request.precision, request.kv_precision, request.seed) == ("vllm", "auto", "auto", 1)
    assert request.workload.rate_scale == 1.0
    assert request.workload.trace == "example"
    with gzip.open(resolve_trace("example", "elsewhere"), "rt") as file:
        assert file.readline() == "t_s,n_in,n_out\n"


def test_commented_alternatives_of_the_template_are_valid(write: Write) -> None:
    text = template().replace("  trace: example", "  # trace:").replace("# search:", "search:")
    text = re.sub(r"^  # (rate_rps|gap_cv|input_tokens|output_tokens)", r"  \1", text, flags=re.MULTILINE)
    text = re.sub(r"^#   (tp|pp|max_num_seqs|max_replicas)", r"  \1", text, flags=re.MULTILINE)
    request = read_request(write(text))
    load, search = request.workload, request.search
    assert load.input_tokens is not None
    assert load.output_tokens is not None
    assert (load.trace, load.rate_rps, load.gap_cv) == (None, 5.5, 1.0)
    assert load.input_tokens.distribution() == LognormalLength(mean=1155, cv=0.96, maximum=8000)
    assert load.output_tokens.distribution() == LognormalLength(mean=211, cv=0.8, maximum=1000)
    assert (search.tp, search.pp, search.max_replicas) == ((1, 2, 4, 8), (1, 2), 1000)
    assert search.max_num_seqs == (8, 16, 32, 64, 128, 256)


def test_lines_of_the_template_fit_a_terminal() -> None:
    assert max(map(len, template().splitlines())) <= 120


# ---- accepted ----------------------------------------------------------------------------------------


def test_defaults(write: Write) -> None:
    request = read_request(write(MINIMAL))
    assert (request.workload.run, request.workload.gap_cv, request.workload.rate_scale) == (None, None, 1.0)
    assert (request.search.tp, request.search.pp, request.search.max_num_seqs) == (None, None, None)
    assert request.engine_and_version()[0] == "vllm"


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("512", FixedLength(512)),
        ("{tokens: 512}", FixedLength(512)),
        ("{mean: 100, cv: 0.5}", LognormalLength(mean=100, cv=0.5)),
        ("{mean: 100, cv: 0.5, max: 400}", LognormalLength(mean=100, cv=0.5, maximum=400)),
        ("{p50: 100, p99: 900, max: 950}", LognormalLength.from_percentiles(100, 900, maximum=950)),
        ("{low: 1, high: 2e3}", UniformLength(low=1, high=2000)),
    ],
)
def test_lengths(text: str, distribution: object, write: Write) -> None:
    load = f"{{rate_rps: 330/min, input_tokens: {text}, output_tokens: 1}}"
    workload = read_request(write(MINIMAL.replace("{trace: chat.csv}", load))).workload
    assert workload.rate_rps == pytest.approx(5.5, rel=1e-15)
    assert workload.input_tokens is not None
    assert workload.input_tokens.distribution() == distribution


def test_names_and_lists_are_normalised(write: Write) -> None:
    text = MINIMAL + "precision: FP4\nkv_precision: AUTO\nengine: tensorrt-llm\nsearch: {tp: [4, 1, 2, 2]}\n"
    request = read_request(write(text.replace("{ttft_p99: 2s}", "{TTFT_P99: 2 s , tpot_p50: 40ms}")))
    assert (request.precision, request.kv_precision, request.search.tp) == ("nvfp4", "auto", (1, 2, 4))
    assert request.engine_and_version()[0] == "trtllm"
    assert [slo.name for slo in request.slos()] == ["ttft_p99", "tpot_p50"]


def test_a_number_as_gpu_name_is_a_name(write: Write) -> None:
    request = read_request(write(MINIMAL.replace("h200", "4090")))
    assert list(request.gpus) == ["4090"]


def test_request_is_immutable(write: Write) -> None:
    request = read_request(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        request.seed = 2


def test_trace_is_relative_to_the_folder_of_the_request(tmp_path: Path) -> None:
    assert resolve_trace("chat.csv", tmp_path) == tmp_path / "chat.csv"
    assert resolve_trace("./example", tmp_path) == tmp_path / "example"
    assert resolve_trace(str(tmp_path / "a.csv"), "elsewhere") == tmp_path / "a.csv"


# ---- refused -----------------------------------------------------------------------------------------

PARAMETERS = "{rate_rps: 5, input_tokens: 9, output_tokens: 9}"
FORMS = "a number of tokens, {mean, cv, max}, {p50, p99, max} or {low, high}"
FORMATS = "auto, bf16, fp16, fp8, fp8_block, int8, fp4, nvfp4, mxfp4, int4"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # unknown keys, the nearest suggested
        ("slo:", "slos:", "slos: unknown key (nearest: slo)"),
        ("model:", "Model:", "Model: unknown key (nearest: model)"),
        ("usd_per_hour", "usd_per_hr", "gpus.h200.usd_per_hr: unknown key (nearest: usd_per_hour)"),
        ("trace:", "tracee:", "workload.tracee: unknown key (nearest: trace)"),
        (
            "{trace: chat.csv}",
            PARAMETERS.replace("{rate_rps: 5, input_tokens: 9", "{rate_rps: 5, input_tokens: {maen: 9}"),
            "workload.input_tokens.maen: unknown key (nearest: mean)",
        ),
        ("slo:", "search: {tpp: [1]}\nslo:", "search.tpp: unknown key (nearest: tp)"),
        (
            "{trace: chat.csv}",
            "{trace: chat.csv, '\\e[31m': 1}".replace("'", '"'),
            "workload.\\x1b[31m: unknown key (known: trace, run, rate_rps, gap_cv, input_tokens, output_tokens, "
            "rate_scale)",
        ),
        # schema
        ("plan/1", "plan/2", "schema must be 'servecast.plan/1', got 'servecast.plan/2'"),
        ("schema: servecast.plan/1\n", "", "schema must be 'servecast.plan/1', got nothing"),
        ("schema: servecast.plan/1\nworkload", "schema: other\nworkloads", "schema must be 'servecast.plan/1'"),
        # workload
        ("workload: {trace: chat.csv}\n", "", "workload must be given"),
        ("{trace: chat.csv}", "chat.csv", "workload must be a mapping, got 'chat.csv'"),
        ("chat.csv", "5", "workload.trace must be text, got 5"),
        ("chat.csv", "''", "workload.trace must not be empty, got ''"),
        ("chat.csv", "x, rate_rps: 5", "workload must be a trace or parameters, got trace and rate_rps"),
        (
            "{trace: chat.csv}",
            "{gap_cv: 1}",
            "workload must have a trace, or rate_rps with input_tokens and output_tokens, got neither",
        ),
        ("{trace: chat.csv}", "{rate_rps: 5, input_tokens: 9}", "workload needs output_tokens beside rate_rps"),
        ("{trace: chat.csv}", PARAMETERS[:-1] + ", run: a}", "workload: run must come with a trace"),
        ("chat.csv", "x, rate_scale: 0", "workload.rate_scale must be > 0, got 0"),
        ("chat.csv", "x, rate_scale: .inf", "workload.rate_scale must be finite, got inf"),
        ("chat.csv", "x, rate_scale: '2'", "workload.rate_scale must be a number, got '2'"),
        ("chat.csv", "x, rate_scale: true", "workload.rate_scale must be a number, got True"),
        ("{trace: chat.csv}", PARAMETERS.replace("5", "-5"), "workload.rate_rps must be > 0, got -5"),
        ("{trace: chat.csv}", PARAMETERS.replace("5", ".nan"), "workload.rate_rps must be finite, got nan"),
        (
            "{trace: chat.csv}",
            PARAMETERS.replace("5", "5 rps"),
            "rate_rps '5 rps': the unit must be /s, /min or /h, got 'rps'",
        ),
        ("{trace: chat.csv}", PARAMETERS.replace("9,", "0,"), "workload.input_tokens.tokens must be >= 1, got 0"),
        ("{trace: chat.csv}", PARAMETERS.replace("9,", "4k,"), f"workload.input_tokens must be {FORMS}, got '4k'"),
        (
            "{trace: chat.csv}",
            PARAMETERS.replace("9,", "{mean: 9, high: 10},"),
            f"workload.input_tokens must be {FORMS}, got {{mean, high}}",
        ),
        (
            "{trace: chat.csv}",
            PARAMETERS.replace("9,", "{low: 9, high: 8},"),
            "workload.input_tokens: high must be at least low = 9, got 8",
        ),
        # model, gpus
        ("llama-3.1-8b", "8", "model must be text, got 8"),
        ("model: llama-3.1-8b\n", "", "model must be given"),
        ("{h200: {usd_per_hour: 3.5}}", "{}", "gpus must not be empty, got {}"),
        ("{h200: {usd_per_hour: 3.5}}", "[h200]", "gpus must be a mapping, got ['h200']"),
        ("{usd_per_hour: 3.5}", "3.5", "gpus.h200 must be a mapping, got 3.5"),
        ("{usd_per_hour: 3.5}", "{limit: 3}", "gpus.h200.usd_per_hour must be given"),
        ("3.5", "0", "gpus.h200.usd_per_hour must be > 0, got 0"),
        ("3.5", "-1", "gpus.h200.usd_per_hour must be > 0, got -1"),
        ("3.5", ".nan", "gpus.h200.usd_per_hour must be finite, got nan"),
        ("3.5", "1e6", "gpus.h200.usd_per_hour must be <= 100000, got 1000000.0"),
        ("3.5", "'3.5'", "gpus.h200.usd_per_hour must be a number, got '3.5'"),
        ("3.5", "3.5, limit: 0", "gpus.h200.limit must be >= 1, got 0"),
        ("3.5", "3.5, limit: 1.5", "gpus.h200.limit must be a whole number, got 1.5"),
        # slo
        ("2s", "2", "slo 'ttft_p99=2': the limit needs a unit (ms or s)"),
        ("2s", "2h", "slo 'ttft_p99=2h': the unit must be us, ms, s, m or min, got 'h'"),
        ("2s", "[2s]", "slo 'ttft_p99' must be a limit with a unit such as 2s, got ['2s']"),
        ("2s", "", "slo 'ttft_p99' must be a limit with a unit such as 2s, got None"),
        ("{ttft_p99: 2s}", "ttft_p99=2s", "slo must be a mapping, got 'ttft_p99=2s'"),
        ("{ttft_p99: 2s}", "{}", "slo must not be empty, got {}"),
        ("2s", "2s, TTFT_P99: 3s", "slo ttft_p99 must be given once, got it twice"),
        ("2s", "2s, ttft_p99: 3s", None),
        ("ttft_p99", "ttft", "slo 'ttft=2s': needs a percentile such as ttft_p99, got 'ttft'"),
        # the rest
        ("slo:", "engine: vlm\nslo:", "engine must be one of vllm, sglang, trtllm, got 'vlm' (did you mean vllm?)"),
        ("slo:", "precision: fp7\nslo:", f"precision must be one of {FORMATS}, got 'fp7'"),
        ("slo:", "kv_precision: 8\nslo:", "kv_precision must be text, got 8"),
        ("slo:", "search: {tp: 4}\nslo:", "search.tp must be a list, got 4"),
        ("slo:", "search: {tp: []}\nslo:", "search.tp must not be empty, got []"),
        ("slo:", "search: {tp: [0]}\nslo:", "search.tp.0 must be >= 1, got 0"),
        ("slo:", "search: {max_num_seqs: [8, 1.5]}\nslo:", "search.max_num_seqs.1 must be a whole number, got 1.5"),
        ("slo:", "seed: -1\nslo:", "seed must be >= 0, got -1"),
        ("slo:", "seed: 1.0\nslo:", "seed must be a whole number, got 1.0"),
    ],
)
def test_refusals(old: str, new: str, message: str | None, write: Write) -> None:
    assert old in MINIMAL
    refused = refusal(write(MINIMAL.replace(old, new, 1)))
    if message is None:  # the YAML reader's own line number
        assert refused == "request.yaml line 5: key 'ttft_p99' is given twice, first on line 5"
    elif new.startswith("schema: other"):
        assert refused == f"request.yaml: {message}, got 'other'"
    else:
        assert refused == f"request.yaml: {message}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "request.yaml: is empty"),
        (b"# only a comment\n", "request.yaml: is empty"),
        (
            b"- 1\n",
            "request.yaml: must be a mapping of keys such as workload, model, gpus, slo, got [1]",
        ),
        (b"a: 1\nb: \xff\n", "request.yaml line 2: is not UTF-8 text (byte 0xff)"),
        (b"#" * (2 << 20), "request.yaml: is longer than 1 MiB"),
        (b"# \xc3\xbc" * (1 << 19), "request.yaml: is longer than 1 MiB"),
        (b"\x00\x01\x02", "request.yaml line 1: is not text (character U+0000)"),
        (MINIMAL.encode() + b"engine: &e vllm\n", "request.yaml line 6: anchors are not allowed"),
        (MINIMAL.encode() + b"engine: !!str vllm\n", "request.yaml line 6: tags are not allowed"),
        (MINIMAL.encode() + b"slo: {ttft_p99: 3s}\n", "request.yaml line 6: key 'slo' is given twice, first on line 5"),
    ],
)
def test_refused_files(data: bytes, message: str, write: Write) -> None:
    assert refusal(write(data)).startswith(message)


def test_no_such_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.yaml").endswith(": no such file")
    assert refusal(tmp_path).endswith(": is a directory, not a request file")


def test_a_byte_order_mark_is_read_over(write: Write) -> None:
    assert read_request(write(b"\xef\xbb\xbf" + MINIMAL.encode())) == read_request(write(MINIMAL))


def test_unknown_gpu_and_one_offered_twice(write: Write) -> None:
    unknown = read_request(write(MINIMAL.replace("h200", "h2000")))
    with pytest.raises(ValueError, match=r"^gpu must be a catalogue name, got 'h2000' \(nearest: .*h200_sxm"):
        unknown.offers()
    twice = MINIMAL.replace("{h200:", "{H200-SXM: {usd_per_hour: 3}, h200:")
    with pytest.raises(ValueError, match=r"^gpu h200_sxm must be offered once, got it again as 'h200'$"):
        read_request(write(twice)).offers()


# ---- flags -------------------------------------------------------------------------------------------


def flags(**changed: Any) -> PlanRequest:
    given: dict[str, Any] = {"trace": "chat.csv", "model": "llama-3.1-8b", "gpu": ["h200=3.5"], "slo": ["ttft_p99=2s"]}
    return request_from_flags(**{**given, **changed})


def test_flags_and_file_give_the_same_request(write: Write) -> None:
    assert flags() == read_request(write(MINIMAL))
    full = MINIMAL.replace("3.5}", "3.5, limit: 16}").replace("chat.csv", "chat.csv, run: a, rate_scale: 2.0")
    full += "engine: sglang\nprecision: fp8\nkv_precision: fp8\nseed: 7\nsearch: {tp: [2]}\n"
    assert flags(
        gpu=["h200=3.5:16"],
        run="a",
        rate_scale=2.0,
        engine="sglang",
        precision="fp8",
        kv_precision="fp8",
        seed=7,
        search={"tp": [2]},
    ) == read_request(write(full))


def test_parameters_instead_of_a_trace() -> None:
    request = flags(trace=None, workload={"rate_rps": "5/s", "input_tokens": 9, "output_tokens": {"low": 1, "high": 2}})
    assert request.workload.rate_rps == 5.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"trace": None}, "--trace must be given"),
        ({"model": None}, "--model must be given"),
        ({"gpu": []}, "--gpu must be given"),
        ({"slo": []}, "--slo must be given"),
        ({"gpu": ["h200=0"]}, "gpu 'h200=0': the price must be > 0 and finite, got 0"),
        ({"gpu": ["h200=1", "h200=2"]}, "--gpu h200 must be given once, got it twice"),
        ({"slo": ["ttft_p99=2"]}, "slo 'ttft_p99=2': the limit needs a unit (ms or s)"),
        ({"slo": ["ttft_p99=2s", "TTFT_p99=3s"]}, "--slo ttft_p99 must be given once, got it twice"),
        ({"precision": "fp7"}, f"command line: precision must be one of {FORMATS}, got 'fp7'"),
        ({"rate_scale": float("nan")}, "command line: workload.rate_scale must be finite, got nan"),
        ({"seed": -1}, "command line: seed must be >= 0, got -1"),
        ({"search": {"ttp": [1]}}, "command line: search.ttp: unknown key (nearest: tp)"),
        ({"workload": {"rate_rps": 5}}, "command line: workload must be a trace or parameters, got trace and rate_rps"),
    ],
)
def test_refused_flags(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        flags(**changed)


# ---- cold start --------------------------------------------------------------------------------------


def test_importing_the_edge_is_light() -> None:
    names = ("readers.yaml_edge", "cli.units", "cli.request", "cli.output", "cli.errors")
    modules = ", ".join(f"servecast.{name}" for name in names)
    heavy = "{'numpy', 'scipy', 'pandas', 'altair', 'torch', 'rich'}"
    script = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

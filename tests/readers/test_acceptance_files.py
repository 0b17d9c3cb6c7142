"""Acceptance files: every format on small files with values worked out by hand, and one-line refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.model.acceptance import AcceptanceSample
from servecast.readers import acceptance_text
from servecast.readers.acceptance import counters_between, read_acceptance, read_counters


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def written(text: str, name: str = "acceptance") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return written


Write = Callable[..., Path]


def pairs(samples: list[AcceptanceSample]) -> list[tuple[int, float]]:
    return [(one.draft_length, one.mean_acceptance_length) for one in samples]


def refused(path: Path, message: str, **options: Any) -> None:
    """Refusal of one line: the file, then `message`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        read_acceptance(path, **options)
    assert str(caught.value) == f"{path}: {message}"


TABLE = "draft_length,mean_acceptance_length,rounds,standard_error\n0,1,,\n1,1.84,500,0.01\n\n2,,,\n3, 2.99 ,,\n"


def test_table(write: Write) -> None:
    # Origin: hand; speculation off and a row without AL are no measurement of acceptance.
    found = read_acceptance(write(TABLE))
    assert found == [
        AcceptanceSample(draft_length=1, mean_acceptance_length=1.84, rounds=500, standard_error=0.01),
        AcceptanceSample(draft_length=3, mean_acceptance_length=2.99),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_table_of_several_curves(write: Write, end: str) -> None:
    rows = ["curve,model,draft_length,mean_acceptance_length", "a|on,x,1,1.8", 'b|on,"y,z",1,1.7', "a|on,x,2,1.6"]
    path = write(end.join(rows))
    assert pairs(read_acceptance(path, curve="a|on")) == [(1, 1.8), (2, 1.6)]  # falling AL is legal
    refused(path, "holds 2 curves; choose one (--curve): a|on, b|on")
    refused(path, "has no curve 'c', only a|on, b|on", curve="c")


def test_public_curves(data_path: Callable[..., Path]) -> None:
    # Origin: reference page 6.4, dsv4-pro-0813; it falls at 7 and 8.
    path = data_path("inferencex-acceptance", "acceptance_curves.csv")
    found = read_acceptance(path, curve="dsv4-pro-0813-dspark|thinking_on")
    assert pairs(found) == list(enumerate([1.84, 2.51, 3.01, 3.36, 3.61, 3.77, 3.73, 3.47], 1))


def test_public_sweep_with_a_row_without_speculation(data_path: Callable[..., Path]) -> None:
    # Origin: vllm issue 20780, reference page 6.3.
    found = read_acceptance(data_path("speculation", "vllm_llama31_8b_eagle1_bs1.csv"))
    assert pairs(found) == [(2, 2.10), (4, 2.39), (7, 2.47)]


HEADER = "draft_length,mean_acceptance_length\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "draft_length,al\n1,2\n",
            "line 1, field mean_acceptance_length is missing from the header, got 'draft_length,al'",
        ),
        (
            HEADER[:-1] + ",draft_length\n1,1.5,1\n",
            "line 1, field 'draft_length' must be named once in the header, got it twice",
        ),
        (HEADER + "1,1.5\n2\n", "line 3 must have 2 columns as the header has, got 1"),
        (HEADER + "1,2.5\n", "line 2, field mean_acceptance_length must be from 1 to 2 at draft length 1, got 2.5"),
        (HEADER + "1,nan\n", "line 2, field mean_acceptance_length must be a finite number, got 'nan'"),
        (HEADER + "1,1_5\n", "line 2, field mean_acceptance_length must be a finite number, got '1_5'"),
        (HEADER + "1.5,1.5\n", "line 2, field draft_length must be a whole number of at least 0, got '1.5'"),
        (HEADER + "-1,1.5\n", "line 2, field draft_length must be a whole number of at least 0, got '-1'"),
        (HEADER + "9999,1.5\n", "line 2, field draft_length must be at most 1024, got '9999'"),
        (HEADER + "0,1.5\n", "line 2, field mean_acceptance_length must be 1 at draft length 0, got 1.5"),
        (HEADER + "0,1\n", "has no row with a mean_acceptance_length at a draft length of at least 1"),
        (HEADER, "has no row with a mean_acceptance_length at a draft length of at least 1"),
        (HEADER + '1,"1.5\n', "line 2 is not valid CSV (unexpected end of data)"),
        (" \n", "is empty"),
    ],
)
def test_a_bad_table_is_refused(write: Write, text: str, message: str) -> None:
    refused(write(text), message)


def test_rates_by_position_of_either_kind(write: Write) -> None:
    # Origin: reference page 4.2, P = [.9, .6, .3] <-> a = [.9, .6667, .5]; AL = 1 + 1.8.
    (plain,) = read_acceptance(write('{"per_position": [0.9, 0.6, 0.3], "kind": "unconditional", "rounds": 40}'))
    assert plain.survival == (0.9, 0.6, 0.3)
    assert (plain.draft_length, plain.rounds) == (3, 40)
    assert plain.mean_acceptance_length == pytest.approx(2.8, rel=1e-12)
    text = json.dumps({"per_position": [0.9, 2 / 3, 0.5], "kind": "conditional"})
    (conditional,) = read_acceptance(write(text))
    assert conditional.survival == pytest.approx((0.9, 0.6, 0.3), rel=1e-12)


@settings(max_examples=30)
@given(rates=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_both_kinds_describe_the_same_run(tmp_path_factory: pytest.TempPathFactory, rates: list[float]) -> None:
    # Origin: definition, P_j = a_1 ... a_j. Python writes floats so that they read back exactly.
    folder = tmp_path_factory.mktemp("kinds")
    survival = [rates[0]]
    for rate in rates[1:]:
        survival.append(survival[-1] * rate)
    found = []
    for kind, values in (("conditional", rates), ("unconditional", survival)):
        path = folder / kind
        path.write_text(json.dumps({"per_position": values, "kind": kind}), encoding="utf-8")
        found += read_acceptance(path)
    assert found[0].survival == pytest.approx(found[1].survival, rel=1e-12)


def test_list_of_samples(write: Write) -> None:
    text = json.dumps(
        [
            {"draft_length": 2, "mean_acceptance_length": 2.4, "survival": [0.8, 0.6], "standard_error": 0.02},
            {"per_position": [0.75], "kind": "conditional"},
        ]
    )
    assert read_acceptance(write(text)) == [
        AcceptanceSample(draft_length=2, mean_acceptance_length=2.4, survival=(0.8, 0.6), standard_error=0.02),
        AcceptanceSample(draft_length=1, mean_acceptance_length=1.75, survival=(0.75,)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"per_position": [0.9]}',
            "document, field kind must say unconditional or conditional of per_position, got nothing",
        ),
        (
            '{"per_position": [0.9], "kind": "rate"}',
            "document, field kind must say unconditional or conditional of per_position, got 'rate'",
        ),
        (
            '{"per_position": [0.9, 1.2], "kind": "conditional"}',
            "document, field per_position must be from 0 to 1, got 1.2 at position 2",
        ),
        (
            '{"per_position": [0.9, -0.1], "kind": "unconditional"}',
            "document, field per_position must be from 0 to 1, got -0.1 at position 2",
        ),
        (
            '{"per_position": [0.5, 0.4, 0.6], "kind": "unconditional"}',
            "document, field survival must not increase, got 0.6 after 0.4 at position 3",
        ),
        (
            '{"per_position": [0.5, NaN], "kind": "unconditional"}',
            "document, field per_position[1] must be a finite number, got nan",
        ),
        (
            '{"per_position": [], "kind": "conditional"}',
            "document, field per_position must be a list of 1 to 1024 numbers, got []",
        ),
        (
            '[{"draft_length": 1}]',
            "entry 0, field mean_acceptance_length is missing (and so are per_position and acceptance_histogram)",
        ),
        (
            '[{"draft_length": true, "mean_acceptance_length": 1.5}]',
            "entry 0, field draft_length must be a finite number, got True",
        ),
        ("[1]", "entry 0 must be a JSON object, got 1"),
        ("[]", "holds no entry"),
        ('{"a": \n', "line 1 is not valid JSON, got '{\"a\": '"),
    ],
)
def test_a_bad_document_is_refused(write: Write, text: str, message: str) -> None:
    refused(write(text), message)


def test_histogram_of_one_request(write: Write) -> None:
    # Origin: reference page 7.5, [8, 0, 6, 6]: 20 steps, 30 accepted, AL 2.5. P: 12, 12 and 6 of 20. Deviations of A
    # from 1.5: 8 x 2.25 + 6 x 0.25 + 6 x 2.25 = 33; error sqrt(33 / 19 / 20).
    (found,) = read_acceptance(write('{"acceptance_histogram": [8, 0, 6, 6]}'))
    assert (found.draft_length, found.rounds) == (3, 20)
    assert found.mean_acceptance_length == pytest.approx(2.5, rel=1e-12)
    assert found.survival == pytest.approx((0.6, 0.6, 0.3), rel=1e-12)
    assert found.standard_error == pytest.approx((33 / 19 / 20) ** 0.5, rel=1e-12)


def test_answer_of_vllm(write: Write) -> None:
    # Origin: example of vllm pull request 48915: 43 steps, 10 accepted, AL 1.2325581395348837, draft length 3.
    inner = {
        "mean_acceptance_length": 1.2325581395348837,
        "acceptance_histogram": [39, 1, 0, 3],
        "num_spec_steps": 43,
        "num_draft_tokens": 129,
        "num_spec_tokens": 3,
    }
    (found,) = read_acceptance(write(json.dumps({"metrics": {"speculative_decoding": inner}, "usage": {}})))
    assert (found.draft_length, found.rounds) == (3, 43)
    assert found.mean_acceptance_length == pytest.approx(1.2325581395348837, rel=1e-12)


def test_log_of_requests_is_pooled_over_steps(write: Write) -> None:
    # Origin: hand. 10 and 30 steps, 10 and 10 accepted: AL 1.5, the ratio of sums and not the mean of ratios.
    lines = [{"acceptance_histogram": [0, 10]}, {"acceptance_histogram": [20, 10]}, {"acceptance_histogram": [0, 0]}]
    (found,) = read_acceptance(write("\n".join(map(json.dumps, lines)) + "\n"))
    assert found.mean_acceptance_length == pytest.approx(1.5, rel=1e-12)
    assert found.rounds == 40


def test_error_over_many_requests_allows_for_alike_steps(write: Write) -> None:
    # Origin: hand. Eight requests of 10 steps each, four that accept all and four that accept none: every step of a
    # request is the same, so the error is that of 8 coin flips, sqrt(8/7 x 8 x 5^2) / 80, not of 80.
    requests = [{"acceptance_histogram": counts} for counts in ([10, 0], [0, 10])] * 4
    (found,) = read_acceptance(write(json.dumps(requests)))
    assert found.standard_error == pytest.approx((8 / 7 * 8 * 25) ** 0.5 / 80, rel=1e-12)


def test_steps_are_told_apart_by_draft_length(write: Write) -> None:
    # Origin: hand, and vllm pull request 56278: (drafted, accepted) = (1, 1), (3, 2) against (3, 1), (1, 0).
    by_length = {"acceptance_histogram_by_draft_length": {"1": [0, 1], "3": [0, 0, 1, 0], "0": [4]}}
    trace = {"per_step_accepted": [1, 0, 0], "per_step_drafted": [3, 1, 0], "acceptance_histogram": [2, 1]}
    short, long = read_acceptance(write(json.dumps([by_length, trace])))
    assert (short.draft_length, short.rounds, short.survival) == (1, 2, (0.5,))
    assert (long.draft_length, long.rounds, long.survival) == (3, 2, (1.0, 0.5, 0.0))


def test_stated_draft_length_fills_a_short_histogram(write: Write) -> None:
    # Origin: definition; some engines end the list at the longest acceptance seen.
    (found,) = read_acceptance(write('{"acceptance_histogram": [1, 1], "num_spec_tokens": 3}'))
    assert found.survival == (0.5, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"acceptance_histogram": [1, 1]}\n{"acceptance_histogram": [1, 1, 1]}',
            "line 2, field acceptance_histogram must be as long in every request where nothing states the draft "
            "length, got 3 entries here and 2 elsewhere",
        ),
        (
            '{"acceptance_histogram": [1, 1]}\n{"id": 1}',
            "line 2, field acceptance_histogram is missing, while other entries are requests that have it",
        ),
        (
            '{"acceptance_histogram": [1, 1], "num_draft_tokens": 7}',
            "document, field num_draft_tokens must be 1 per step, got 7 in 2 steps: the run was adaptive; "
            "acceptance_histogram_by_draft_length or per_step_drafted would tell the lengths apart",
        ),
        (
            '{"acceptance_histogram": [1, 1, 1], "num_spec_tokens": 1}',
            "document, field acceptance_histogram must have "
            "2 entries or more and one more than the draft length at most, got 3",
        ),
        (
            '{"acceptance_histogram": [1, -1]}',
            "document, field acceptance_histogram[1] must be a whole number of at least 0, got -1",
        ),
        (
            '{"acceptance_histogram_by_draft_length": {"2": [1, 1]}}',
            "document, field acceptance_histogram_by_draft_length[2] must have 3 entries, got 2",
        ),
        (
            '{"per_step_accepted": [2], "per_step_drafted": [1]}',
            "document, field per_step_accepted[0] must be at most 1, got 2",
        ),
        (
            '{"per_step_accepted": [2], "per_step_drafted": []}',
            "document, field per_step_accepted must be as long as per_step_drafted, got 1 and 0",
        ),
        ('{"per_step_accepted": [2]}', "document, field per_step_drafted is missing beside per_step_accepted"),
        ('{"acceptance_histogram": [0, 0]}', "counts no verification step"),
    ],
)
def test_a_bad_log_is_refused(write: Write, text: str, message: str) -> None:
    refused(write(text), message)


YAML = """# mean acceptance length, coding
glm:
  thinking_on: {1: 1.84, 2: 2.5}
  thinking_off:
    1: 1.7
"""


def test_yaml_by_model_and_mode(write: Write) -> None:
    path = write(YAML)
    assert pairs(read_acceptance(path, curve="glm|thinking_on")) == [(1, 1.84), (2, 2.5)]
    refused(path, "holds 2 curves; choose one (--curve): glm|thinking_on, glm|thinking_off")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "glm:\n  thinking_on:\n    1: 2.5\n",
            "line 3, field mean_acceptance_length must be from 1 to 2 at draft length 1, got 2.5",
        ),
        (
            "glm:\n  thinking_on:\n    1: .nan\n",
            "line 3, field mean_acceptance_length must be a finite number, got '.nan'",
        ),
        (
            "glm:\n  thinking_on:\n    1: 1.5\n    1: 1.6\n",
            "line 4, glm|thinking_on must have every key once, got '1' twice",
        ),
        (
            "glm:\n  thinking:\n    1: 1.5\n",
            "line 2, field 'thinking' of model 'glm' must be thinking_on or thinking_off",
        ),
        ("glm:\n  thinking_on: 2\n", "line 2, field thinking_on must map draft lengths to numbers"),
        ("glm:\n  thinking_on: {}\n", "curve 'glm|thinking_on' holds no draft length"),
        ("a: &x\n  thinking_on: {1: 1.5}\nb: *x\n", "line 1 must not use anchors or aliases"),
        ("a: !!python/name:os.system {}\n", "line 1 must not use tags, got 'tag:yaml.org,2002:python/name:os.system'"),
        ("a: " + "[" * 9 + "]" * 9 + "\n", "line 1 is nested deeper than 8 levels"),
        ("a: [1\n", "line 2 is not valid YAML (expected ',' or ']', but got '<stream end>')"),
        ("# nothing\n", "is empty"),
        ("words\n", "line 1, the document must be a mapping, got 'words'"),
    ],
)
def test_a_bad_yaml_is_refused(write: Write, text: str, message: str) -> None:
    refused(write(text), message)


def scrape(drafts: float, drafted: float, accepted: float, positions: list[float], model: str = "m") -> str:
    label = f'engine="0",model_name="{model}"'
    rows = [
        "# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.",
        "# TYPE vllm:spec_decode_num_drafts_total counter",
        f"vllm:spec_decode_num_drafts_total{{{label}}} {drafts}",
        f"vllm:spec_decode_num_drafts_created{{{label}}} 1.7e+09",
        f"vllm:spec_decode_num_draft_tokens_total{{{label}}} {drafted}",
        f"vllm:spec_decode_num_accepted_tokens_total{{{label}}} {accepted} 1700000000000",
    ]
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    rows += [f'{name}{{{label},position="{at}"}} {value}' for at, value in enumerate(positions)]
    return "\n".join(['other_metric{x="}"} 3', *rows, ""])


def test_counters_between_two_scrapes(write: Write) -> None:
    # Origin: hand. 100 drafts of 3 in the window, 80 + 50 + 20 accepted: AL 2.5, P (.8, .5, .2);
    # Var A = .8 + 3 x .5 + 5 x .2 - 1.5^2 = 1.05.
    first = read_counters(write(scrape(1e3, 5e3, 700, [400, 200, 100]), "first"))
    second = read_counters(write(scrape(1.1e3, 5.3e3, 850, [480, 250, 120]), "second"))
    found = counters_between(first, second)
    assert (found.draft_length, found.rounds) == (3, 100)
    assert found.mean_acceptance_length == pytest.approx(2.5, rel=1e-12)
    assert found.survival == pytest.approx((0.8, 0.5, 0.2), rel=1e-12)
    assert found.standard_error == pytest.approx((1.05 / 100) ** 0.5, rel=1e-9)


def test_one_scrape_counts_since_the_start(write: Write) -> None:
    (found,) = read_acceptance(write(scrape(10, 20, 11, [7, 4])))
    assert found.draft_length == 2
    assert found.mean_acceptance_length == pytest.approx(2.1, rel=1e-12)


def test_engines_are_summed_and_models_chosen(write: Write) -> None:
    # Origin: hand; data-parallel engines share a model_name.
    twice = write(scrape(10, 20, 11, [7, 4]) + scrape(30, 60, 29, [17, 12]).replace('engine="0"', 'engine="1"'))
    assert read_counters(twice).accepted_per_position == (24.0, 16.0)
    assert read_counters(twice).drafts == 40.0
    both = write(scrape(10, 20, 11, [7, 4]) + scrape(5, 5, 1, [1], model="n"))
    assert read_counters(both, model="n").accepted_per_position == (1.0,)
    refused(both, "counts 2 models; choose one (--curve): m, n")
    with pytest.raises(ValueError, match=r"has no model 'o', only m, n$"):
        read_counters(both, model="o")


def test_counters_without_positions_give_no_survival(write: Write) -> None:
    (found,) = read_acceptance(write(scrape(10, 20, 11, [])))
    assert found.survival is None
    assert found.standard_error is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            scrape(10, 25, 11, [7, 4]),
            "counters, field draft_tokens / drafts must be a whole number (one draft length "
            "throughout), got 2.5: the run was adaptive or mixed; measure at fixed draft lengths",
        ),
        (
            scrape(10, 0, 0, []),
            "counters, field draft_tokens / drafts must be a whole number (one draft length "
            "throughout), got 0: the run was adaptive or mixed; measure at fixed draft lengths",
        ),
        (scrape(0, 0, 0, [0]), "counters, field drafts must be at least 1 in the window, got 0"),
        (
            scrape(10, 20, 11, [7, 3, 1]),
            "counters, field accepted_tokens_per_pos must be 0 beyond position 1 at draft length 2, got 1",
        ),
        (scrape(10, 20, 11, [4, 7]), "counters, field survival must not increase, got 0.7 after 0.4 at position 2"),
        (
            "# TYPE up gauge\nup 1\n",
            "counter vllm:spec_decode_num_drafts_total is missing; speculation is off or the engine is not vLLM",
        ),
        (
            "vllm:spec_decode_num_drafts_total{} \n",
            "line 1 is not Prometheus text, got 'vllm:spec_decode_num_drafts_total{} '",
        ),
        (
            "vllm:spec_decode_num_drafts_total NaN\n",
            "line 1, field vllm:spec_decode_num_drafts_total must be a finite number, got 'NaN'",
        ),
        (
            "vllm:spec_decode_num_drafts_total -1\n",
            "line 1, field vllm:spec_decode_num_drafts_total must not be negative, got -1",
        ),
        (
            scrape(10, 20, 11, [7, 4]).replace('position="1"', 'position="2"'),
            "counter vllm:spec_decode_num_accepted_tokens_per_pos_total must have positions from 0 without a gap",
        ),
        (
            scrape(10, 20, 11, [7, 4]).replace('position="1"', 'position="x"'),
            "line 9, field position must be a whole number below 1024, got 'x'",
        ),
    ],
)
def test_bad_counters_are_refused(write: Write, text: str, message: str) -> None:
    refused(write(text), message)


def test_counters_that_fell_are_refused(write: Write) -> None:
    first, second = (read_counters(write(scrape(n, 2 * n, n, [n, 0]), f"at{n}")) for n in (20, 10))
    with pytest.raises(
        ValueError, match=r"at10: counters, field accepted_tokens_per_pos.0. must not fall after .*at20"
    ):
        counters_between(first, second)


def test_files_that_are_none(tmp_path: Path, write: Write) -> None:
    refused(tmp_path, "is a directory, not an acceptance file")
    with pytest.raises(FileNotFoundError, match=r"absent: no such file$"):
        read_acceptance(tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b"draft_length,\xe9\n")
    refused(tmp_path / "latin", "line 1 is not UTF-8 text (byte 0xe9)")
    refused(write("draft_length,mean_acceptance_length\n1,\0"), "line 2 is not text (zero byte)")


def test_a_large_file_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance_text, "MAX_BYTES", 1 << 20)
    path = write(TABLE.rstrip("\n") + " " * (1 << 20))
    refused(path, "is larger than 1 MiB")


def test_a_curve_of_counters_is_a_model(write: Write) -> None:
    refused(write(scrape(10, 20, 11, [7, 4])), "has no model 'a', only m", curve="a")


@pytest.mark.parametrize("text", ['{"acceptance_histogram": [1, 1]}', TABLE])
def test_a_name_where_curves_have_none_is_refused(write: Write, text: str) -> None:
    refused(write(text), "curve 'a' was asked for, but curves of this format have no names", curve="a")

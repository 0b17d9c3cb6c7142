"""Tables of measured passes: a small file by hand, and refusals of one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from servecast.model.speculation_cost import step_seconds
from servecast.readers import step_costs
from servecast.readers.step_costs import read_step_cost

HEADER = "phase,mode,indexed_by,n,step_s\n"
GRAPHS = "verify,cuda_graph,tokens,8,0.012\nverify,cuda_graph,tokens,2,0.01\n"
DRAFT = "draft,cuda_graph,requests,1,0.001\n"
FULL = HEADER + GRAPHS + "verify,eager,tokens,16,0.03\n" + DRAFT + "draft,cuda_graph,requests,4,0.0016\n"


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "cost.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_every_kind_of_pass(tmp_path: Path) -> None:
    # Origin: the file, in rising order of n.
    cost = read_step_cost(written(tmp_path, FULL), parallel=False)
    assert cost.rows.tolist() == [2.0, 8.0]
    assert cost.verify_s.tolist() == [0.01, 0.012]
    assert cost.eager_rows.tolist() == [16.0]
    assert cost.eager_verify_s.tolist() == [0.03]
    assert cost.draft_requests.tolist() == [1.0, 4.0]
    assert cost.draft_pass_s.tolist() == [0.001, 0.0016]
    assert not cost.parallel


def test_a_step_of_the_table_by_hand(tmp_path: Path) -> None:
    # Origin: hand. Two requests of 3 tokens each are 6 rows, padded to 8: 12 ms; a draft pass of 2 requests lies a
    # third of the way from 1 to 1.6 ms: two of them in turn, or one where all positions come at once.
    chain = read_step_cost(written(tmp_path, FULL), parallel=False)
    assert float(step_seconds(chain, 2, 2)) == pytest.approx(0.012 + 2 * 0.0012, rel=1e-12)
    together = read_step_cost(written(tmp_path, FULL), parallel=True)
    assert float(step_seconds(together, 2, 2)) == pytest.approx(0.012 + 0.0012, rel=1e-12)
    assert float(step_seconds(chain, 2, 0, armed=True)) == pytest.approx(0.01 + 0.0012, rel=1e-12)


def test_what_else_a_table_may_look_like(tmp_path: Path) -> None:
    # Origin: the same file in other columns, spaces, line ends, with a byte-order mark and a column of remarks.
    plain = read_step_cost(written(tmp_path, FULL), parallel=False)
    rows = [line.split(",") for line in FULL.splitlines()]
    turned = "\r\n".join(" , ".join([*reversed(row), "remark"]) for row in rows) + "\r\n\r\n"
    other = read_step_cost(written(tmp_path, turned.encode("utf-8-sig")), parallel=False)
    np.testing.assert_array_equal(other.verify_s, plain.verify_s)
    np.testing.assert_array_equal(other.draft_pass_s, plain.draft_pass_s)
    np.testing.assert_array_equal(other.eager_rows, plain.eager_rows)


BAD: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is empty"),
    "a typo in a column": (
        FULL.replace("step_s", "steps_s"),
        "column step_s must be given, got phase, mode, indexed_by",
    ),
    "a column twice": (
        FULL.replace("mode", "phase", 1).replace("indexed_by", "mode", 1),
        "column indexed_by must be given, got phase, phase, mode, n, step_s",
    ),
    "n twice in the header": (
        "n," + FULL.replace("\n", "\n1,").removesuffix("1,"),
        "column n must be given once, got it 2 times",
    ),
    "header alone": (HEADER, "must hold at least 2 verify passes and 1 draft pass in cuda_graph mode, got 0 and 0"),
    "one verification": (
        HEADER + "verify,cuda_graph,tokens,8,0.012\n" + DRAFT,
        "must hold at least 2 verify passes and 1 draft pass in cuda_graph mode, got 1 and 1",
    ),
    "no draft": (
        HEADER + GRAPHS,
        "must hold at least 2 verify passes and 1 draft pass in cuda_graph mode, got 2 and 0",
    ),
    "unknown phase": (HEADER + "prefill,eager,tokens,1,1\n", "line 2: phase must be verify or draft, got 'prefill'"),
    "unknown mode": (FULL + "draft,graph,requests,9,1\n", "line 7: mode must be cuda_graph or eager, got 'graph'"),
    "other index": (
        FULL + "draft,eager,tokens,9,1\n",
        "line 7: indexed_by must be requests for draft, got 'tokens'",
    ),
    "NaN": (FULL + "draft,eager,requests,9,nan\n", "line 7: step_s must be a positive number, got 'nan'"),
    "infinity": (FULL + "draft,eager,requests,inf,1\n", "line 7: n must be a positive number, got 'inf'"),
    "zero": (FULL + "draft,eager,requests,9,0\n", "line 7: step_s must be a positive number, got '0'"),
    "negative": (FULL + "draft,eager,requests,-9,1\n", "line 7: n must be a positive number, got '-9'"),
    "words": (FULL + "draft,eager,requests,nine,1\n", "line 7: n must be a positive number, got 'nine'"),
    "underscore": (FULL + "draft,eager,requests,1_0,1\n", "line 7: n must be a positive number, got '1_0'"),
    "short line": (FULL + "draft,eager,requests,9\n", "line 7: must have 5 fields as the header has, got 4"),
    "long line": (FULL + "draft,eager,requests,9,1,1\n", "line 7: must have 5 fields as the header has, got 6"),
    "twice": (
        FULL + "verify,cuda_graph,tokens,8,0.013\n",
        "line 7: n must be given once for verify cuda_graph, got 8 twice",
    ),
    "unpaired quote": (FULL + 'draft,eager,requests,"9,1\n', "line 7: must be valid CSV, got unexpected end of data"),
    "a field without end": (FULL + "draft," + 200_000 * "x" + "\n", "line 7: must be valid CSV, got field larger"),
    "other bytes": (b"\xff\xfe\x00p", "line 1 is not UTF-8 text (byte 0xff)"),
    "binary": (FULL.encode() + b"\0", "line 7 is not text (zero byte)"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_are_one_line(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = written(tmp_path, content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        read_step_cost(path, parallel=False)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_a_large_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_costs, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="is larger than 0 MiB"):
        read_step_cost(written(tmp_path, FULL), parallel=False)


def test_a_missing_file_is_the_system_s_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_step_cost(tmp_path / "absent.csv", parallel=False)

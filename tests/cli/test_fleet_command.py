"""``servecast fleet`` as a program. Expected values: the documented keys, that text, JSON and file tell the same fleet,
and one line with exit 2 for the user's mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from servecast.cli import main

EXAMPLE = ["fleet", "--trace", "example", "--model", "llama-3.1-8b", "--gpu", "h100=2.9:16", "--gpu", "l40s=1.1"]
EXAMPLE += ["--slo", "ttft_p99=2s", "--slo", "tpot_p99=50ms", "--input-edges", "0,2048", "--output-edges", "256"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments: str) -> str:
    """The one line of a refusal; nothing printed, nothing left behind."""
    before = sorted(Path().iterdir())
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert result.stderr.startswith("servecast: error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(Path().iterdir()) == before
    return result.stderr


def test_text_json_and_file_tell_the_same_fleet(folder: Path) -> None:
    text = run(*EXAMPLE, "--rate-scale", "8").stdout
    result = run(*EXAMPLE, "--rate-scale", "8", "--out", "fleet.json", "--json")
    found: dict[str, Any] = json.loads(result.stdout)
    written = json.loads((folder / "fleet.json").read_text())
    assert written == found
    assert result.stderr == "wrote fleet.json\n"
    assert found["schema"] == "servecast.fleet-result/1"
    assert found["status"] == "optimal"
    assert found["gap"] == 0.0
    assert found["wall_s"] > 0.0
    assert f"{found['cost_usd_per_hour']:.2f} USD/h" in text
    assert f"binds: {found['binds']}" in text
    for one in found["types"]:
        assert f"{one['replicas']} x {one['gpu']} tp{one['tp']}" in text
        assert one["gpus"] == one["replicas"] * one["tp"]
    names = [one["name"] for one in found["classes"]]
    assert names == ["1-2048 x 1-256", "1-2048 x 257+", "2049+ x 1-256", "2049+ x 257+"]
    assert all(name in text for name in names)
    for one in found["classes"]:
        assert sum(part["share"] for part in one["shares"]) == pytest.approx(1.0, rel=1e-6)
    assert sum(one["requests"] for one in found["classes"]) == 6571
    assert sum(one["gpus"] for one in found["types"] if one["gpu"] == "h100_sxm") <= 16


def test_the_quantile_has_its_price() -> None:
    found = json.loads(run(*EXAMPLE, "--rate-scale", "8", "--rate-quantile", "0.95", "--json").stdout)
    price = found["robustness"]["price_usd_per_hour"]
    assert price == pytest.approx(found["cost_usd_per_hour"] - found["robustness"]["mean_rate_usd_per_hour"], rel=1e-9)
    assert price >= -1e-9
    assert found["rate_basis"].startswith("0.95 quantile")
    assert "price of robustness" in run(*EXAMPLE, "--rate-quantile", "0.95").stdout


def test_slices_are_never_cheaper() -> None:
    free, sliced = (
        json.loads(run(*EXAMPLE, "--rate-scale", "8", "--json", *more).stdout)["cost_usd_per_hour"]
        for more in ([], ["--slices", "2"])
    )
    assert free <= sliced * (1.0 + 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-edges", "512,x"], "--input-edges 'x': must be a whole number"),
        (["--input-edges", "4k"], "--input-edges '4k': write the number out"),
        (["--output-edges", "512,128"], "output_edges must be rising"),
        (["--output-edges", ",".join(map(str, range(1, 80)))], "--output-edges must be at most 64"),
        (["--rate-quantile", "0.2"], "rate_quantile must be between 0.5 and 1"),
        (["--rate-quantile", "nan"], "rate_quantile must be between 0.5 and 1"),
        (["--slices", "0"], "slices must be at least 1"),
        (["--time-limit", "5"], "needs a unit"),
        (["--time-limit", "0s"], "time_limit_s must be positive"),
        (["--gpu", "h100=2.9"], "must be given once"),
        (["--slo", "ttft_p99=1s"], "must be given once"),
        (["--out", "nowhere/fleet.json"], "the folder nowhere does not exist"),
        (["--profile", "no-such-profile"], "no-such-profile"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    assert message in refused(*EXAMPLE, *arguments)


@pytest.mark.parametrize("missing", ["--trace", "--model", "--gpu", "--slo"])
def test_what_is_missing_is_named(missing: str) -> None:
    flags = {"--trace": "example", "--model": "llama-3.1-8b", "--gpu": "h100=2.9", "--slo": "ttft_p99=2s"}
    given = [part for flag, value in flags.items() if flag != missing for part in (flag, value)]
    assert f"{missing} must be given" in refused("fleet", *given)


def test_too_few_gpus_name_the_shortage() -> None:
    """Documented: an infeasible fleet names the constraint and the class, and writes nothing."""
    few = ["fleet", "--trace", "example", "--model", "llama-3.1-8b", "--gpu", "l40s=1.1:1", "--slo", "tpot_p99=50ms"]
    line = refused(*few, "--rate-scale", "8", "--out", "fleet.json")
    assert "no fleet meets the request: l40s: 1 on offer, at least " in line
    assert "; class " in line


def test_an_impossible_limit_names_the_class() -> None:
    line = refused(
        "fleet", "--trace", "example", "--model", "llama-3.1-8b", "--gpu", "h100=2.9", "--slo", "ttft_p99=1ms"
    )
    assert "class 1-512 x 1-128: no GPU type meets ttft_p99 <= 0.001 s" in line

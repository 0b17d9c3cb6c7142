"""The profile document: round trips, refusals, size and independence of everything outside the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

import servecast
from servecast.calibration.profile import (
    MAX_BYTES,
    SHIPPED,
    dumps,
    from_document,
    load_profile,
    read_document,
    shipped_profiles,
)
from servecast.model.engine import EngineConstants
from servecast.model.forecast import Points, Profile, forecast
from servecast.model.formats import ENGINES
from servecast.readers.deployments import deployment

Edit = Callable[[dict[str, Any]], None]


def predictions(profile: Profile) -> np.ndarray:
    """Times of every engine on a few deployments that touch every kernel."""
    made = [
        (deployment(model, gpu, engine, precision, **degrees), engine)
        for model, gpu, precision, degrees in (
            ("Qwen/Qwen3-32B", "h100_sxm", "auto", {"tp": 4}),
            ("meta-llama/Llama-3.1-8B-Instruct", "h200_sxm", "fp8", {}),
            ("deepseek-ai/DeepSeek-V3", "h200_sxm", "auto", {"tp": 8, "ep": 8}),
            ("nvidia/Qwen3-32B-NVFP4", "b200_sxm", "auto", {}),
            ("openai/gpt-oss-120b", "a100_sxm", "auto", {"tp": 4}),
        )
        for engine in ENGINES
    ]
    found = forecast(
        profile,
        Points(
            deployments=tuple(one for one, _ in made),
            engines=tuple(engine for _, engine in made),
            index=np.tile(np.arange(len(made)), 2),
            clients=np.repeat([1.0, 48.0], len(made)),
            isl=np.repeat([300.0, 6000.0], len(made)),
            osl=np.repeat([100.0, 1000.0], len(made)),
        ),
    )
    times = np.stack([found.ttft_s, found.tpot_s, found.decode_s, found.prefill_s])
    assert np.isfinite(times).mean() > 0.9
    return times


def edited(tmp_path: Path, edit: Edit) -> Path:
    raw = json.loads(dumps(read_document(SHIPPED)))
    edit(raw)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


# ---- round trips ---------------------------------------------------------------------------------------------


def test_a_written_profile_predicts_the_same(tmp_path: Path) -> None:
    # Origin: round trip, equality of predictions.
    path = tmp_path / "copy.json"
    path.write_text(dumps(read_document(SHIPPED)), encoding="utf-8")
    np.testing.assert_array_equal(predictions(load_profile(path)), predictions(load_profile()))


def test_writing_is_idempotent(tmp_path: Path) -> None:
    text = dumps(read_document(SHIPPED))
    path = tmp_path / "copy.json"
    path.write_text(text, encoding="utf-8")
    assert read_document(path) == read_document(SHIPPED)
    assert dumps(read_document(path)) == text


def test_the_file_on_disk_is_what_dumps_writes() -> None:
    # Origin: the shipped file itself; nothing was edited by hand.
    shipped = Path(servecast.__path__[0]).parent / "calibration" / "profiles" / f"{SHIPPED}.json"
    if not shipped.is_file():
        pytest.skip("the package is not installed from its source folder")
    assert dumps(read_document(SHIPPED)) == shipped.read_text(encoding="utf-8")


def test_six_digits_are_enough() -> None:
    # Origin: hand. Rounding at 5e-7 relative in every number moves a sum of positive terms by as little; surfaces enter
    # through exp of values below 2, so by 1e-6 per corner.
    document = read_document(SHIPPED)
    raw = json.loads(dumps(document))
    for engine in raw["engines"]:
        for constant in engine["constants"].values():
            constant["value"] *= 1.0 + 4e-7
    moved = from_document(type(document).model_validate(raw))
    np.testing.assert_allclose(predictions(moved), predictions(load_profile()), rtol=1e-5)


# ---- what is inside --------------------------------------------------------------------------------------------


def test_shipped_profile_is_the_default() -> None:
    assert SHIPPED in shipped_profiles()
    assert load_profile().name == SHIPPED
    assert load_profile() is load_profile(SHIPPED)  # parsed once per process


def numbers(value: object) -> int:
    """Numbers of a part of the document, nested."""
    if isinstance(value, BaseModel):
        return sum(numbers(getattr(value, name)) for name in type(value).model_fields)
    if isinstance(value, dict):
        return sum(numbers(one) for one in value.values())
    if isinstance(value, tuple | list):
        return sum(numbers(one) for one in value)
    return int(isinstance(value, int | float) and not isinstance(value, bool))


def test_fewer_than_5000_numbers_per_gpu() -> None:
    # Origin: count. The tables behind them hold more than 200 000 measurements per GPU.
    for kset in read_document(SHIPPED).kernels:
        assert 0 < numbers(kset) < 5000, kset.name


def test_provenance_says_how_to_redo_it() -> None:
    document = read_document(SHIPPED)
    provenance = document.provenance
    assert provenance.licence == "Apache-2.0"
    assert any("kernel tables" in source for source in provenance.sources)
    assert provenance.command.startswith("python -m servecast.calibration.")
    assert 0 < provenance.runs_fitted <= provenance.runs_scored
    for quantiles in provenance.log_residual_quantiles.values():
        assert list(quantiles) == sorted(quantiles)


def test_every_constant_states_its_error_and_unit() -> None:
    for engine in read_document(SHIPPED).engines:
        assert set(engine.constants) == set(EngineConstants.__slots__)
        for name, constant in engine.constants.items():
            assert constant.value > 0.0
            assert 0.0 <= constant.relative_standard_error < 5.0
            assert constant.unit == ("s" if name.endswith("_s") else "-")


def test_a_profile_stands_alone(tmp_path: Path) -> None:
    # Origin: audit hook of the interpreter: every file opened while the profile is loaded and used.
    script = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import numpy as np
from servecast.calibration.profile import load_profile
from servecast.model.forecast import Points, forecast
from servecast.readers.deployments import deployment
one = deployment("Qwen/Qwen3-32B", "h100_sxm", "vllm", tp=2)
column = np.array([8.0])
found = forecast(load_profile(), Points(deployments=(one,), engines=("vllm",), index=np.array([0]),
                 clients=column, isl=100.0 * column, osl=10.0 * column))
assert np.isfinite(found.tpot_s).all()
print("\\n".join(path for path in opened if "data" in path or path.endswith((".csv", ".gz", ".json"))))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"SERVECAST_DATA": "/nonexistent"},
        capture_output=True,
        text=True,
        check=True,
    )
    package = Path(servecast.__path__[0]).resolve().parent
    site = Path(np.__file__).resolve().parents[1]
    found = [Path(line).resolve() for line in done.stdout.splitlines() if line]
    assert any(path.name == f"{SHIPPED}.json" for path in found)
    interpreter = (Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), site)
    outside = [
        path
        for path in found
        if not path.is_relative_to(package) and not any(path.is_relative_to(root) for root in interpreter)
    ]
    assert outside == []
    assert not any("aic-" in str(path) for path in found)


# ---- refusals ------------------------------------------------------------------------------------------------------


def unknown_key(raw: dict[str, Any]) -> None:
    raw["colour"] = "blue"


def unknown_kernel_key(raw: dict[str, Any]) -> None:
    raw["kernels"][0]["gemm"]["bf16"]["colour"] = 1.0


def not_a_number(raw: dict[str, Any]) -> None:
    raw["engines"][0]["constants"]["step_s"]["value"] = float("nan")


def infinite_curve(raw: dict[str, Any]) -> None:
    raw["kernels"][0]["all_reduce"][0]["log_seconds"][0] = float("inf")


def negative_floor(raw: dict[str, Any]) -> None:
    raw["kernels"][0]["gemm"]["bf16"]["floor_s"] = -1e-6


def zero_efficiency(raw: dict[str, Any]) -> None:
    raw["kernels"][0]["prefill_attention"]["compute_efficiency"] = 0.0


def other_schema(raw: dict[str, Any]) -> None:
    raw["schema"] = "servecast.profile/99"


def one_rank(raw: dict[str, Any]) -> None:
    raw["kernels"][0]["all_reduce"][0]["ranks"] = 1


def no_bands(raw: dict[str, Any]) -> None:
    del raw["bands"]


def other_metric(raw: dict[str, Any]) -> None:
    raw["bands"][0]["metric"] = "goodput"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (unknown_key, r"colour: Extra inputs are not permitted"),
        (unknown_kernel_key, r"kernels\.0\.gemm\.bf16\.colour: Extra inputs are not permitted"),
        (not_a_number, r"engines\.0\.constants\.step_s\.value: Input should be a finite number"),
        (infinite_curve, r"kernels\.0\.all_reduce\.0\.log_seconds\.0: Input should be a finite number"),
        (negative_floor, r"kernels\.0\.gemm\.bf16\.floor_s: Input should be greater than 0"),
        (zero_efficiency, r"kernels\.0\.prefill_attention\.compute_efficiency: Input should be greater than 0"),
        (other_schema, r"schema: Input should be 'servecast\.profile/1'"),
        (one_rank, r"all_reduce\.0\.ranks: Input should be greater than or equal to 2"),
        (no_bands, r"bands: Field required"),
        (other_metric, r"bands\.0\.metric: Input should be 'ttft' or 'tpot'"),
    ],
)
def test_a_malformed_document_is_refused_in_one_line(tmp_path: Path, edit: Edit, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        load_profile(edited(tmp_path, edit))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"schema": 3}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^profile .*other\.json: "):
        load_profile(path)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match=rf"profile must be a file or one of .*{SHIPPED}.*, got 'public-1999'"):
        load_profile("public-1999")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match=rf"at most 16 MiB, got {MAX_BYTES + 1} bytes"):
        load_profile(path)


def test_a_kernel_without_numbers_is_refused(tmp_path: Path) -> None:
    def emptied(raw: dict[str, Any]) -> None:
        raw["kernels"][0]["gemm"]["bf16"] = {}

    with pytest.raises(ValueError, match="a kernel without same_as must state floor_s"):
        load_profile(edited(tmp_path, emptied))

"""The machine profile as a document: it survives a round trip, refuses what does not hold together, and predicts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine_samples as made
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.calibration import machine_profile
from servecast.calibration.machine_document import MachineDocument, dumps, samples_bytes
from servecast.calibration.machine_profile import MachineModel, check_samples, intervals, parse_machine, read_machine
from servecast.model.kernels import all_reduce_seconds, gemm_seconds

DOCUMENT = made.document()
TEXT = dumps(DOCUMENT)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(TEXT)
    assert read_machine(path) == DOCUMENT
    assert dumps(read_machine(path)) == TEXT


def test_intervals_hold_their_values() -> None:
    found = intervals(DOCUMENT)
    assert "gemm.bf16.compute_flops_per_s" in found
    for one in found.values():
        assert one.lo < one.value < one.hi
        assert one.standard_error > 0.0


def test_samples_beside_the_document(tmp_path: Path) -> None:
    """Absent, the recorded ones, and others."""
    taken = made.both(drift=0.02, noise=0.02)
    beside = tmp_path / DOCUMENT.samples.file
    assert check_samples(DOCUMENT, tmp_path) == "absent"
    beside.write_bytes(samples_bytes(made.HEADER, taken))
    assert check_samples(DOCUMENT, tmp_path) == "matches"
    beside.write_bytes(samples_bytes(made.HEADER, taken[1:]))
    with pytest.raises(ValueError, match=r"sha256 must be .*; it is another file"):
        check_samples(DOCUMENT, tmp_path)
    assert samples_bytes(made.HEADER, taken) == samples_bytes(made.HEADER, taken)


def test_predictions_of_known_truth() -> None:
    """Hand: the truth of a shape that was not measured lies in the interval; outside the range the flag says so."""
    model = MachineModel(DOCUMENT)
    found = model.gemm_seconds(32, 1024, 1024, "bf16")
    truth = made.gemm_s((("m", 32), ("n", 1024), ("k", 1024)))
    assert found.lo < truth < found.hi
    assert found.value == pytest.approx(truth, rel=0.1)
    assert found.calibrated
    assert not model.gemm_seconds(100_000, 1024, 1024, "bf16").calibrated
    copy = model.copy_seconds("memory_copy", 3e6)
    assert copy.value == pytest.approx(made.LATENCY_S + 3e6 / made.BANDWIDTH, rel=0.05)
    assert model.kernels == (("gemm", "bf16"), ("memory_copy", "u8"))


def test_many_is_a_map_of_one() -> None:
    model = MachineModel(DOCUMENT)
    value, deviation, inside = model.many("memory_copy", "u8", bytes=[4096.0, 1e6, 1e12])
    single = [model.copy_seconds("memory_copy", size) for size in (4096.0, 1e6, 1e12)]
    assert value == pytest.approx([one.value for one in single], rel=1e-12)
    assert [math.log(one.hi / one.value) / 1.6448536 for one in single] == pytest.approx(deviation.tolist(), rel=1e-6)
    assert inside.tolist() == [one.calibrated for one in single] == [True, True, False]


def test_the_models_own_records() -> None:
    """The roofline handed to the model's function gives the profile's seconds, whatever the datasheet."""
    model = MachineModel(DOCUMENT)
    for peak, bandwidth in ((None, None), (1e15, 3e12)):
        parameters = model.kernel_parameters("gemm", "bf16", peak_flops=peak, bandwidth=bandwidth)
        best = next(fit for fit in DOCUMENT.fits if fit.kernel == "gemm")
        seconds = gemm_seconds(
            parameters,
            64,
            1024,
            512,
            weight_bytes_per_element=2.0,
            activation_bytes_per_element=2.0,
            peak_flops=peak or best.peak_flops_per_s,
            bandwidth=bandwidth or best.peak_bytes_per_s,
        )
        assert float(seconds) == pytest.approx(model.gemm_seconds(64, 1024, 512, "bf16").value, rel=1e-6)
    with pytest.raises(ValueError, match="must be fitted by a roofline, got the form alpha_beta"):
        model.kernel_parameters("memory_copy", "u8")


def test_all_reduce_as_a_curve() -> None:
    points = [(("bytes", 1 << power), ("ranks", 2)) for power in range(8, 25, 2)]
    taken = made.samples("all_reduce", points=points, noise=0.01)
    model = MachineModel(made.document(taken=taken))
    seconds = all_reduce_seconds((model.all_reduce_curve(),), 2.0**16, 2)
    assert float(seconds) == pytest.approx(model.all_reduce_seconds(2.0**16).value, rel=1e-9)


def test_attention_and_layer() -> None:
    widths = (("hidden", 1024), ("heads", 8), ("kv_heads", 2), ("intermediate", 2816))
    layers = [(("rows", r), ("context", c), *widths) for r in (1, 4, 16, 64) for c in (128, 1024)]
    heads = (("heads", 8), ("kv_heads", 2))
    decode = [(("batch", b), ("context", c), *heads) for b in (1, 8) for c in (128, 512, 2048)]
    prefill = [(("batch", b), ("length", n), *heads) for b in (1, 4) for n in (64, 256, 512)]

    def of(power: float) -> Callable[[tuple[tuple[str, int], ...]], float]:
        return lambda point: 1e-5 + 1e-8 * float(np.prod([float(size) for _, size in point[:2]])) ** power

    taken = [
        *made.samples("layer", "bf16", of(0.5), layers, noise=0.02),
        *made.samples("decode_attention", "bf16", of(1.0), decode, noise=0.02),
        *made.samples("prefill_attention", "bf16", of(1.5), prefill, noise=0.02),
    ]
    model = MachineModel(made.document(taken=taken))
    assert model.layer_seconds(8, 512, "bf16").calibrated
    for found in (
        model.layer_seconds(8, 512, "bf16"),
        model.decode_attention_seconds(4, 512, 8, 2, "bf16"),
        model.prefill_attention_seconds(2, 128, 8, 2, "bf16"),
    ):
        assert 0.0 < found.lo < found.value < found.hi
    with pytest.raises(ValueError, match=r"kernel must be one of .*, got gemm bf16"):
        model.gemm_seconds(1, 1, 1, "bf16")


def changed(change: Callable[[dict[str, Any]], None]) -> str:
    raw = json.loads(TEXT)
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda raw: raw.update(schema="servecast.machine/2"), "schema: Input should be"),
        (lambda raw: raw.update(fits=[]), "fits: Tuple should have at least 1 item"),
        (lambda raw: raw.update(name="../etc"), "name: String should match pattern"),
        (lambda raw: raw["samples"].update(file="../x"), "samples.file: String should match pattern"),
        (lambda raw: raw["fits"].append(raw["fits"][0]), "fit gemm bf16 must be there once, got it twice"),
        (lambda raw: raw["fits"][0].update(form="cubic"), "fit gemm bf16: form of gemm must be one of"),
        (lambda raw: raw["fits"][0].update(kernel="conv"), "fit conv bf16: kernel must be one that is measured"),
        (lambda raw: raw["fits"][0]["parameters"].pop("floor_s"), "parameters must be floor_s"),
        (lambda raw: raw["fits"][0]["parameters"]["floor_s"].update(lo=1.0), "floor_s must lie in its interval"),
        (lambda raw: raw["fits"][0].update(covariance=[[1.0]]), "covariance must be 3 by 3"),
        (lambda raw: raw["fits"][0]["covariance"][0].__setitem__(1, 9.0), "covariance must be symmetric"),
        (lambda raw: raw["fits"][0]["covariance"][0].__setitem__(0, -9.0), "covariance must have no negative"),
        (lambda raw: raw["fits"][0]["ranges"].pop("m"), "ranges must be those of m, n, k"),
        (lambda raw: raw["fits"][0]["ranges"].update(m=[9.0, 1.0]), "range of m must have its least first"),
        (lambda raw: raw["fits"][0].update(residual_quantiles=[1, 0, 0, 0, 0]), "residual_quantiles must increase"),
    ],
)
def test_what_does_not_hold_together(change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(ValueError, match="machine profile: ") as caught:
        parse_machine(changed(change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"must be a file, got .none\.json."):
        read_machine(tmp_path / "none.json")
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be UTF-8"):
        read_machine(path)
    path.write_text(TEXT[: len(TEXT) // 2])
    with pytest.raises(ValueError, match="document: Invalid JSON"):
        read_machine(path)
    monkeypatch.setattr(machine_profile, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="must be at most"):
        read_machine(path)


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to all values of a document."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [here] * bool(here) + [one for key in keys for one in paths(value[key], (*here, key))]


PATHS = paths(json.loads(TEXT))
JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just([]) | st.just({})


@given(where=st.sampled_from(PATHS), value=JSON)
@settings(max_examples=200)
def test_fuzzed_documents_are_read_or_refused(where: tuple[Any, ...], value: Any) -> None:
    """Any value in any place: a document that can predict, or one line of ValueError."""
    raw = json.loads(TEXT)
    inner = raw
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    message = ""
    try:
        document: MachineDocument | None = parse_machine(json.dumps(raw))
    except ValueError as error:
        document, message = None, str(error)
    assert "\n" not in message
    assert len(message) < 500
    if document is not None:
        model = MachineModel(document)
        for kernel, dtype in model.kernels:
            sizes = {"m": 8, "n": 64, "k": 64} if kernel == "gemm" else {"bytes": 4096}
            found = model.seconds(kernel, dtype, **sizes)
            assert found.lo <= found.value <= found.hi

"""Number formats: bytes by hand, names that users write, and what each engine makes of a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.model.formats import BYTES_PER_ELEMENT, COMPUTE_CLASS, PRECISIONS, canonical_format, resolve_formats


@pytest.mark.parametrize(
    ("fmt", "value_bits", "scale_bits", "block"),
    [
        # Origin: the formats' definitions. NVFP4: E2M1 values, an E4M3 scale per 16 (NVIDIA); MXFP4: an E8M0 exponent
        # per 32 (OCP MX v1.0); grouped 4-bit integers with a 16-bit scale per 32.
        ("fp32", 32, 0, 1),
        ("bf16", 16, 0, 1),
        ("fp16", 16, 0, 1),
        ("fp8", 8, 0, 1),
        ("int8", 8, 0, 1),
        ("nvfp4", 4, 8, 16),
        ("mxfp4", 4, 8, 32),
        ("int4", 4, 16, 32),
    ],
)
def test_bytes_per_element(fmt: str, value_bits: int, scale_bits: int, block: int) -> None:
    assert BYTES_PER_ELEMENT[fmt] == pytest.approx((value_bits + scale_bits / block) / 8.0, rel=1e-12)


def test_blockwise_fp8_scales_are_negligible() -> None:
    # Origin: hand. One 4-byte scale per 128 x 128 tile.
    assert BYTES_PER_ELEMENT["fp8_block"] == pytest.approx(1.0 + 4.0 / 128**2, rel=3e-4)


def test_every_format_has_a_rate() -> None:
    assert BYTES_PER_ELEMENT.keys() == COMPUTE_CLASS.keys()


@pytest.mark.parametrize(
    ("written", "fmt"),
    [
        ("BF16", "bf16"),
        (" bfloat16 ", "bf16"),
        ("half", "fp16"),
        ("FP8-block", "fp8_block"),
        ("fp8_e4m3", "fp8"),
        ("w8a8", "int8"),
        ("fp4", "nvfp4"),
        ("AWQ", "int4"),
        ("gptq", "int4"),
        ("W4A16", "int4"),
    ],
)
def test_names_as_people_write_them(written: str, fmt: str) -> None:
    assert canonical_format(written) == fmt


@given(st.sampled_from([*PRECISIONS, *BYTES_PER_ELEMENT]))
def test_canonical_names_stay(name: str) -> None:
    assert canonical_format(canonical_format(name)) == canonical_format(name)


@pytest.mark.parametrize("name", ["", "fp5", "nan", "fp 8"])
def test_unknown_formats_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^precision must be one of bf16, .*, got '"):
        canonical_format(name)


@pytest.mark.parametrize(
    ("native", "experts", "precision", "engine", "expected"),
    [
        # Origin: what the engines do. A checkpoint's own formats:
        ("bf16", None, "auto", "vllm", ("bf16", "bf16", "bf16")),
        ("fp8_block", None, "auto", "sglang", ("fp8_block", "fp8_block", "bf16")),
        ("bf16", "mxfp4", "auto", "vllm", ("bf16", "mxfp4", "bf16")),
        # a 4-bit request keeps the 16-bit trunk of a checkpoint whose experts alone are 4-bit
        ("bf16", "mxfp4", "fp4", "sglang", ("bf16", "mxfp4", "bf16")),
        ("bf16", None, "fp4", "vllm", ("nvfp4", "nvfp4", "bf16")),
        ("bf16", "mxfp4", "fp8", "vllm", ("fp8", "fp8", "bf16")),
        # TensorRT-LLM: fp8 cache with quantised weights (step notes 4.6: kappa 0.6-0.7), one fp8 kernel
        ("fp8_block", None, "auto", "trtllm", ("fp8", "fp8", "fp8")),
        ("bf16", None, "fp8", "trtllm", ("fp8", "fp8", "fp8")),
        ("bf16", "mxfp4", "fp4", "trtllm", ("bf16", "mxfp4", "fp8")),
        ("bf16", None, "auto", "trtllm", ("bf16", "bf16", "bf16")),
    ],
)
def test_formats_an_engine_runs(
    native: str, experts: str | None, precision: str, engine: str, expected: tuple[str, str, str]
) -> None:
    assert resolve_formats(native, experts, precision, engine) == expected


def test_a_checkpoint_can_ask_for_an_fp8_cache() -> None:
    # Origin: NVIDIA's exports state an fp8 cache in their quantisation config.
    assert resolve_formats("fp8", None, "auto", "vllm", quantised_cache=True) == ("fp8", "fp8", "fp8")

"""`Gpu` records: rates by format, against datasheets and the reference table."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from servecast.model.hardware import Gpu, Link
from servecast.readers.catalogues import gpu, gpu_names

LINK = Link(bandwidth_bytes_per_s=64e9)
PART = Gpu(
    name="part",
    title="Part",
    memory_bytes=1e9,
    bandwidth_bytes_per_s=1e12,
    bf16_flops=1e14,
    peer=LINK,
    inter_node=LINK,
    pcie=LINK,
)


def test_a_part_without_narrow_units_runs_the_next_wider_rate():
    assert [PART.peak_flops(name) for name in ("bf16", "fp8", "nvfp4")] == [1e14, 1e14, 1e14]
    eight = replace(PART, fp8_flops=2e14)
    assert [eight.peak_flops(name) for name in ("fp16", "fp8_block", "nvfp4")] == [1e14, 2e14, 2e14]
    four = replace(eight, fp4_flops=4e14)
    assert four.peak_flops("nvfp4") == 4e14


def test_weight_only_formats_compute_in_16_bit():
    four = replace(PART, fp8_flops=2e14, fp4_flops=4e14)
    assert four.peak_flops("int4") == four.peak_flops("mxfp4") == 1e14


@pytest.mark.parametrize("name", gpu_names())
def test_narrower_formats_are_never_slower(name: str):
    part = gpu(name)
    assert part.peak_flops("nvfp4") >= part.peak_flops("fp8") >= part.peak_flops("bf16") > 0


@pytest.mark.parametrize(
    ("name", "bandwidth", "bf16", "memory_gib"),
    [  # Origin: vendors' datasheets, dense rates.
        ("a100_sxm", 2039e9, 312e12, 80),
        ("h100_sxm", 3350e9, 989e12, 80),
        ("h200_sxm", 4800e9, 989e12, 141),
        ("l4", 300e9, 121e12, 24),
        ("v100", 900e9, 125e12, 32),
        ("rtx_4090", 1008e9, 165.2e12, 23.99),
        ("mi300x", 5300e9, 1307.4e12, 192),
    ],
)
def test_datasheet_figures(name: str, bandwidth: float, bf16: float, memory_gib: float):
    part = gpu(name)
    assert part.bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=0.01)
    assert part.bf16_flops == pytest.approx(bf16, rel=0.01)
    assert part.memory_bytes == pytest.approx(memory_gib * 2**30, rel=0.01)


def test_reference_table_agrees(data_path: Callable[..., Path]):
    # Origin: the table of GPU systems that the project keeps apart from this code.
    with data_path("reference-tables", "gpus.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13
    for row in rows:
        part = gpu(row["system"])
        pairs = {
            "mem_bw_bytes_per_s": part.bandwidth_bytes_per_s,
            "mem_bytes": part.memory_bytes,
            "bf16_flops": part.bf16_flops,
            "fp8_flops": part.fp8_flops,
            "fp4_flops": part.fp4_flops,
            "power_w": part.power_w,
            "sm": part.compute_capability,
            "gpus_per_node": part.gpus_per_node,
            "nvlink_bytes_per_s_one_way": part.peer.bandwidth_bytes_per_s,
            "inter_node_bytes_per_s": part.inter_node.bandwidth_bytes_per_s,
            "pcie_bytes_per_s": part.pcie.bandwidth_bytes_per_s,
        }
        for column, value in pairs.items():
            if row[column]:
                assert value == pytest.approx(float(row[column]), rel=1e-12), (row["system"], column)
            else:
                assert value is None, (row["system"], column)


@pytest.mark.parametrize("name", gpu_names())
def test_every_figure_has_a_source(name: str):
    part = gpu(name)
    sourced = {field for field, source in part.sources if source.strip()}
    words = {"name", "title", "sources"}
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name in words or value is None:
            continue
        if isinstance(value, Link):
            assert {f"{field.name}.bandwidth_bytes_per_s", f"{field.name}.latency_s"} <= sourced
        else:
            assert field.name in sourced


@pytest.mark.parametrize("name", gpu_names())
def test_figures_are_plausible(name: str):
    part = gpu(name)
    assert 8 * 2**30 < part.memory_bytes < 1e12
    assert 1e11 < part.bandwidth_bytes_per_s < 2e13
    assert 1e12 < part.bf16_flops < 1e16
    for link in (part.peer, part.inter_node, part.pcie):
        assert 1e9 < link.bandwidth_bytes_per_s <= part.bandwidth_bytes_per_s
        assert 0 < link.latency_s < 1e-3
    assert 1 <= part.gpus_per_node <= 72

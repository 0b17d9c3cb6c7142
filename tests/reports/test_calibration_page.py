"""The page of a machine profile: what stands on it, and what may not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import machine_samples
from machine_samples import both, document

from servecast.reports.calibration_page import calibration_page


def test_every_fit_has_its_curve_residuals_and_parameters() -> None:
    taken = both(drift=0.02, noise=0.02)
    profile = document(taken=taken)
    page = calibration_page(profile, taken)
    assert page.count("<svg") == 2 * len(profile.fits)
    assert "90 %" in page
    assert page == calibration_page(profile, taken)


def test_text_from_data_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = replace(machine_samples.HEADER, settings={**machine_samples.HEADER.settings, "device": "<b>A machine</b>"})
    monkeypatch.setattr(machine_samples, "HEADER", odd)
    taken = both(drift=0.02, noise=0.02)
    page = calibration_page(document(taken=taken), taken)
    assert "&lt;b&gt;A machine" in page
    assert "<b>" not in page
    assert "<script" not in page

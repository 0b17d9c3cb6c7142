"""Rows of measured runs. Expected values by hand."""

from __future__ import annotations

import numpy as np

from servecast.model.request_rows import measured_rows


def test_rows_come_in_order_of_arrival_and_a_failed_request_has_no_stamps() -> None:
    rows = measured_rows(
        [2.0, 1.0], [2.5, 1.25], [3.0, 4.0], [10, 20], [2, 3], scheduled_s=[2.1, 1.1], failed=[True, False]
    )
    assert rows.arrival_s.tolist() == [1.0, 2.0]
    assert rows.n_in.tolist() == [20, 10]
    assert rows.refused.tolist() == [False, True]
    for column in (rows.first_token_s, rows.last_token_s, rows.scheduled_s):
        assert np.isfinite(column[0])
        assert np.isnan(column[1])


def test_what_a_client_cannot_see_is_missing() -> None:
    rows = measured_rows([0.0], [1.0], [2.0], [5], [2])
    assert np.isnan(rows.scheduled_s[0])
    assert rows.preemptions.tolist() == [0]

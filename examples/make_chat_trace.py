"""Write the example trace ``servecast/examples/chat.csv.gz``: 20 minutes of chat, generated, not recorded.

It has the published statistics of a chat service, the conversation part of the Azure LLM inference trace 2023 (Patel et
al., Splitwise, ISCA 2024; CC-BY-4.0), but none of its rows:

===================  ==================================================================
requests per second  5.5 on average, about 6,600 in all
gap cv               about 1.09
IDC(60 s)            above 10: the rate drifts by some 20 % over minutes
prompt tokens        log-normal, mu 6.63, sigma 0.99, at most 14,050
output tokens        log-normal, mu 5.02, sigma 0.86, at most 1,000 (the limit)
===================  ==================================================================

The same seed writes the same bytes: times are rounded to a microsecond and the archive carries no date.

    python examples/make_chat_trace.py [target.csv.gz]
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEED = 20231116
SPAN_S = 1200.0
RATE_RPS = 5.5
GAP_CV = 1.03
"""Gaps at a constant rate; the drift adds the rest."""
DRIFT = ((0.20, 1200.0, 0.6), (0.17, 460.0, 2.1), (0.10, 170.0, 4.0))
"""Relative amplitude, period [s] and phase of the waves in the rate."""
TARGET = Path(__file__).resolve().parents[1] / "servecast" / "examples" / "chat.csv.gz"


def arrivals(rng: np.random.Generator) -> NDArray[np.float64]:
    """Renewal arrivals with gamma gaps in operational time, bent to the drifting rate. [s]"""
    t_s = np.linspace(0.0, SPAN_S, 12_001)
    rate = np.ones_like(t_s)
    for size, period, phase in DRIFT:
        rate += size * np.sin(2.0 * np.pi * t_s / period + phase)
    rate *= RATE_RPS / rate.mean()
    expected = np.concatenate([[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2.0 * np.diff(t_s))])
    shape = GAP_CV**-2
    operational = np.cumsum(rng.gamma(shape, 1.0 / shape, size=int(2 * RATE_RPS * SPAN_S)))
    bent: NDArray[np.float64] = np.interp(operational[operational < expected[-1]], expected, t_s)
    return bent


def lengths(rng: np.random.Generator, count: int, mu: float, sigma: float, most: int) -> NDArray[np.int64]:
    """Log-normal token counts from 1 to `most`; what would be longer stops at the limit."""
    return np.clip(np.rint(rng.lognormal(mu, sigma, count)), 1, most).astype(np.int64)


def write_trace(target: Path) -> int:
    """Write the trace and return its number of requests."""
    rng = np.random.default_rng(SEED)
    t_s = arrivals(rng)
    t_s -= t_s[0]
    n_in = lengths(rng, t_s.size, 6.63, 0.99, 14_050)
    n_out = lengths(rng, t_s.size, 5.02, 0.86, 1_000)
    rows = (f"{t:.6f},{i},{o}\n" for t, i, o in zip(t_s.tolist(), n_in.tolist(), n_out.tolist(), strict=True))
    target.write_bytes(gzip.compress(("t_s,n_in,n_out\n" + "".join(rows)).encode("ascii"), mtime=0))
    return t_s.size


if __name__ == "__main__":
    written = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    sys.stdout.write(f"{written}: {write_trace(written)} requests\n")

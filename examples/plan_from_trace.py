"""Cheapest way to serve a trace, and what twice its rate would cost.

python examples/plan_from_trace.py [requests.csv] [model]
"""

# ruff: noqa: T201 (an example prints its answer)
from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

import servecast

PRICES = {"h100": 2.9, "h200": 3.5, "l40s": 1.1}
"""US dollars per hour and GPU: put your own here."""


def main(arguments: list[str]) -> None:
    """Print one line per rate."""
    shipped = Path(str(resources.files("servecast").joinpath("examples", "chat.csv.gz")))
    trace = Path(arguments[0]) if arguments else shipped
    llm = servecast.llm(arguments[1] if len(arguments) > 1 else "meta-llama/Llama-3.1-8B-Instruct")
    workload = servecast.workload_from_trace(servecast.read_trace(trace))
    offers = [servecast.Offer(gpu=servecast.gpu(name), usd_per_hour=price) for name, price in PRICES.items()]
    limits = [
        servecast.Slo(metric="ttft", percentile=99.0, limit_s=2.0),
        servecast.Slo(metric="tpot", percentile=99.0, limit_s=0.05),
    ]
    print(f"{llm.name}, {workload.arrivals.requests} requests of {workload.name}")
    for scale in (1.0, 2.0, 4.0):
        found = servecast.plan(workload, llm, offers, limits, rate_scale=scale, load_curve=False).plan
        rate = f"{scale * workload.rate_rps:6.2f} requests/s"
        if found.plan is None:
            print(f"{rate}: not possible, {found.binds}")
            continue
        ttft = found.plan.ttft_p99_s
        print(
            f"{rate}: {found.plan.name:<20} {found.plan.usd_per_hour:6.2f} USD/h   TTFT p99 {ttft.value:.2f} s "
            f"[{ttft.lo:.2f}, {ttft.hi:.2f}]   {found.binds}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])

"""What two models cost as the load grows: dollars per hour, and per million output tokens.

python examples/compare_models.py [model] [model]
"""

# ruff: noqa: T201 (an example prints its answer)
from __future__ import annotations

import sys

import servecast
from servecast.model.workload import LognormalLength

RATES_RPS = (1.0, 4.0, 16.0, 64.0)
PRICES = {"h100": 2.9, "h200": 3.5}
"""US dollars per hour and GPU: put your own here."""


def main(arguments: list[str]) -> None:
    """Print a small table."""
    models = arguments or ["meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-32B"]
    offers = [servecast.Offer(gpu=servecast.gpu(name), usd_per_hour=price) for name, price in PRICES.items()]
    limits = [
        servecast.Slo(metric="ttft", percentile=95.0, limit_s=1.0),
        servecast.Slo(metric="tpot", percentile=95.0, limit_s=0.04),
    ]
    print(f"{'requests/s':>10}  {'model':<34} {'fleet':<20} {'USD/h':>8} {'USD/Mtok':>9}")
    for rate in RATES_RPS:
        workload = servecast.workload_from_parameters(
            rate,
            gap_cv=1.2,
            n_in=LognormalLength(mean=1155.0, cv=0.96, maximum=8000.0),
            n_out=LognormalLength(mean=211.0, cv=0.8, maximum=1000.0),
        )
        for model in models:
            best = servecast.plan(workload, servecast.llm(model), offers, limits, load_curve=False).plan.plan
            if best is None:
                print(f"{rate:>10g}  {model:<34} not possible")
                continue
            per_million = best.usd_per_hour / (3600.0 * rate * workload.mean_out) * 1e6
            print(f"{rate:>10g}  {model:<34} {best.name:<20} {best.usd_per_hour:>8.2f} {per_million:>9.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])

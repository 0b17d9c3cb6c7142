"""``python -m servecast.calibration.microbenchmarks --budget 60s --out samples.jsonl``: samples of a bare machine.

Needs torch, numpy and scipy. `servecast calibrate --from-samples` turns the file into a machine profile elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from servecast.calibration.microbenchmarks.suite import (
    GROUPS,
    Settings,
    measure,
    parse_budget,
    parse_groups,
    parse_memory,
)
from servecast.calibration.microbenchmarks.timing import SystemClock


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    clock = SystemClock()
    begun_s = clock.perf()
    flags = _parser().parse_args(arguments)
    try:
        settings = Settings(
            budget_s=parse_budget(flags.budget),
            device=flags.device,
            memory_bytes=parse_memory(flags.memory),
            groups=parse_groups(flags.only),
            threads=flags.threads,
            seed=flags.seed,
        )
        from servecast.calibration.fits.machine import choose_next

        _, outcome = measure(
            settings,
            flags.out,
            environment={"date": datetime.now(UTC).date().isoformat(), "budget_s": settings.budget_s},
            clock=clock,
            begun_s=begun_s,
            choose=choose_next,
            progress=_progress(),
        )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"microbenchmarks: error: {' '.join(str(error).split())}\n")
        return 2
    for suspect in outcome.suspects:
        sys.stderr.write(f"warning: {suspect}\n")
    sys.stderr.write(f"{outcome.samples} samples in {outcome.rounds} rounds, {outcome.elapsed_s:.1f} s\n")
    if outcome.interrupted:
        sys.stderr.write("interrupted: all that was measured is in the file; the same command goes on from there\n")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m servecast.calibration.microbenchmarks", description=__doc__)
    parser.add_argument("--budget", default="60s", help="measuring time, set-up included")
    parser.add_argument("--out", required=True, help="journal of samples; an existing one is gone on with")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--memory", default="2GiB", help="most memory for buffers")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups of kernels")
    parser.add_argument("--threads", type=int, help="default: physical cores")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def _progress() -> Callable[[int, int], None] | None:
    if not sys.stderr.isatty():
        return None

    def report(done: int, total: int) -> None:
        sys.stderr.write(f"\r{done} of {total} s" + ("\n" if done >= total else ""))
        sys.stderr.flush()

    return report


if __name__ == "__main__":
    sys.exit(main())

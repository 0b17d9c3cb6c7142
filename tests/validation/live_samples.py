"""A made-up live run whose engine obeys known step times, so that every error of a comparison is known."""

from __future__ import annotations

import numpy as np

from servecast.calibration.fits.engine_steps import StepSamples, fit_steps
from servecast.model.engine_steps import EngineSteps, StepWork, decode_work, with_chunk
from servecast.readers.yaml_edge import load_yaml
from servecast.validation.draft_choice import AcceptanceCount
from servecast.validation.executors import capacity_rps, simulated
from servecast.validation.live_facts import EngineSize, LiveFacts, LoadRun
from servecast.validation.pace import Probe
from servecast.validation.scenario import Scenario, parse_scenario, shipped_text
from servecast.validation.scheduler import EngineLimits

TRUTH = EngineSteps(
    knots=(1.0,),
    base_s=0.010,
    row_s=(0.0005,),
    cached_token_s=1e-7,
    draft_pass_s=0.0005,
    draft_row_s=2e-5,
)
LIMITS = EngineLimits(
    max_num_seqs=32, max_num_batched_tokens=256, kv_tokens=32.0 * 640, block_size=1, enable_prefix_caching=False
)


def scenario(name: str = "torch-quick") -> Scenario:
    return parse_scenario(load_yaml(shipped_text(name), name=name), name=name)


def samples(works: list[StepWork], *, factor: float = 1.0, noise: float = 0.01, blocks: int = 4) -> StepSamples:
    rng = np.random.default_rng(len(works))
    rows = [(work, block) for block in range(blocks) for work in works]
    columns = {name: np.array([float(getattr(w, name)) for w, _ in rows]) for name in StepWork.__dataclass_fields__}
    seconds = [factor * float(TRUTH.seconds(w)) * np.exp(noise * rng.standard_normal()) for w, _ in rows]
    return StepSamples(**columns, block=np.array([block for _, block in rows]), seconds=np.array(seconds))


def live_run(
    *, factor: float = 1.0, noise: float = 0.01, pace_after: float = 1.0, name: str = "torch-quick"
) -> LiveFacts:
    """Facts whose engine takes `factor` times as long as its calibration says."""
    from servecast.validation.live_loads import load_trace

    plan = scenario(name)
    assert plan.loads is not None
    assert plan.speculation is not None
    longest = max(plan.speculation.lengths)
    calibrated = [decode_work(b, c) for b in (1, 2, 4, 8, 16, 32) for c in (64, 448)]
    calibrated += [decode_work(b, 128, k, armed=True) for b in (1, 8, 32) for k in (0, 1, 3, longest)]
    calibrated += [with_chunk(StepWork(rows=0.0), 0, n) for n in (16, 64, 128, 256)]
    drafted = [decode_work(b, 192, k, armed=True) for b in plan.speculation.batches for k in plan.speculation.lengths]
    facts = LiveFacts(
        engine={"engine": "pretended", "torch": "0"},
        limits=LIMITS,
        size=EngineSize(weight_bytes=4e8, params=1e8, bandwidth=4e10, flops=1e11),
        fit=fit_steps(samples(calibrated, noise=noise)),
        validated=samples([decode_work(b, 200) for b in (1, 5, 20)], factor=factor, noise=noise),
        drafted=samples(drafted, factor=factor, noise=noise),
        compared=samples(drafted, factor=factor, noise=noise),
        context=192.0,
        acceptance_calibrated=[
            AcceptanceCount(draft_length=longest, rounds=1000, survived=(700, 490, 343, 240, 168)[:longest])
        ],
        acceptance_validated=[
            AcceptanceCount(draft_length=k, rounds=1000, survived=tuple(int(1000 * 0.7**j) for j in range(1, k + 1)))
            for k in range(1, longest + 1)
        ],
    )
    n_in, n_out = np.linspace(32, 96, 33), np.linspace(16, 48, 33)
    slow = EngineSteps(
        knots=TRUTH.knots, base_s=factor * TRUTH.base_s, row_s=(factor * TRUTH.row_s[0],), cached_token_s=factor * 1e-7
    )
    for case in plan.loads.cases:
        for seed in plan.loads.seeds:
            trace = load_trace(plan.loads, case, seed, capacity=capacity_rps(TRUTH, LIMITS, n_in, n_out))
            facts.loads.append(
                LoadRun(
                    case=case.name,
                    seed=seed,
                    utilisation=case.utilisation,
                    busy_share=0.9,
                    trace=trace,
                    rows=simulated(trace, slow, LIMITS),
                    probes=(Probe(0.0, 1.0), Probe(float(trace.t_s[-1]), pace_after)),
                )
            )
    return facts

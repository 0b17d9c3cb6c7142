"""The closed form against the reference simulator on the same requests, where what a step holds decides its time."""

from __future__ import annotations

import numpy as np
import pytest

from servecast.model.engine_steps import EngineSteps
from servecast.model.workload import Trace
from servecast.validation.executors import closed_form, figures, simulated
from servecast.validation.scheduler import EngineLimits

LIMITS = EngineLimits(
    max_num_seqs=32, max_num_batched_tokens=256, kv_tokens=32 * 640.0, block_size=1, enable_prefix_caching=False
)


def _bursts(seed: int, rate: float = 4.0) -> Trace:
    """60 requests with gamma gaps of a coefficient of variation of 2; a step holds two to eight prompts."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.gamma(0.25, 4.0 / rate, 60))
    return Trace(
        name=f"bursts {seed}",
        t_s=times - times[0],
        n_in=rng.integers(32, 97, 60),
        n_out=rng.integers(16, 49, 60),
    )


def _mean(name: str, executor: str, steps: EngineSteps, seeds: range) -> float:
    run = {"simulator": simulated, "closed_form": closed_form}[executor]
    return float(np.mean([figures(run(_bursts(seed), steps, LIMITS))[name] for seed in seeds]))


@pytest.mark.parametrize("beyond_s", [0.0002, 0.001, 0.003])
def test_prompts_of_one_step_cost_what_the_step_costs(beyond_s: float) -> None:
    """Rows above 128 are cheaper than those below, as dear, or dearer: prompts in one step are no sum of prompts alone.

    Priced one by one, TTFT of the dear form would come out a quarter low. What is left is the fluid's own error.
    """
    steps = EngineSteps(knots=(1.0, 128.0), base_s=0.02, row_s=(0.001, beyond_s), sequence_s=0.0002)
    for name in ("ttft_mean_s", "tpot_mean_s", "makespan_s"):
        fluid, exact = (_mean(name, executor, steps, range(10)) for executor in ("closed_form", "simulator"))
        np.testing.assert_allclose(fluid, exact, rtol=0.04, err_msg=name)


def test_a_prompt_longer_than_a_step_is_a_step_for_every_chunk_by_hand() -> None:
    # hand: 600 tokens as 256 + 256 + 88, each step 0.1 s and 1 ms a row: 0.356 + 0.356 + 0.188 s, nothing beside
    steps = EngineSteps(knots=(0.0,), base_s=0.1, row_s=(0.001,))
    trace = Trace(name="long", t_s=np.array([0.0]), n_in=np.array([600]), n_out=np.array([2]))
    for run in (closed_form, simulated):
        rows = run(trace, steps, LIMITS)
        np.testing.assert_allclose(rows.first_token_s, [0.9], rtol=1e-12)
        np.testing.assert_allclose(rows.last_token_s, [0.9 + 0.101], rtol=1e-12)

"""Speculative steps from a profile: against the plain decode step they generalise, and the shape of a draft head."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from servecast.calibration.profile import SHIPPED, load_profile
from servecast.model.batch_steps import tabulated_steps
from servecast.model.deployment import Deployment
from servecast.model.forecast import error_band
from servecast.model.profiled_speculation import ProfiledCost, draft_head
from servecast.model.speculation_cost import step_seconds
from servecast.readers.catalogues import llm
from servecast.readers.deployments import deployment

Floats = NDArray[np.float64]
Z90 = NormalDist().inv_cdf(0.95)

PROFILE = load_profile(SHIPPED)
DENSE = deployment("meta-llama/Llama-3.1-70B-Instruct", "h100", "vllm", tp=4)
MIXTURE = deployment("Qwen/Qwen3-30B-A3B", "h100", "vllm", tp=1)
TARGETS = {"dense": DENSE, "mixture": MIXTURE}


def cost(target: Deployment = DENSE, drafter: str | None = None) -> ProfiledCost:
    return ProfiledCost(PROFILE, target, "vllm", None if drafter is None else llm(drafter))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("context", [256.0, 4096.0])
def test_a_row_per_request_is_a_plain_decode_step(name: str, context: float) -> None:
    # Origin: the same step by the simulator's table of plain decode, at its own knots.
    target = TARGETS[name]
    table = tabulated_steps(PROFILE, target, "vllm", max_batch=64, longest=8192.0, chunk_tokens=8192.0)
    for batch in (1, 8, 64):
        plain = table.decode(batch, int(batch * context))[0]
        assert float(cost(target).verify(batch, batch, context)) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("name", TARGETS)
def test_the_cache_of_a_request_is_read_once(name: str) -> None:
    # Origin: definition; what a context adds does not depend on the rows and grows with the requests.
    made = cost(TARGETS[name])
    rows = np.array([8.0, 16.0, 64.0])
    added = made.verify(rows, 8.0, 16384.0) - made.verify(rows, 8.0, 1.0)
    assert (added > 0.0).all()
    np.testing.assert_allclose(added, added[0], rtol=1e-6)
    more = made.verify(rows, 16.0, 16384.0) - made.verify(rows, 16.0, 1.0)
    assert (more > 1.5 * added).all()


@pytest.mark.parametrize("name", TARGETS)
def test_steps_grow_with_rows_requests_and_context(name: str) -> None:
    # Origin: more of anything is more work.
    made = cost(TARGETS[name])
    rows = np.arange(8.0, 400.0, 8.0)
    assert (np.diff(made.verify(rows, 8.0, 1024.0)) >= 0.0).all()
    assert (np.diff(made.verify(512.0, np.arange(1.0, 64.0), 1024.0)) > 0.0).all()
    assert (np.diff(made.verify(64.0, 8.0, np.arange(0.0, 9000.0, 1000.0))) > 0.0).all()
    # memory bound, though a mixture wakes more experts: 4 rows cost less than 2 of the 4 steps they may save
    assert float(made.verify(4.0, 1.0, 1024.0)) < 2.0 * float(made.verify(1.0, 1.0, 1024.0))


def test_drafting_is_a_pass_per_position() -> None:
    # Origin: definition; length 0 drafts nothing, armed it is one pass; a round costs a tenth of a plain step beside.
    made = cost()
    once = made.idle(8.0, 1024.0)
    beside = 0.1 * float(made.verify(1.0, 1.0, 1.0))
    expected = np.arange(6) * once + beside * (np.arange(6) > 0)
    np.testing.assert_allclose(made.draft(8.0, np.arange(6), 1024.0), expected, rtol=1e-12)
    step = step_seconds(made, 8.0, 3, 1024.0)
    assert float(step) == pytest.approx(float(made.verify(32.0, 8.0, 1024.0) + 3 * once) + beside, rel=1e-12)
    armed = step_seconds(made, 8.0, 0, 1024.0, armed=True) - step_seconds(made, 8.0, 0, 1024.0)
    assert float(armed) == pytest.approx(float(once), rel=1e-9)


def test_a_draft_model_is_a_target_of_its_own() -> None:
    # Origin: the same model as a target with one row per request on the same GPUs.
    small = replace(DENSE, llm=llm("meta-llama/Llama-3.2-1B-Instruct"))
    with_model = cost(drafter="meta-llama/Llama-3.2-1B-Instruct")
    for batch in (1.0, 32.0):
        alone = float(cost(small).verify(batch, batch, 2048.0))
        assert float(with_model.idle(batch, 2048.0)) == pytest.approx(alone, rel=1e-12)
    np.testing.assert_array_equal(with_model.verify(8.0, 2.0, 64.0), cost().verify(8.0, 2.0, 64.0))


def test_a_head_costs_little_of_its_target() -> None:
    # Origin: weights. One of 80 layers and the head: between 1 and 15 % of the target's step.
    made = cost()
    share = float(made.idle(1.0, 1024.0) / made.verify(1.0, 1.0, 1024.0))
    assert 0.01 < share < 0.15


def test_scalars_one_by_one_are_the_array() -> None:
    # Origin: broadcasting; shapes of the arguments together.
    made = cost(MIXTURE)
    rows, batch, context = np.array([[4.0], [40.0]]), np.array([1.0, 2.0, 4.0]), 512.0
    whole = made.verify(rows, batch, context)
    assert whole.shape == (2, 3)
    one_by_one = [[float(made.verify(n, b, context)) for b in batch] for n in rows[:, 0]]
    np.testing.assert_allclose(whole, one_by_one, rtol=1e-12)
    assert made.idle(batch, context).shape == (3,)
    assert made.draft(batch, np.array([[0], [2]]), context).shape == (2, 3)
    assert made.verify(4.0, 1.0, 0.0).shape == ()


def test_doubt_is_the_profile_s_band() -> None:
    # Origin: hand, half of a 90 % interval is 1.645 standard deviations.
    lo, hi = error_band(PROFILE, DENSE, "tpot")
    assert cost().log_sd == pytest.approx((hi - lo) / 2 / Z90, rel=1e-4)
    assert cost().log_sd > 0.0


def test_the_head_of_a_dense_model_by_hand() -> None:
    # Origin: Llama 3.1 70B, hidden 8192, 64 heads, 8 kv heads of 128, intermediate 28672: attention
    # 8192 x 128 x (64 + 8 + 8 + 64), MLP 3 x 8192 x 28672.
    head = draft_head(DENSE.llm)
    assert (head.layers, head.moe_layers, head.experts) == (1, 0, 0)
    attention, mlp = 8192 * 128 * 144, 3 * 8192 * 28672
    embeddings = 2 * 8192 * 128256
    # norms are a few thousand more
    assert head.params_total == pytest.approx(attention + mlp + embeddings, rel=1e-4)


def test_the_head_of_a_mixture_keeps_its_experts() -> None:
    # Origin: definition; Qwen3-30B-A3B has no dense MLP at all.
    head = draft_head(replace(MIXTURE.llm, intermediate=0))
    assert (head.layers, head.moe_layers, head.experts) == (1, 1, MIXTURE.llm.experts)
    assert (head.windowed_layers, head.linear_layers) == (0, 0)
    assert head.vocabulary == MIXTURE.llm.vocabulary


def test_steps_of_eagle_on_an_h100() -> None:
    # Origin: vLLM issue 20780, MT-bench at batch 1: tokens per step times TPOT at lengths 2, 4, 7; none 7.07 ms. EAGLE
    # was the source of the share per round; EAGLE-3 has a larger head and must lie inside the 90 % band or at its edge.
    made = cost(deployment("meta-llama/Llama-3.1-8B-Instruct", "h100", "vllm"))
    found = step_seconds(made, 1.0, np.array([0, 2, 4, 7]), 200.0)
    eagle = 1e-3 * np.array([7.07, 2.10 * 4.37, 2.39 * 4.48, 2.47 * 5.20])
    eagle3 = 1e-3 * np.array([7.07, 2.36 * 4.32, 3.08 * 4.05, 3.54 * 4.29])
    np.testing.assert_allclose(found, eagle, rtol=0.03)
    assert (np.abs(np.log(eagle3 / found)) <= 1.01 * Z90 * made.log_sd).all()

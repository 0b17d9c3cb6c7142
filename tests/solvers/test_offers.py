"""What is on offer must not change how an offer is judged; few choices still give alternatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import servecast
import servecast.model.workload
from servecast.model.workload import Workload
from servecast.planning import Answer

DataPath = Callable[..., Path]


@pytest.fixture(scope="module")
def code(data_path: DataPath) -> Workload:
    return servecast.workload_from_trace(servecast.read_trace(data_path("azure-llm-2023", "code.csv.gz")))


def ask(workload: Workload, prices: Mapping[str, float], *, limit: int | None = None) -> Answer:
    offers = [servecast.Offer(gpu=servecast.gpu(name), usd_per_hour=usd, limit=limit) for name, usd in prices.items()]
    slos = [
        servecast.Slo(metric="ttft", percentile=99.0, limit_s=4.0),
        servecast.Slo(metric="tpot", percentile=99.0, limit_s=0.2),
    ]
    return servecast.plan(workload, servecast.llm("llama-3.1-8b"), offers, slos, load_curve=False)


@pytest.mark.parametrize("added", ["a100", "h100", "b200", "t4"])
def test_another_offer_never_costs_more_on_a_bursty_trace(added: str, code: Workload) -> None:
    """Origin: a minimum over a larger set; the trace is the burstiest that is public, where windows matter most."""
    alone, wider = ask(code, {"l40s": 1.1}), ask(code, {"l40s": 1.1, added: 2.5})
    assert alone.plan.plan is not None
    assert wider.plan.plan is not None
    assert wider.plan.plan.usd_per_hour <= alone.plan.plan.usd_per_hour * (1.0 + 1e-12)


def test_one_gpu_still_has_alternatives() -> None:
    """Origin: the search space. One H100 leaves the degrees and replicas no choice, its batch limits do."""
    light = servecast.workload_from_parameters(0.2, n_in=_length(400), n_out=_length(100))
    found = ask(light, {"h100": 3.0}, limit=1).plan
    assert found.plan is not None
    assert len(found.alternatives) >= 4
    assert len({one.max_num_seqs for one in (found.plan, *found.alternatives)}) == len(found.alternatives) + 1


def test_a_batch_of_one_can_be_planned() -> None:
    """Origin: the request's own rule, max_num_seqs >= 1."""
    light = servecast.workload_from_parameters(0.05, n_in=_length(400), n_out=_length(100))
    offers = [servecast.Offer(gpu=servecast.gpu("h100"), usd_per_hour=3.0)]
    limit = servecast.Slo(metric="tpot", percentile=99.0, limit_s=0.2)
    chosen = servecast.plan(light, servecast.llm("llama-3.1-8b"), offers, [limit], max_num_seqs=[1]).plan.plan
    assert chosen is not None
    assert chosen.max_num_seqs == 1


def _length(tokens: float) -> servecast.model.workload.FixedLength:
    return servecast.model.workload.FixedLength(tokens)

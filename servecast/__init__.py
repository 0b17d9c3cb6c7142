"""servecast forecasts how an inference service will behave and decides how to run it.

>>> import servecast
>>> llm = servecast.llm("meta-llama/Llama-3.1-8B-Instruct")
>>> round(llm.params_total / 1e9, 2)
8.03
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from servecast.calibration.profile import load_profile
    from servecast.confirming import confirm
    from servecast.model.arrivals import workload_from_parameters, workload_from_trace
    from servecast.model.hardware import Gpu, Offer
    from servecast.model.llm import Llm
    from servecast.model.slo import Slo
    from servecast.model.workload import Trace, Workload
    from servecast.planning import plan
    from servecast.predicting import Point, predict
    from servecast.readers.catalogues import gpu, llm
    from servecast.readers.traces import read_trace
    from servecast.simulating import simulate_fleet
    from servecast.speculating import plan_speculation
    from servecast.speculation_sources import SpeedRequest, speed_source
    from servecast.validating import load_scenario, validate

_HOME = {
    "Gpu": "model.hardware",
    "Llm": "model.llm",
    "Offer": "model.hardware",
    "Point": "predicting",
    "Slo": "model.slo",
    "SpeedRequest": "speculation_sources",
    "Trace": "model.workload",
    "Workload": "model.workload",
    "confirm": "confirming",
    "gpu": "readers.catalogues",
    "llm": "readers.catalogues",
    "load_profile": "calibration.profile",
    "load_scenario": "validating",
    "plan": "planning",
    "plan_speculation": "speculating",
    "predict": "predicting",
    "read_trace": "readers.traces",
    "simulate_fleet": "simulating",
    "speed_source": "speculation_sources",
    "validate": "validating",
    "workload_from_parameters": "model.arrivals",
    "workload_from_trace": "model.arrivals",
}

__all__ = [
    "Gpu",
    "Llm",
    "Offer",
    "Point",
    "Slo",
    "SpeedRequest",
    "Trace",
    "Workload",
    "confirm",
    "gpu",
    "llm",
    "load_profile",
    "load_scenario",
    "plan",
    "plan_speculation",
    "predict",
    "read_trace",
    "simulate_fleet",
    "speed_source",
    "validate",
    "workload_from_parameters",
    "workload_from_trace",
]


def __getattr__(name: str) -> Any:
    """Import on first use: ``import servecast`` itself costs nothing."""
    if name in _HOME:
        return getattr(import_module(f"servecast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'servecast' has no attribute {name!r}")

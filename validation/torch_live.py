"""A scenario on our own PyTorch engine: pace and steps, loads, acceptance, in one interleaved run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.engine_steps import PointMedians, StepSamples, fit_steps, near_pace
from servecast.calibration.microbenchmarks.device import cpu_model
from servecast.model.engine_steps import EngineSteps, StepWork, decode_work, with_chunk
from servecast.model.workload import Trace
from servecast.validation.draft_choice import AcceptanceCount
from servecast.validation.executors import capacity_rps
from servecast.validation.http_load import Clock, clock_warning
from servecast.validation.live_facts import EngineSize, LiveFacts, LoadRun
from servecast.validation.live_loads import load_trace
from servecast.validation.pace import Probe
from servecast.validation.scenario import Loads, Scenario, Speculation, Steps
from servecast.validation.scheduler import EngineLimits
from servecast.validation.torch_engine.cells import StepBench, StepPoint, StepSample, measure
from servecast.validation.torch_engine.drafters import DraftModel
from servecast.validation.torch_engine.engine import Request, TorchEngine
from servecast.validation.torch_engine.llama import Llama
from servecast.validation.torch_engine.serving import closed_batch, serve
from servecast.validation.torch_engine.threads import threads
from servecast.validation.torch_engine.trained_pair import RECIPES, TrainedPair, load_pair, trained_pair

Report = Callable[[str, int, int], None]
"""Takes what is done, how much of it, of how much."""
Floats = NDArray[np.float64]

CHUNKS = (16, 45, 96, 127, 160, 190, 224, 256)
"""Prompts alone whose steps are calibrated; some fill whole tiles of a kernel and some do not. [tokens]"""
MIXED = (
    (16, ((0, 61),)),
    (8, ((0, 32), (0, 32))),
    (8, ((0, 80), (0, 83))),
    (4, ((0, 77),)),
    (4, ((0, 48), (0, 48), (0, 48))),
    (4, ((0, 96), (0, 90), (0, 56))),
    (4, ((0, 32), (0, 64), (0, 65), (0, 64))),
    (4, ((0, 48), (0, 80), (0, 64))),
    (2, ((64, 130),)),
    (2, ((0, 64), (0, 64))),
    (2, ((0, 64), (0, 95), (0, 64))),
    (1, ((0, 47),)),
    (1, ((0, 32), (0, 64), (0, 97))),
)
"""Prompts beside decodes: divisor of the largest batch, chunks. [tokens]"""
PROBE_EVERY = 2
"""Steps of a load from one probe of the pace to the next."""
PROBE_BATCH = 16
"""Largest batch of a decode step that probes it: loads below a utilisation of 1 seldom have more."""


def run_torch(scenario: Scenario, *, device: str = "cpu", progress: Report | None = None) -> LiveFacts:
    """Everything that the scenario asks of a live engine.

    An interrupt or a clock that jumps ends the run; what was measured until then is returned with the reason.
    """
    facts = LiveFacts()
    say = progress or (lambda *_: None)
    try:
        _run(scenario, facts, device, say)
    except KeyboardInterrupt:
        facts.stopped = "interrupted"
    except (RuntimeError, ValueError, OSError) as error:
        facts.stopped = " ".join(str(error).split())[:300]
    return facts


def _run(scenario: Scenario, facts: LiveFacts, device: str, say: Report) -> None:
    import torch

    spec = scenario.engine
    pair = trained_pair(RECIPES[spec.pair], progress=lambda done, total: say("training", done, total))
    target, draft = load_pair(pair, device=device)
    params = float(sum(one.numel() for one in target.parameters()))
    facts.limits = EngineLimits(
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        kv_tokens=float(spec.max_num_seqs * spec.max_model_len),
        block_size=1,
        enable_prefix_caching=False,
    )
    facts.engine = {
        "engine": "servecast PyTorch engine",
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "threads": spec.threads,
        "parameters": params,
    }
    facts.engine |= {f"pair_{name}": value for name, value in pair.facts().items()}
    bench = StepBench(target, draft, slots=spec.max_num_seqs, length=spec.max_model_len)
    with threads(spec.threads):
        facts.size = _size(params, device)
        if scenario.steps is not None:
            _steps(scenario, scenario.steps, facts, bench, say)
        if scenario.loads is not None and facts.fit is not None:
            _loads(scenario, scenario.loads, facts, bench, (target, pair), say)
    if scenario.speculation is not None:
        with threads():
            _acceptance(scenario.speculation, scenario, facts, (target, draft, pair), say)


# ---- single steps ----------------------------------------------------------------------------------------


def _steps(scenario: Scenario, steps: Steps, facts: LiveFacts, bench: StepBench, say: Report) -> None:
    calibrated = calibration_points(steps, scenario.speculation, scenario.engine.max_model_len)
    plain = [StepPoint(batch, context) for batch, context in steps.validated.cells()]
    drafted = speculative_points(scenario.speculation)
    points = list(dict.fromkeys([*calibrated, *plain, *drafted]))
    samples: list[StepSample] = []
    total = steps.rounds * len(points)
    for sample in measure(bench, points, blocks=steps.rounds, seed=scenario.seed, repeats=steps.repeats):
        samples.append(sample)
        say("steps", len(samples), total)
    every = as_samples(samples, points)
    paces = near_pace(every.seconds, every.points())
    facts.fit = fit_steps(as_samples(samples, calibrated, paces))
    facts.validated = as_samples(samples, plain, paces)
    if scenario.speculation is not None:
        facts.drafted = facts.compared = as_samples(samples, drafted, paces)
        facts.context = float(scenario.speculation.context)


def calibration_points(steps: Steps, speculation: Speculation | None, longest: int) -> list[StepPoint]:
    """Points that the fit sees: decode steps, prompts alone and beside decodes, and drafting at another context than
    the one where lengths are compared."""
    points = [StepPoint(batch, context) for batch, context in steps.calibrated.cells()]
    points += [StepPoint(0, 0, chunks=((0, end),)) for end in CHUNKS if end < longest]
    most, context = max(steps.calibrated.batches), min(steps.calibrated.contexts)
    points += [StepPoint(max(most // part, 1), context, chunks=chunks) for part, chunks in MIXED]
    if speculation is not None:
        longest_draft = max(speculation.lengths)
        for number, batch in enumerate(speculation.batches):
            # every length at some batch and every batch at two lengths: half of the grid
            lengths = [0, longest_draft] if number % 2 else [1 + number // 2 % longest_draft, longest_draft]
            points += [StepPoint(batch, context, gamma, armed=True) for gamma in dict.fromkeys([*lengths, 3])]
    return points


def speculative_points(speculation: Speculation | None) -> list[StepPoint]:
    """Every (batch, draft length) that is compared; none of them at a calibrated context."""
    if speculation is None:
        return []
    return [
        StepPoint(batch, speculation.context, gamma, armed=True)
        for batch in speculation.batches
        for gamma in speculation.lengths
    ]


def as_samples(samples: Sequence[StepSample], points: Sequence[StepPoint], paces: Floats | None = None) -> StepSamples:
    """The samples of `points`, as the fit takes them; `paces` are the machine's, sample by sample."""
    wanted = set(points)
    chosen = np.array([one.point in wanted for one in samples], dtype=bool)
    kept = [one for one, here in zip(samples, chosen, strict=True) if here]
    work = [_work(one.point) for one in kept]
    columns = {name: np.array([float(getattr(one, name)) for one in work]) for name in StepWork.__dataclass_fields__}
    return StepSamples(
        **columns,
        block=np.array([one.block for one in kept], dtype=np.int64),
        seconds=np.array([one.seconds for one in kept]),
        pace=np.ones(len(kept)) if paces is None else paces[chosen],
    )


def _work(point: StepPoint) -> StepWork:
    work = decode_work(point.batch, point.context, point.gamma, armed=point.armed)
    for start, end in point.chunks:
        work = with_chunk(work, start, end)
    return work


def _size(params: float, device: str) -> EngineSize:
    """Bandwidth and arithmetic of this device by two plain measurements, for the naive roofline. [B/s], [1/s]"""
    import torch

    def best(action: Callable[[], object], repeats: int) -> float:
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        return min(times)

    source = torch.ones(32 * 2**20, device=device)
    square = torch.ones(1024, 1024, device=device)
    read = best(lambda: source.sum().item(), 5)
    product = best(lambda: square @ square, 5)
    return EngineSize(
        weight_bytes=4.0 * params, params=params, bandwidth=source.numel() * 4.0 / read, flops=2.0 * 1024.0**3 / product
    )


# ---- loads -----------------------------------------------------------------------------------------------


def _loads(
    scenario: Scenario,
    loads: Loads,
    facts: LiveFacts,
    bench: StepBench,
    served: tuple[Llama, TrainedPair],
    say: Report,
) -> None:
    if facts.fit is None or facts.limits is None or scenario.steps is None:
        return
    steps, limits = facts.fit.steps, facts.limits
    runs = [(case, seed) for case in loads.cases for seed in loads.seeds]
    random.Random(scenario.seed).shuffle(runs)  # noqa: S311 (an order, not a secret)
    calibrated = calibration_points(scenario.steps, scenario.speculation, scenario.engine.max_model_len)
    probed = probed_points(calibrated, facts.fit.medians)
    target, pair = served
    tokens = pair.tokens("validation")
    for number, (case, seed) in enumerate(runs):
        trace = load_trace(loads, case, seed, capacity=_capacity(loads, steps, limits))
        engine = TorchEngine(
            target,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=scenario.engine.max_model_len,
        )
        probe = PaceProbe(bench, probed, scenario.seed + number)
        clocks = Clock().read()
        run = serve(engine, requests_of(trace, tokens), between=probe, every=PROBE_EVERY)
        warning = clock_warning(clocks, Clock().read())
        facts.loads.append(
            LoadRun(
                case=case.name,
                seed=seed,
                utilisation=case.utilisation,
                busy_share=run.busy_share,
                trace=trace,
                rows=run.rows,
                probes=tuple(probe.made),
            )
        )
        if warning:
            raise RuntimeError(f"load {case.name}: {warning}")
        say("loads", number + 1, len(runs))


class PaceProbe:
    """The machine's pace while a load runs: one step of the calibration a call, over its time then, in fresh rounds.

    A pace probed before and after a load does not show what happened within. What the fit makes of its points does not
    enter.
    """

    def __init__(self, bench: StepBench, calibrated: dict[StepPoint, float], seed: int) -> None:
        self._bench, self._calibrated = bench, calibrated
        self._draw = random.Random(seed)  # noqa: S311 (an order, not a secret)
        self._round: list[StepPoint] = []
        self.made: list[Probe] = []

    def __call__(self, at_s: float) -> None:
        """Time one step, at this time of the load."""
        if not self._round:
            self._round = self._draw.sample(list(self._calibrated), len(self._calibrated))
        point = self._round.pop()
        # sequences of a load differ in context, and a batch is padded to the longest
        ratio = self._bench.seconds(replace(point, spread=point.context // 2)) / self._calibrated[point]
        self.made.append(Probe(at_s, ratio, prompts=bool(point.chunks)))


def probed_points(points: Sequence[StepPoint], medians: PointMedians) -> dict[StepPoint, float]:
    """Calibrated points to probe the pace by, and their seconds: those of the kind that the loads consist of."""
    shortest = min(one.context for one in points if one.batch and not one.chunks and not one.armed)
    found = {}
    for point in points:
        decodes = point.context == shortest and point.batch <= PROBE_BATCH and not point.chunks
        if point.armed or not point.batch or not (decodes or point.chunks):
            continue
        work = _work(point)
        same = [
            np.asarray(getattr(medians.work, name)) == getattr(work, name) for name in StepWork.__dataclass_fields__
        ]
        found[point] = float(medians.seconds[np.flatnonzero(np.logical_and.reduce(same))[0]])
    return found


def _capacity(loads: Loads, steps: EngineSteps, limits: EngineLimits) -> float:
    n_in, n_out = (np.linspace(*span, 33) for span in (loads.prompt_tokens, loads.output_tokens))
    return capacity_rps(steps, limits, n_in, n_out)


def requests_of(trace: Trace, tokens: Sequence[int]) -> list[Request]:
    """Prompts cut from a text, one after another and round again."""
    requests, at = [], 0
    for number, (arrival, n_in, n_out) in enumerate(zip(trace.t_s, trace.n_in, trace.n_out, strict=True)):
        size = int(n_in)
        if at + size > len(tokens):
            at = 0
        requests.append(Request(number, list(tokens[at : at + size]), int(n_out), float(arrival)))
        at += size
    return requests


# ---- acceptance ------------------------------------------------------------------------------------------


def _acceptance(
    speculation: Speculation,
    scenario: Scenario,
    facts: LiveFacts,
    served: tuple[Llama, Llama, TrainedPair],
    say: Report,
) -> None:
    """Two lengths on calibration texts; every length on validation texts."""
    longest = max(speculation.lengths)
    plan = [("calibration", longest), ("calibration", max(longest // 2, 1))]
    plan += [("validation", length) for length in speculation.lengths if length]
    for number, (part, length) in enumerate(plan):
        count = count_acceptance(speculation, scenario, served, part, length)
        (facts.acceptance_calibrated if part == "calibration" else facts.acceptance_validated).append(count)
        say("acceptance", number + 1, len(plan))


def count_acceptance(
    speculation: Speculation, scenario: Scenario, served: tuple[Llama, Llama, TrainedPair], part: str, length: int
) -> AcceptanceCount:
    """Rounds of one draft length over prompts spread evenly through the texts of one part."""
    target, draft, pair = served
    spec, size = scenario.engine, speculation.prompt_tokens
    tokens = pair.tokens(part)
    stride = max((len(tokens) - size) // speculation.prompts, 1)
    requests = [
        Request(number, tokens[number * stride : number * stride + size], speculation.output_tokens)
        for number in range(speculation.prompts)
    ]
    engine = TorchEngine(
        target,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=max(spec.max_num_batched_tokens, spec.max_num_seqs * (length + 1)),
        max_model_len=spec.max_model_len,
        drafter=DraftModel(draft, spec.max_num_seqs, spec.max_model_len),
        draft_length=lambda _: length,
    )
    survived, rounds = np.zeros(length, dtype=np.int64), 0
    for step in closed_batch(engine, requests):
        if step.record.gamma:
            rounds += step.record.sequences
            survived += np.array(step.record.survived, dtype=np.int64)
    return AcceptanceCount(draft_length=length, rounds=rounds, survived=tuple(int(one) for one in survived))

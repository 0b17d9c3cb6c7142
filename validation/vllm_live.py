"""A scenario on vLLM: KV blocks, paired steps and acceptance inside one process, the emitted table, loads over HTTP.

The trained pair is the PyTorch engine's, in Hugging Face's format. Steps inside the process calibrate the choice of
draft lengths; a server has a front end and a scheduler in another process, so that its steps are calibrated again by
closed batches and prompts over HTTP, in rounds before, between and after the loads that they are to foretell.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servecast.calibration.fits.engine_steps import StepSamples, StepsFit, fit_steps
from servecast.model.engine_steps import StepWork, decode_work, with_chunk
from servecast.policies.speculation import SpeculationTable
from servecast.policies.vllm_speculation import SCHEDULE, read_vllm_schedule, speculative_config
from servecast.readers.huggingface import read_config
from servecast.validation.draft_choice import AcceptanceCount, acceptance_curve, chosen_lengths
from servecast.validation.executors import capacity_rps
from servecast.validation.http_load import LiveRun, LoadRequest, load_requests, run_open_loop
from servecast.validation.live_facts import LiveFacts, LoadRun
from servecast.validation.live_loads import load_trace, served_load
from servecast.validation.metrics import latencies
from servecast.validation.pace import Probe
from servecast.validation.scenario import Loads, Scenario, Speculation
from servecast.validation.scheduler import EngineLimits
from servecast.validation.torch_engine.trained_pair import RECIPES, TrainedPair, trained_pair
from servecast.validation.vllm_server import VllmServer, run_paired

Report = Callable[[str, int, int], None]
Floats = NDArray[np.float64]
Records = list[dict[str, Any]]

CYCLES = 6
"""Times every draft length is visited in one batch's block."""
BLOCK_SIZE = 128
"""vLLM's default on a CPU. [tokens]"""
PROBE_PROMPTS = (16, 48, 96, 144, 192)
"""Lengths of single prompts whose first token is timed. [tokens]"""
PROBE_INPUT, PROBE_OUTPUT = 8, 24
"""A closed batch: prompts that fit into one step, and tokens to time."""
PROBE_ROUNDS = 3
"""Before the first load; another follows every load."""
PROBE_TRIES = 3
VERSION = "0.32.0"
"""Whose table format is written where the engine does not say its own."""


def run_vllm(scenario: Scenario, *, python: str, progress: Report | None = None) -> LiveFacts:
    """Everything that the scenario asks; what was measured until a fault is returned with the fault."""
    facts = LiveFacts()
    say = progress or (lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="servecast-validate-") as folder:
        try:
            _run(scenario, facts, python, Path(folder), say)
        except KeyboardInterrupt:
            facts.stopped = "interrupted"
        except (RuntimeError, ValueError, OSError) as error:
            facts.stopped = " ".join(str(error).split())[:500]
    return facts


def _run(scenario: Scenario, facts: LiveFacts, python: str, folder: Path, say: Report) -> None:
    spec = scenario.engine
    pair = trained_pair(RECIPES[spec.pair], progress=lambda done, total: say("training", done, total))
    facts.limits = EngineLimits(
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        kv_tokens=spec.kv_cache_gib * 2.0**30 / read_config(pair.target / "config.json").kv_bytes_per_token("bf16"),
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
    )
    facts.engine = {"engine": "vLLM", "threads": spec.threads, "pair": spec.pair}
    inside = InProcess(scenario, python, pair, folder)
    if scenario.speculation is not None:
        say("in-process engine", 0, 3)
        _paired(scenario, scenario.speculation, facts, inside)
        say("in-process engine", 1, 3)
        _follow(scenario.speculation, facts, inside)
        say("in-process engine", 2, 3)
    if scenario.budgets.kv_blocks is not None:
        _kv(scenario, facts, inside, pair)
    say("in-process engine", 3, 3)
    if scenario.loads is not None:
        _served(scenario, scenario.loads, facts, python, pair, say)


class InProcess:
    """Runs of the script that has vLLM's scheduler in reach."""

    def __init__(self, scenario: Scenario, python: str, pair: TrainedPair, folder: Path) -> None:
        self._scenario, self._python, self.pair, self._folder = scenario, python, pair, folder
        self._runs = 0

    def run(self, mode: str, options: dict[str, object], *, draft: bool) -> Records:
        """Records of one run."""
        spec = self._scenario.engine
        words = [mode, "--model", str(self.pair.target), "--max-num-seqs", str(spec.max_num_seqs)]
        words += ["--kv-space-gib", str(spec.kv_cache_gib), "--seed", str(self._scenario.seed)]
        if draft:
            words += ["--draft", str(self.pair.draft)]
        words += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        self._runs += 1
        return run_paired(self._python, words, self._folder / f"{self._runs}.jsonl", threads=spec.threads)

    def prompts(self, speculation: Speculation) -> Path:
        """Prompts from the two held-out parts by turns, spread evenly through each."""
        size = speculation.prompt_tokens
        parts = []
        for name in ("calibration", "validation"):
            tokens = self.pair.tokens(name)
            stride = max((len(tokens) - size) // (2 * speculation.prompts), 1)
            parts.append([tokens[at : at + size] for at in range(0, len(tokens) - size, stride)])
        path = self._folder / "prompts.json"
        path.write_text(json.dumps([prompt for both in zip(*parts, strict=False) for prompt in both]))
        return path


# ---- steps and acceptance --------------------------------------------------------------------------------


def _paired(scenario: Scenario, speculation: Speculation, facts: LiveFacts, inside: InProcess) -> None:
    options: dict[str, object] = {
        "batches": ",".join(map(str, speculation.batches)),
        "lengths": ",".join(map(str, speculation.lengths)),
        "repeats": speculation.rounds,
        "cycles": CYCLES,
        "prompts": inside.prompts(speculation),
        "prompt-tokens": speculation.prompt_tokens,
        "max-model-len": 2048,
    }
    engine, *records = inside.run("paired", options, draft=True)
    steps = [one for one in records if one["kind"] == "step"]
    facts.engine |= {"version": str(engine["version"])}
    facts.kv_blocks.append(_blocks("target and draft", scenario, inside.pair, engine, draft=True))
    even = [one for one in steps if _is_calibrated(one, speculation)]
    facts.fit = fit_steps(_samples(even))
    facts.drafted = _samples([one for one in steps if not _is_calibrated(one, speculation)])
    facts.compared = _samples(steps)
    facts.context = float(np.mean([one["context_tokens"] / one["batch"] for one in steps]))
    lengths = [length for length in speculation.lengths if length]
    some = dict.fromkeys((max(lengths), max(max(lengths) // 2, 1)))
    facts.acceptance_calibrated = [_count(steps, length, even=True) for length in some]
    facts.acceptance_validated = [_count(steps, length, even=False) for length in lengths]


def _is_calibrated(record: dict[str, Any], speculation: Speculation) -> bool:
    """A checkerboard over batch and length, so that every batch and every length is on both sides."""
    row = speculation.batches.index(record["batch"])
    return bool((row + record["draft_length"]) % 2 == 0)


def _samples(records: Sequence[dict[str, Any]]) -> StepSamples:
    """One sample a cell and repeat: the median of its steps, at the cell's mean context.

    What a cell's medians differ by from repeat to repeat, after the block's pace, is its paired scatter.
    """
    cells: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for one in records:
        cells.setdefault((one["batch"], one["draft_length"]), []).append(one)
    work, block, seconds = [], [], []
    for (batch, length), mine in cells.items():
        context = float(np.mean([one["context_tokens"] for one in mine])) / batch
        for repeat in sorted({one["repeat"] for one in mine}):
            work.append(decode_work(batch, context, length, armed=True))
            block.append(repeat * 10_000 + batch)
            seconds.append(float(np.median([one["seconds"] for one in mine if one["repeat"] == repeat])))
    return _as_samples(work, block, seconds)


def _as_samples(work: Sequence[StepWork], block: Sequence[int], seconds: Sequence[float]) -> StepSamples:
    columns = {name: np.array([float(getattr(one, name)) for one in work]) for name in StepWork.__dataclass_fields__}
    return StepSamples(**columns, block=np.array(block, dtype=np.int64), seconds=np.array(seconds))


def _count(steps: Sequence[dict[str, Any]], length: int, *, even: bool) -> AcceptanceCount:
    """Rounds of one length: texts of even repeats calibrate, those of odd ones judge."""
    mine = [one for one in steps if one["draft_length"] == length and (one["repeat"] % 2 == 0) == even]
    survived = np.sum([one["accepted_per_position"] for one in mine], axis=0)
    return AcceptanceCount(
        draft_length=length,
        rounds=int(sum(one["drafts"] for one in mine)),
        survived=tuple(int(one) for one in np.atleast_1d(survived)),
    )


def _follow(speculation: Speculation, facts: LiveFacts, inside: InProcess) -> None:
    """The solver's table in the engine's own words; the engine's counters at batch sizes of every segment."""
    if facts.fit is None:
        return
    longest = max(speculation.lengths)
    curve = acceptance_curve(facts.acceptance_calibrated, longest)
    most = max(speculation.batches)
    every = list(range(1, most + 1))
    schedule = chosen_lengths(facts.fit.steps, curve, every, facts.context, max_length=longest)
    table = emitted_table(schedule.lengths.tolist(), version=str(facts.engine["version"]))
    config = speculative_config(table, force=True)
    ranges = config.get(SCHEDULE) or [[1, most, config.get("num_speculative_tokens", 0)]]
    expected = read_vllm_schedule({"num_speculative_tokens": longest, SCHEDULE: ranges}, most)
    batches = sorted({*speculation.batches, *(lo for lo, _, _ in ranges), *(hi for _, hi, _ in ranges)})
    facts.notes.append(f"table written for vLLM {table.engine_version}: {json.dumps(ranges)}")
    records = inside.run(
        "table",
        {
            "table": json.dumps(ranges),
            "batches": ",".join(map(str, batches)),
            "prompts": inside.prompts(speculation),
            "prompt-tokens": speculation.prompt_tokens,
            "max-model-len": 1024,
        },
        draft=True,
    )
    facts.table = {batch: expected[batch - 1] for batch in batches}
    facts.table_seen = {one["batch"]: float(one["draft_length"]) for one in records if one["kind"] == "table"}


def emitted_table(lengths: Sequence[int], *, version: str = VERSION) -> SpeculationTable:
    """The policy document of a schedule for batch sizes 1, 2, ...; forecasts are the scenario's own, not the file's."""
    edges = [0, *(i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]), len(lengths)]
    segments = [{"lo": low + 1, "hi": high, "draft_length": int(lengths[low])} for low, high in pairwise(edges)]
    unknown = {"value": 1.0, "lo": 1.0, "hi": 1.0}
    return SpeculationTable.model_validate(
        {
            "engine": "vllm",
            "engine_version": version,
            "model": "target",
            "method": "draft_model",
            "draft_model": "draft",
            "max_batch": len(lengths),
            "segments": segments,
            "num_speculative_tokens": max(1, *lengths),
            "predicted": [{"goodput_tokens_per_s": unknown, "tpot_s": unknown}] * len(segments),
            "provenance": {"servecast": "live", "profile": "live", "acceptance": "live", "date": "live"},
        }
    )


# ---- KV blocks -------------------------------------------------------------------------------------------


def _kv(scenario: Scenario, facts: LiveFacts, inside: InProcess, pair: TrainedPair) -> None:
    for setting, engine_arguments in (("target alone", {}), ("block size 32", {"block_size": 32})):
        engine, *_ = inside.run("kv", {"max-model-len": 512, "engine": json.dumps(engine_arguments)}, draft=False)
        facts.engine.setdefault("version", str(engine["version"]))
        facts.kv_blocks.append(_blocks(setting, scenario, pair, engine, draft=False))


def _blocks(
    setting: str, scenario: Scenario, pair: TrainedPair, engine: dict[str, Any], *, draft: bool
) -> tuple[str, float, float]:
    """Blocks that the cache's space holds: whole blocks of the bytes of all models' layers."""
    models = [pair.target, pair.draft] if draft else [pair.target]
    per_token = sum(read_config(folder / "config.json").kv_bytes_per_token("bf16") for folder in models)
    size = int(engine["block_size"])
    predicted = scenario.engine.kv_cache_gib * 2**30 // int(per_token * size)
    return setting, float(predicted), float(engine["num_gpu_blocks"])


# ---- loads over HTTP -------------------------------------------------------------------------------------


def _served(scenario: Scenario, loads: Loads, facts: LiveFacts, python: str, pair: TrainedPair, say: Report) -> None:
    spec = scenario.engine
    if facts.limits is None:
        return
    flags: dict[str, object] = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": spec.max_num_batched_tokens,
        "max_model_len": spec.max_model_len,
        "enable_prefix_caching": False,
    }
    with VllmServer(python, pair.target, flags=flags, threads=spec.threads, kv_space_gib=spec.kv_cache_gib) as server:
        facts.engine.setdefault("version", server.facts().version or VERSION)
        probe = ServerProbe(server.url, server.model, facts.limits, scenario.seed)
        probe.round(-1)  # lazy set-up is nobody's step time
        begun = time.perf_counter()
        samples = [one for number in range(PROBE_ROUNDS) for one in probe.round(number)]
        facts.serving_fit = server_fit(samples)
        n_in, n_out = (np.linspace(*span, 33) for span in (loads.prompt_tokens, loads.output_tokens))
        capacity = capacity_rps(facts.serving_fit.steps, facts.limits, n_in, n_out)
        runs = [(case, seed) for case in loads.cases for seed in loads.seeds]
        random.Random(scenario.seed).shuffle(runs)  # noqa: S311 (an order, not a secret)
        rounds = [time.perf_counter() - begun]
        starts: list[float] = []
        try:
            for number, (case, seed) in enumerate(runs):
                trace = load_trace(loads, case, seed, capacity=capacity)
                starts.append(time.perf_counter() - begun)
                run = run_open_loop(server.url, load_requests(trace, vocabulary=1024, seed=seed), model=server.model)
                facts.loads.append(served_load(run, case=case, seed=seed))
                if fault := run.aborted or run.clock_warning:
                    raise RuntimeError(f"load {case.name}: {fault}")
                samples += probe.round(PROBE_ROUNDS + number)
                rounds.append(time.perf_counter() - begun)
                say("loads", number + 1, len(runs))
        finally:
            facts.serving_fit = server_fit(samples)
            facts.loads = with_rounds(facts.loads, starts, rounds, facts.serving_fit)


def with_rounds(
    loads: Sequence[LoadRun], starts: Sequence[float], rounds: Sequence[float], fit: StepsFit
) -> list[LoadRun]:
    """Loads with the pace of the rounds that calibrate between them: `rounds` ended before the first and after each.

    Two rounds say little of the half minute between them: every load has all of them, and how far each counts is for
    `servecast.validation.pace`. A load that no round came after, since its server was gone, has a pace that nobody
    knows.
    """
    factors = fit.medians.block_factor[-len(rounds) :]
    found = []
    for number, (run, start) in enumerate(zip(loads, starts, strict=False)):  # one may have begun that is no load yet
        probes = [Probe(at - start, float(factor)) for at, factor in zip(rounds, factors, strict=True)]
        if number + 1 >= len(rounds):
            probes.append(Probe(float(np.nanmax(run.rows.last_token_s, initial=0.0)), float("nan")))
        found.append(replace(run, probes=tuple(probes)))
    return found


ServerSample = tuple[StepWork, int, float]
"""What was computed, round, seconds."""


class ServerProbe:
    """Closed batches and single prompts over HTTP: the server's steps as a client sees them."""

    def __init__(self, url: str, model: str, limits: EngineLimits, seed: int) -> None:
        self._url, self._model = url, model
        self._draw = random.Random(seed)  # noqa: S311 (token ids and an order)
        most = min(limits.max_num_seqs, limits.max_num_batched_tokens // PROBE_INPUT)
        self._batches = [one for one in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if one <= most]
        self._prompts = [one for one in PROBE_PROMPTS if one <= limits.max_num_batched_tokens]

    def round(self, number: int) -> list[ServerSample]:
        """Every batch and every prompt once, in fresh order."""
        actions: list[Callable[[], ServerSample]] = []
        for batch in self._batches:
            actions.append(lambda size=batch: self.decode(size, number))  # type: ignore[misc]
        for prompt in self._prompts:
            actions.append(lambda size=prompt: self.prompt(size, number))  # type: ignore[misc]
        self._draw.shuffle(actions)
        return [_timed(action) for action in actions]

    def decode(self, batch: int, number: int) -> ServerSample:
        """One decode step of `batch` sequences: mean time per token of requests that run together."""
        run = self._send(batch, PROBE_INPUT, PROBE_OUTPUT)
        seconds = float(np.median(latencies(run.rows, "tpot")))
        return decode_work(batch, PROBE_INPUT + PROBE_OUTPUT / 2.0), number, seconds

    def prompt(self, tokens: int, number: int) -> ServerSample:
        """A prompt alone, from sending it to its first token."""
        run = self._send(1, tokens, 2)
        work = with_chunk(StepWork(rows=0.0), 0.0, float(tokens))
        return work, number, float(latencies(run.rows, "ttft")[0])

    def _send(self, count: int, n_in: int, n_out: int) -> LiveRun:
        requests = [
            LoadRequest(arrival_s=0.0, prompt=[self._draw.randrange(2, 1024) for _ in range(n_in)], n_out=n_out)
            for _ in range(count)
        ]
        run = run_open_loop(self._url, requests, model=self._model, timeout_s=120.0)
        if run.errors or run.aborted:
            raise RuntimeError(f"probe of the server failed: {'; '.join([*run.errors, run.aborted or ''])}")
        return run


def _timed(action: Callable[[], ServerSample]) -> ServerSample:
    """One probe, again where its tokens came without a time between them: a client that slept sees them at once."""
    for _ in range(PROBE_TRIES):
        found = action()
        if np.isfinite(found[2]) and found[2] > 0.0:
            return found
    raise RuntimeError(f"probe of the server must have a time > 0, got {found[2]} in {PROBE_TRIES} tries")


def server_fit(samples: Sequence[ServerSample]) -> StepsFit:
    """Steps behind a server. What a chunk costs by itself is, seen from a client, what a request pays outside steps."""
    work, block, seconds = zip(*samples, strict=True)
    fit = fit_steps(_as_samples(work, block, seconds))
    outside = fit.steps.chunk_s
    return replace(fit, steps=replace(fit.steps, chunk_s=0.0, first_token_s=outside))

"""Experiments inside one process of vLLM, with its scheduler in reach: paired step times, table check, KV blocks.

A script of its own, for the Python that has vLLM; it imports nothing of servecast. One JSON object a line goes to
``--out``: first the engine's facts, then what the mode measures.

``paired``: one running batch, the draft length K switched every 4 steps in shuffled cycles by overwriting the
scheduler's table, so that a slow minute of the machine falls on every K alike. K decided in step t is verified in
t + 1: the first step after a switch mixes two lengths, the second finds cold caches, and both are dropped.
``table``: the engine follows the table it was started with; its own counters say what it drafted by batch size.
``kv``: the engine starts, and says how many KV blocks it has.

Temperature is 0 throughout: vLLM 0.32.0 on a CPU expands the temperatures of a speculative batch into memory it never
fills, so that sampled acceptance is noise. The engine must run in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

STEPS_PER_LENGTH = 4
DROPPED_STEPS = 2
SCHEDULE = "num_speculative_tokens_per_batch_size"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one mode; the exit status is 2 where the request cannot be run."""
    options = parse(arguments)
    try:
        check(options)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options.kv_space_gib)
    # started by its path, a script finds its neighbours first: scheduler.py and metrics.py beside it are not vLLM's
    sys.path[:] = [one for one in sys.path if Path(one or ".").resolve() != Path(__file__).resolve().parent]
    with Path(options.out).open("w", encoding="utf-8") as out:
        began = time.perf_counter()
        llm = start_engine(options)
        write(out, {**engine_facts(llm), "start_s": time.perf_counter() - began, "torch_threads": torch_threads()})
        run = {"paired": paired, "table": follow_table, "kv": nothing}[options.mode]
        for record in run(llm, options):
            write(out, record)
        write(out, {"kind": "end", "seconds": time.perf_counter() - began})
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("mode", choices=("paired", "table", "kv"))
    parser.add_argument("--model", required=True, help="folder of the target model")
    parser.add_argument("--draft", help="folder of the draft model")
    parser.add_argument("--out", required=True, help="JSON lines")
    parser.add_argument("--prompts", help="JSON list of lists of token ids; random ids without it")
    parser.add_argument("--batches", type=whole_numbers, default=[1, 2, 4, 8, 16], help="1,2,4")
    parser.add_argument("--lengths", type=whole_numbers, default=[0, 1, 2, 3, 4, 5], help="draft lengths, 0,1,2")
    parser.add_argument("--table", type=json.loads, help="[[lo, hi, K], ...]")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cycles", type=int, default=5, help="times each length is visited in a block")
    parser.add_argument("--steps", type=int, default=12, help="counted steps of one batch size in mode table")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=1024, help="random ids stay below it")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--kv-space-gib", type=int, default=1)
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON object of further engine arguments")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def whole_numbers(text: str) -> list[int]:
    """``1,2,4`` as numbers."""
    return [int(one) for one in text.split(",")]


def check(options: argparse.Namespace) -> None:
    """Refuse before the engine starts, which takes long."""
    if options.mode == "kv":
        return
    if options.draft is None and (options.mode == "table" or any(options.lengths)):
        raise ValueError("--draft must be given, but for --lengths 0, which then times an engine without speculation")
    if min(options.batches) < 1 or max(options.batches) > options.max_num_seqs:
        raise ValueError(f"--batches must be from 1 to --max-num-seqs {options.max_num_seqs}, got {options.batches}")
    if options.mode == "table":
        if not options.table:
            raise ValueError("--table must be given in mode table")
        tokens = (options.steps + DROPPED_STEPS + 2) * (1 + longest(options))
    else:
        if min(options.lengths) < 0:
            raise ValueError(f"--lengths must be >= 0, got {options.lengths}")
        # every draft accepted: no sequence may end while its block is timed
        tokens = options.cycles * STEPS_PER_LENGTH * sum(1 + k for k in options.lengths) + 2 + max(options.lengths)
    # prefill of a wide batch takes several steps, in which the first sequences already decode
    tokens += max(options.batches) * (1 + longest(options))
    if options.prompt_tokens + tokens > options.max_model_len:
        need = options.prompt_tokens + tokens
        raise ValueError(f"--max-model-len must be >= {need} for these steps, got {options.max_model_len}")


def longest(options: argparse.Namespace) -> int:
    """Largest draft length that the run can ask for."""
    lengths = [int(k) for _, _, k in options.table] if options.table else options.lengths
    return max(1, *lengths, 0)


def start_engine(options: argparse.Namespace) -> Any:
    """vLLM's offline entry point, eager, so that no compilation is part of a step time."""
    from vllm import LLM

    speculative = None
    if options.draft is not None:
        k = longest(options)
        # any table at all makes the scheduler look lengths up, and `paired` overwrites what it finds
        table = options.table or [[1, options.max_num_seqs, k]]
        speculative = {"method": "draft_model", "model": options.draft, "num_speculative_tokens": k, SCHEDULE: table}
    settings = {
        "model": options.model,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "seed": options.seed,
        "speculative_config": speculative,
    }
    return LLM(**{**settings, **options.engine})


def engine_facts(llm: Any) -> dict[str, Any]:
    """Version and KV cache as the engine itself reports them."""
    import vllm

    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "kind": "engine",
        "version": vllm.__version__,
        "num_gpu_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "lookup": scheduler_of(llm).dynamic_sd_lookup,
    }


def torch_threads() -> int:
    """Threads that a step may use."""
    import torch

    return int(torch.get_num_threads())


def scheduler_of(llm: Any) -> Any:
    """The scheduler as a Python object; only an engine inside this process has one."""
    try:
        return llm.llm_engine.engine_core.engine_core.scheduler
    except AttributeError:
        raise SystemExit("error: this vLLM has no scheduler inside the process; its layout is not 0.32.0's") from None


def paired(llm: Any, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Step records of every (repeat, batch) block; the order of batches is shuffled in each repeat."""
    draw = random.Random(options.seed)  # noqa: S311  # an experiment's order, not a secret
    prompts = read_prompts(options, draw)
    for repeat in range(options.repeats):
        batches = list(options.batches)
        draw.shuffle(batches)
        for batch in batches:
            sys.stderr.write(f"repeat {repeat}, batch {batch}\n")
            # even repeats see every second prompt, odd ones the others: their texts are apart
            mine = prompts[repeat % 2 :: 2] or prompts
            records = paired_block(llm, options, draw.choices(mine, k=batch), draw)
            yield from ({"kind": "step", "batch": batch, "repeat": repeat, **one} for one in records)


def paired_block(
    llm: Any, options: argparse.Namespace, prompts: list[list[int]], draw: random.Random
) -> list[dict[str, Any]]:
    """One batch: its sequences are prefilled, run through all cycles and are then dropped."""
    scheduler = scheduler_of(llm)
    started = prefill(llm, prompts, options.max_model_len)
    watch = StepWatch(scheduler)
    records = []
    gc.collect()
    gc.disable()  # a collection in the middle of a step would be taken for its cost
    try:
        for cycle in range(options.cycles):
            for k in draw.sample(options.lengths, len(options.lengths)):
                if options.draft is not None:
                    scheduler.dynamic_sd_lookup = [k] * (options.max_num_seqs + 1)
                for step in range(STEPS_PER_LENGTH):
                    record = watch.timed_step(llm)
                    if step >= DROPPED_STEPS:
                        records.append({"cycle": cycle, "draft_length": k, **record})
    finally:
        gc.enable()
        watch.remove()
        finish(llm, started)
    return records


class StepWatch:
    """Time of each engine step, and what the scheduler learned from it."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.original = scheduler.update_from_output
        self.seen: list[tuple[Any, Any]] = []
        scheduler.update_from_output = self.update

    def update(self, scheduled: Any, output: Any) -> Any:
        """Keeps the step's two records for after the clock has stopped."""
        self.seen.append((scheduled, output))
        return self.original(scheduled, output)

    def remove(self) -> None:
        """The scheduler as it was."""
        self.scheduler.update_from_output = self.original

    def timed_step(self, llm: Any) -> dict[str, Any]:
        """One engine step; tokens are counted outside its time."""
        context = sum(one.num_computed_tokens for one in self.scheduler.running)
        self.seen.clear()
        began = time.perf_counter()
        llm.llm_engine.step()
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "context_tokens": context, **self.counts()}

    def counts(self) -> dict[str, Any]:
        """Sequences with drafts, tokens drafted, accepted and emitted by the last step."""
        if len(self.seen) != 1:
            raise SystemExit(f"error: an engine step must be one scheduler step, got {len(self.seen)}")
        scheduled, output = self.seen[0]
        emitted = {one: len(output.sampled_token_ids[at]) for one, at in output.req_id_to_index.items()}
        drafted = {one: len(tokens) for one, tokens in scheduled.scheduled_spec_decode_tokens.items() if tokens}
        accepted = [emitted[one] - 1 for one in drafted]
        return {
            "sequences": len(scheduled.num_scheduled_tokens),
            "scheduled_tokens": scheduled.total_num_scheduled_tokens,
            "emitted": sum(emitted.values()),
            "drafts": len(drafted),
            "drafted": sum(drafted.values()),
            "accepted": sum(accepted),
            "accepted_per_position": [sum(a > j for a in accepted) for j in range(max(drafted.values(), default=0))],
        }


def follow_table(llm: Any, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the engine's counters say it drafted at each batch size."""
    prompts = read_prompts(options, random.Random(options.seed))  # noqa: S311  # token ids, not a secret
    for batch in options.batches:
        started = prefill(llm, [prompts[one % len(prompts)] for one in range(batch)], options.max_model_len)
        for _ in range(DROPPED_STEPS):
            llm.llm_engine.step()
        before = counters(llm)
        for _ in range(options.steps):
            llm.llm_engine.step()
        after = counters(llm)
        finish(llm, started)
        drafts, tokens = (after[name] - before[name] for name in ("drafts", "draft_tokens"))
        yield {
            "kind": "table",
            "batch": batch,
            "steps": options.steps,
            "drafts": drafts,
            "draft_tokens": tokens,
            "draft_length": tokens / drafts if drafts else 0.0,
            "lookup": scheduler_of(llm).dynamic_sd_lookup[batch],
        }


def counters(llm: Any) -> dict[str, float]:
    """The engine's totals of speculation."""
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        name = metric.name.removeprefix("vllm:spec_decode_num_")
        if name in ("drafts", "draft_tokens"):
            found[name] = found.get(name, 0.0) + metric.value
    if len(found) < 2:
        raise SystemExit("error: this vLLM counts no drafts under the names of 0.32.0: a table cannot be checked")
    return found


def nothing(_llm: Any, _options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The engine's facts are the whole answer."""
    yield from ()


def read_prompts(options: argparse.Namespace, draw: random.Random) -> list[list[int]]:
    """Token ids of the prompts, each cut to the asked length."""
    if options.prompts is None:
        count = max(options.batches)
        return [[draw.randrange(1, options.vocabulary) for _ in range(options.prompt_tokens)] for _ in range(count)]
    with Path(options.prompts).open(encoding="utf-8") as file:
        return [list(map(int, one))[: options.prompt_tokens] for one in json.load(file)]


def prefill(llm: Any, prompts: Sequence[Sequence[int]], max_model_len: int) -> list[str]:
    """Start the sequences and step until each has its first token; their names."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    for number, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=0.0, max_tokens=max_model_len - len(prompt), ignore_eos=True, detokenize=False
        )
        engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, params)
    scheduler = scheduler_of(llm)
    while scheduler.waiting or any(one.num_output_tokens < 1 for one in scheduler.running):
        engine.step()
    if len(scheduler.running) != len(prompts):
        raise SystemExit(f"error: {len(prompts)} sequences must run at once, got {len(scheduler.running)}")
    return [str(number) for number in range(len(prompts))]


def finish(llm: Any, names: list[str]) -> None:
    """Drop the sequences and let the engine forget them."""
    llm.llm_engine.abort_request(names)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def write(out: TextIO, record: dict[str, Any]) -> None:
    """One line, on disk at once: a run that is cut short keeps what it measured."""
    out.write(json.dumps(record) + "\n")
    out.flush()


if __name__ == "__main__":
    raise SystemExit(main())

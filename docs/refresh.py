"""Redo what the documentation prints: ``python docs/refresh.py [--transcripts] [--scores FILE] [--speed FILE]
[--speculation DATA] [--validation FILE ...]``.

Transcripts are run here and now. FILE is what ``python -m servecast.validation.public --json`` (needs SERVECAST_DATA)
and ``python benchmarks/run.py --install --json`` print; of --validation what ``servecast validate --json`` does.
Results go to docs/tables/ and the README.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from servecast.cli import main as servecast

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
SPLITS = {"group": "group", "gpu": "GPU type", "model": "model"}
SLICES = {
    "all": "all",
    "dense": "dense, all",
    "dense, without suspect rows": "dense, no suspect",
    "dense, without suspect and inconsistent rows": "dense, no suspect or inconsistent",
    "mixture of experts": "MoE",
}
TRANSCRIPTS = {
    "plan": "plan --trace example --model Llama-3.1-70B --gpu h100=2.9 --gpu h200=3.5 --gpu l40s=1.1"
    " --slo ttft_p99=2s --slo tpot_p99=50ms",
    "predict": "predict --model Qwen3-32B --gpu h100 --tp 4 --concurrency 32 --isl 1024 --osl 512",
    "speculate": "speculate --model Llama-3.1-70B --gpu h100 --tp 4 --acceptance examples/eagle3_acceptance.csv"
    " --method eagle3 --draft-model my/eagle3-head --max-batch 128 --slo tpot_mean=30ms",
    "trace": "trace example",
}
Row = Mapping[str, Any]
SHOWN_SHARE = 0.8
"""Arrival rate of the table of policies, of what the engine completes without speculation."""


def percent(share: float | None) -> str:
    """One digit; nothing where there is no number."""
    return "" if share is None or share != share else f"{100.0 * share:.1f}"


def pair(ttft: Row, tpot: Row, name: str) -> str:
    """The same figure of both metrics."""
    return f"{percent(ttft[name])} / {percent(tpot[name])}"


def rows_by_key(scores: Iterable[Row]) -> dict[tuple[str, str, str], Row]:
    """Scores by split, slice and metric."""
    return {(one["split"], one["slice"], one["metric"]): one for one in scores}


def summary(scores: Iterable[Row]) -> str:
    """The README's table: one line per split and slice, TTFT / TPOT in each cell."""
    found = rows_by_key(scores)
    lines = [
        "| held out | rows | n | MAPE | median | 90 % holds | roofline | AIConfigurator | ours, its rows |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for split, title in SPLITS.items():
        for key, name in SLICES.items():
            if key == "all":
                continue
            ttft, tpot = found[split, key, "ttft"], found[split, key, "tpot"]
            cells = [pair(ttft, tpot, column) for column in ("mape", "median", "interval_coverage", "roofline_mape")]
            cells += [pair(ttft, tpot, column) for column in ("aic_mape", "mape_on_aic_rows")]
            lines.append(f"| {title} | {name} | {ttft['rows']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def full(scores: Iterable[Row], metric: str) -> str:
    """All slices of one metric."""
    lines = [
        "| held out | rows | n | answered | MAPE | median | bias | 90 % holds | roofline | AIC n | AIC MAPE "
        "| AIC median | ours, its rows |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in scores:
        if one["metric"] != metric:
            continue
        cells = [percent(one[name]) for name in ("predicted", "mape", "median", "bias", "interval_coverage")]
        cells += [percent(one["roofline_mape"]), str(one["aic_rows"])]
        cells += [percent(one[name]) for name in ("aic_mape", "aic_median", "mape_on_aic_rows")]
        lines.append(f"| {SPLITS[one['split']]} | {SLICES[one['slice']]} | {one['rows']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernels(reports: Iterable[Row]) -> str:
    """Held-back errors of the kernel fits."""
    lines = [
        "| GPU | kernel | format | rows | numbers kept | slice | held back | MAPE | median | closed form, median |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        for name, error in report["held_out"].items():
            cells = [percent(error[key]) for key in ("mape", "median", "closed_form_median")]
            start = [
                report["gpu"].removesuffix("_sxm"),
                report["kernel"],
                report["format"],
                f"{report['rows']:,}",
                str(report["numbers"]),
            ]
            lines.append("| " + " | ".join([*start, name, f"{error['rows']:,}", *cells]) + " |")
    return "\n".join(lines)


def vllm_runs(rows: Iterable[Row]) -> str:
    """Open runs of vLLM: what was measured, what the simulator and the closed form said, and the peer's error."""
    found = {(one["run"], one["metric"], one["executor"]): one for one in rows if one["truth"] is not None}
    lines = [
        "| run | metric | measured | simulator | error | closed form | error | LLMServingSim, error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run, metric in dict.fromkeys((run, metric) for run, metric, _ in found):
        simulated, closed = (found[run, metric, executor] for executor in ("simulator", "closed_form"))
        cells = [f"{simulated['truth']:.4g}"]
        for one in (simulated, closed):
            cells += [f"{one['predicted']:.4g} [{one['lo']:.4g}, {one['hi']:.4g}]", f"{100.0 * one['error']:+.1f}"]
        peer = simulated["peer"]
        cells.append("" if peer is None else f"{100.0 * (peer / simulated['truth'] - 1.0):+.1f}")
        lines.append(f"| {run} | {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed(figures: Iterable[Row]) -> str:
    """The benchmark's table."""
    lines = ["| what | measured | bar | AIConfigurator 0.12 |", "|---|---|---|---|"]
    for one in figures:
        value = f"{one['value']:,.0f}" if one["value"] >= 1000.0 else f"{one['value']:.3g}"
        lines.append(f"| {one['name']} | {value} {one['unit']} | {one['bar']} | {one['peer']} |")
    return "\n".join(lines)


def transcript(arguments: str) -> str:
    """A command as typed in the project's root, and what it prints."""
    os.chdir(DOCS.parent)
    result = CliRunner().invoke(servecast, shlex.split(arguments))
    if result.exit_code:
        raise RuntimeError(f"servecast {arguments}: {result.output}")
    typed = f"$ servecast {arguments}".replace(" --gpu", " \\\n    --gpu", 1).replace(" --slo", " \\\n    --slo", 1)
    return f"{typed}\n{result.output.rstrip()}\n"


def between(name: str, table: str) -> None:
    """Replace what stands between the README's markers."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    words = README.read_text(encoding="utf-8")
    before, opened, rest = words.partition(start)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"README.md must have {start} and {end}")
    README.write_text(f"{before}{start}\n\n{table}\n\n{end}{after}", encoding="utf-8")


def speculation(folder: Path) -> None:
    """Tables of the speculation page: public data, and the runs of figures/speculation_comparison.csv."""
    from servecast.validation import speculation_scores as scores

    tables = {
        "sweeps": scores.sweep_markdown(scores.sweep_scores(folder)),
        "settings": scores.setting_markdown(scores.setting_scores(folder)),
        "transfer": scores.transfer_markdown(scores.transfers(folder)),
    }
    with (DOCS / "figures" / "speculation_comparison.csv").open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    tables |= {"policies": policies(rows), "claims": claims(rows)}
    for name, table in tables.items():
        (DOCS / "tables" / f"speculation_{name}.md").write_text(table + "\n", encoding="utf-8")


def policies(rows: list[dict[str, str]]) -> str:
    """Mean and p99 latency and attainment of every policy, one rate of every system and trace."""
    lines = [
        "| system, trace, rate | policy | tokens a step | TPOT mean / p99 [ms] | e2e mean / p99 [s] | in limits |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if float(row["share"]) != SHOWN_SHARE:
            continue
        tpot = f"{1e3 * float(row['tpot_mean_s']):.1f} / {1e3 * float(row['tpot_p99_s']):.1f}"
        whole = f"{float(row['e2e_mean_s']):.2f} / {float(row['e2e_p99_s']):.2f}"
        where = f"{row['system']}, {row['trace']}, {row['share']}"
        tokens, met = f"{float(row['tokens_per_round']):.2f}", f"{float(row['slo_attainment']):.1%}"
        lines.append(f"| {where} | {row['policy']} | {tokens} | {tpot} | {whole} | {met} |")
    return "\n".join(lines)


def claims(rows: list[dict[str, str]]) -> str:
    """Ratio of mean TPOT, baseline over policy, smallest to largest over systems, traces and rates."""
    baselines = ("no speculation", "static 1", "static 3", "static 5", "confidence stop")
    speculative = baselines[1:]
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        key = row["system"], row["trace"], row["share"]
        cases.setdefault(key, {})[row["policy"]] = float(row["tpot_mean_s"])
    lines = [
        "| mean TPOT over the policy's | best baseline of each case | worst speculative one | no speculation |",
        "|---|---|---|---|",
        "| SpecServe v1, as reported | 1.14 to 14.3 over other speculative systems | | |",
        "| SpecServe v2 (AdaSpec), as reported | up to 1.66 | | |",
    ]
    for policy in (one for one in next(iter(cases.values())) if one not in baselines):
        ends = [
            [min(case[name] for name in baselines) / case[policy] for case in cases.values()],
            [max(case[name] for name in speculative) / case[policy] for case in cases.values()],
            [case["no speculation"] / case[policy] for case in cases.values()],
        ]
        cells = [f"{min(ratios):.2f} to {max(ratios):.2f}" for ratios in ends]
        lines.append(f"| {policy}, here | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def validation(reports: Iterable[Row]) -> str:
    """Figures with a budget, worst first within a part, of what ``servecast validate --json`` printed."""
    lines = []
    for report in reports:
        engine = report["engine"]
        version = engine.get("version") or engine.get("torch", "")
        lines += [
            f"**{report['scenario']}**: {report['verdict']}. {engine['engine']} {version}, "
            f"{report['wall_s'] / 60:.1f} minutes.\n",
            "| part | figure | by | error | naive | noise | budget | |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for one in report["comparisons"]:
            if one["budget"] is None:
                continue
            share = one["unit"] not in ("tokens", "blocks")
            numbers = [_signed(one["error"], share), _signed(one["baseline"], share), percent(one["noise"])]
            budget = f"{100.0 * one['budget']:g}" if share else f"{one['budget']:g}"
            cells = [one["part"], one["metric"], one["executor"].replace("_", " "), *numbers, budget, one["verdict"]]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "Errors, noise and budgets in %, of acceptance in tokens, of KV blocks in blocks.\n\n" + "\n".join(lines)


def _signed(value: float | None, share: bool) -> str:
    if value is None:
        return ""
    return f"{100.0 * value:+.1f}" if share else f"{value:+.3g}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transcripts", action="store_true")
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--speed", type=Path)
    parser.add_argument("--validation", type=Path, nargs="+", help="what servecast validate --json printed")
    parser.add_argument("--speculation", type=Path, help="folder of the public data")
    given = parser.parse_args()
    if given.validation:
        reports = [json.loads(one.read_text(encoding="utf-8")) for one in given.validation]
        (DOCS / "tables" / "validation.md").write_text(validation(reports), encoding="utf-8")
    if given.speculation:
        speculation(given.speculation.resolve())
    for name, arguments in TRANSCRIPTS.items() if given.transcripts else ():
        words = transcript(arguments)
        (DOCS / "tables" / f"{name}.txt").write_text(words, encoding="utf-8")
        if name != "trace":
            between(name, f"```text\n{words}```")
    if given.scores:
        results = json.loads(given.scores.read_text(encoding="utf-8"))
        # with --only vllm-runs the scores are that list alone
        runs = results if isinstance(results, list) else results["vllm_runs"]
        (DOCS / "tables" / "vllm_runs.md").write_text(vllm_runs(runs) + "\n", encoding="utf-8")
        results = {} if isinstance(results, list) else results
    if given.scores and results:
        for metric in ("ttft", "tpot"):
            (DOCS / "tables" / f"{metric}.md").write_text(full(results["silicon"], metric) + "\n", encoding="utf-8")
        (DOCS / "tables" / "kernels.md").write_text(kernels(results["kernels"]) + "\n", encoding="utf-8")
        (DOCS / "tables" / "summary.md").write_text(summary(results["silicon"]) + "\n", encoding="utf-8")
        between("scores", summary(results["silicon"]))
    if given.speed:
        figures = json.loads(given.speed.read_text(encoding="utf-8"))["figures"]
        table = speed(figures)
        (DOCS / "tables" / "speed.md").write_text(table + "\n", encoding="utf-8")
        between("speed", speed(one for one in figures if one["bar"]))


if __name__ == "__main__":
    main()

"""One valid policy table, written by hand, that the tests of this folder change."""

from __future__ import annotations

import copy
from typing import Any

from servecast.policies import PolicyTable, from_dict

HOSTILE = (
    "a\nb",
    "it's",
    'say "hi"',
    "$(touch pwned)",
    "`touch pwned`",
    "x; rm -rf y && z | w > v",
    "a: b",
    "{a: [b]}",
    "# no comment",
    "&anchor *alias !!python/object:os.system",
    "null",
    "true",
    "1e3",
    "0x10",
    "2025-01-31",
    " spaces at both ends ",
    "tab\there",
    "back\\slash %s ${HOME} ~",
    "line\u2028separator \u0085 \u00e9 \U0001f600",
    "\x1b[31mred\x07",
    "a\r\nb: c\r",
    "...\n---\nmodel: other",
)
"""Names that would do harm in a YAML file, a shell script or a comment if they were not data."""


def document(**changes: Any) -> dict[str, Any]:
    """A valid document by hand, with top-level `changes`."""
    interval = {"value": 0.2, "lo": 0.1, "hi": 0.4}
    base: dict[str, Any] = {
        "schema": "servecast.policy/1",
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "engine": "vllm",
        "engine_version": "0.32.0",
        "gpu": "h100-sxm",
        "precision": "bf16",
        "checkpoint_format": "bf16",
        "kv_format": "bf16",
        "tp": 2,
        "pp": 1,
        "replicas": 3,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 8192,
        "max_model_len": 16384,
        "gpu_memory_utilization": 0.9,
        "memory": {"gpu_bytes": 80e9, "weight_bytes": 8e9, "overhead_bytes": 4e9},
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "cost_usd_per_hour": 18.0,
        "predicted": {name: dict(interval) for name in ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")},
        "slo": [{"name": "ttft_p99", "limit_s": 2.0}, {"name": "tpot_p99.9", "limit_s": 0.05}],
        "provenance": {"servecast": "0.1.0", "profile": "h100", "trace": "chat", "date": "2025-01-31", "seed": 7},
    }
    return base | copy.deepcopy(changes)


def table(**changes: Any) -> PolicyTable:
    """The valid table with top-level `changes`."""
    return from_dict(document(**changes))

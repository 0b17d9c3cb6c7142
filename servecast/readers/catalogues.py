"""The shipped catalogues: accelerators and language models by name.

`catalogue/gpus.json` holds records in the fields of `Gpu`, with the source of each figure; `catalogue/llms.json` holds
records in the fields of `Llm`, with the parameter count that the publisher states. A record with `like` takes every
field that it does not state from the record of that name.

Names are matched as people write them: case, separators and the vendor do not matter, and the organisation in front of
a model may be left out, as may a suffix such as `-Instruct` where no record has it. A bare `h100` or `a100` means the
SXM part with 80 GB, `v100` the SXM2 part with 32 GB; the aliases in the file say so. Models that differ in a suffix
only: the first in the file answers to the bare name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from servecast.model.hardware import Gpu, Link
from servecast.model.llm import Llm
from servecast.readers.huggingface import read_config

_VENDOR_WORDS = frozenset({"nvidia", "amd", "intel", "geforce", "tesla", "instinct"})
_TUNED_WORDS = frozenset({"instruct", "it", "hf", "chat"})
_SEPARATORS = str.maketrans("-_./", "    ")
_LINKS = ("peer", "inter_node", "pcie")


def _words(name: str) -> list[str]:
    """Lower-case pieces of a name between separators."""
    return name.lower().translate(_SEPARATORS).split()


def _key(name: str, dropped: frozenset[str] = frozenset()) -> str:
    """What is left of a name when case, separators and the `dropped` words do not matter.

    Digits stay apart where a separator parts them: `opt-1.3b` is not `opt-13b`.
    """
    key = ""
    for word in _words(name):
        if word not in dropped:
            key += f"-{word}" if key[-1:].isdigit() and word[0].isdigit() else word
    return key


def _records(table: str) -> list[dict[str, Any]]:
    """Records of one catalogue file, `like` resolved."""
    text = resources.files("servecast.readers").joinpath("catalogue", f"{table}.json").read_text(encoding="utf-8")
    records: dict[str, dict[str, Any]] = {}
    for record in json.loads(text)[table]:
        base = records[record.pop("like")] if "like" in record else {}
        records[record["name"]] = {**base, "aliases": [], **record}
    return list(records.values())


def _refuse(what: str, rule: str, name: object, names: Iterable[str], keys: Mapping[str, str]) -> NoReturn:
    """One line with the names that are nearest to what was asked."""
    from difflib import get_close_matches  # only a mistake pays for it

    shown = repr(name) if len(repr(name)) <= 80 else repr(name)[:77] + "..."
    close = get_close_matches(_key(str(name)[:200], _VENDOR_WORDS), keys, n=6, cutoff=0.5)
    nearest = list(dict.fromkeys(keys[key] for key in close))[:3]
    listed = f"nearest: {', '.join(nearest)}" if nearest else f"known: {', '.join(islice(names, 40))}"
    raise ValueError(f"{what} must be {rule}, got {shown} ({listed})")


# ---- accelerators ------------------------------------------------------------------------------------


def _gpu_from_record(record: Mapping[str, Any]) -> Gpu:
    sources = tuple((field, source) for source, fields in record["sources"].items() for field in fields)
    links: dict[str, Any] = {name: Link(**record[name]) for name in _LINKS}
    rest = {k: v for k, v in record.items() if k not in {"aliases", "sources", "memory_bytes", *_LINKS}}
    return Gpu(**rest, **links, memory_bytes=float(record["memory_bytes"]), sources=sources)


@functools.cache
def _gpus() -> tuple[dict[str, Gpu], dict[str, str]]:
    """Accelerators by name, and names by key."""
    records = _records("gpus")
    keys = {_key(alias, _VENDOR_WORDS): r["name"] for r in records for alias in (r["name"], r["title"], *r["aliases"])}
    return {r["name"]: _gpu_from_record(r) for r in records}, keys


def gpu_names() -> tuple[str, ...]:
    """Names of the accelerators in the catalogue."""
    return tuple(_gpus()[0])


def gpu(name: str) -> Gpu:
    """Accelerator of the catalogue by name, alias or the name that its driver reports.

    Raises
    ------
    ValueError
        With the nearest names, for a part that is not in the catalogue.

    >>> gpu("NVIDIA H200").name, gpu("A100-80GB").name
    ('h200_sxm', 'a100_sxm')
    """
    gpus, keys = _gpus()
    found = keys.get(_key(name, _VENDOR_WORDS)) if isinstance(name, str) else None
    if found is None:
        _refuse("gpu", "a catalogue name", name, gpus, keys)
    return gpus[found]


# ---- language models ---------------------------------------------------------------------------------


def _bare(name: str) -> str:
    """A model's name without its organisation."""
    return name.rpartition("/")[2]


@functools.cache
def _llms() -> tuple[dict[str, Llm], dict[str, str], dict[str, float]]:
    """Models by name, names by key, published parameter counts by name."""
    records = _records("llms")
    named = [(alias, r["name"]) for r in records for alias in (r["name"], *r["aliases"])]
    keys: dict[str, str] = {}
    # Exact names first, then without organisation, then without suffix: a looser key never displaces a tighter one.
    for dropped in (frozenset[str](), _TUNED_WORDS):
        for shorten in (str, _bare):
            for alias, name in named:
                keys.setdefault(_key(shorten(alias), dropped), name)
    extra = {"aliases", "published_params", "source"}
    models = {r["name"]: Llm(**{k: v for k, v in r.items() if k not in extra}) for r in records}
    return models, keys, {r["name"]: float(r["published_params"]) for r in records}


def llm_names() -> tuple[str, ...]:
    """Names of the language models in the catalogue."""
    return tuple(_llms()[0])


def _existing(name: str | PathLike[str]) -> Path | None:
    """A config file, or a folder with one, where `name` is the path of it."""
    if not name:
        return None
    try:
        path = Path(name)
        return path if path.is_file() or (path / "config.json").is_file() else None
    except (OSError, ValueError):  # longer than a path may be, or with a null character
        return None


def llm(name_or_path: str | PathLike[str]) -> Llm:
    """Language model by catalogue name, or from a `config.json` or a folder with one.

    A path that exists comes first, as in the engines: what lies on disk is what would be served.

    Raises
    ------
    ValueError
        With the nearest names, for a model that is neither in the catalogue nor on disk; or with what is wrong in the
        config.

    >>> llm("llama-3.1-8b").name
    'meta-llama/Llama-3.1-8B-Instruct'
    """
    path = _existing(name_or_path)
    if path is not None:
        return read_config(path)
    return _llms()[0][_llm_name(str(name_or_path))]


def _llm_name(name: str) -> str:
    """Full name of a catalogue model."""
    models, keys, _ = _llms()
    found = keys.get(_key(name)) or keys.get(_key(name, _TUNED_WORDS))
    if found is None:
        _refuse("llm", "a catalogue name or a folder with a config.json", name, models, keys)
    return found


def published_params(name: str) -> float:
    """Parameter count that the publisher of a catalogue model states. [parameters]

    >>> published_params("DeepSeek-R1")
    671000000000.0
    """
    return _llms()[2][_llm_name(name)]

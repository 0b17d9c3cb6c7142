"""Columns as the bytes of a CSV or Parquet file; the same columns give the same bytes, there is no date inside."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

SUFFIXES = (".csv", ".csv.gz", ".parquet")


def require_table_name(path: Path) -> str:
    """The suffix that says how to write the table; refuses a name without one, or a format that is not installed."""
    suffix = next((one for one in SUFFIXES if path.name.endswith(one)), None)
    if suffix is None:
        raise ValueError(f"--out must end in {', '.join(SUFFIXES)}, got {path.name!r}")
    if suffix == ".parquet":
        _pyarrow()
    return suffix


def table_bytes(columns: Mapping[str, NDArray[Any]], suffix: str) -> bytes:
    """Columns of equal length as a whole file; NaN is empty in CSV and null in Parquet."""
    if suffix == ".parquet":
        return _parquet(columns)
    text = _csv(columns).encode("utf-8")
    # no file name and no time in the header
    return gzip.compress(text, mtime=0) if suffix == ".csv.gz" else text


def _csv(columns: Mapping[str, NDArray[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    # shortest digits that read back as the same number
    cells = [map(_shown, one.tolist()) if one.dtype.kind == "f" else one.tolist() for one in columns.values()]
    writer.writerows(zip(*cells, strict=True))
    return out.getvalue()


def _shown(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _parquet(columns: Mapping[str, NDArray[Any]]) -> bytes:
    import numpy as np

    arrow = _pyarrow()
    from pyarrow import parquet

    made = {
        name: arrow.array(one, mask=np.isnan(one))
        if one.dtype.kind == "f"
        else arrow.array(one.tolist())
        if one.dtype.kind == "U"
        else arrow.array(one)
        for name, one in columns.items()
    }
    out = io.BytesIO()
    parquet.write_table(arrow.table(made), out, compression="zstd")
    return out.getvalue()


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError("a .parquet file needs pyarrow, which the extra servecast[parquet] installs") from None
    return pyarrow

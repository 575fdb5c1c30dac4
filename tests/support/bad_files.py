"""Bad data files, each with the error that a user must see: the tables of all kinds.

Every file but those of `PATHS` and `MIXES` contains exactly one fault.
"""

from __future__ import annotations

from support.bad_columns import ARROW, PARQUET
from support.bad_file_kit import Bad
from support.bad_packed import CSV, GZIP, ZSTD
from support.bad_sources import INFOS, MIXES, PATHS
from support.bad_text import ARRAYS, ENCODINGS, FILES, JSON

__all__ = ["BAD", "Bad"]

BAD: dict[str, Bad] = {
    f"{group}: {name}": bad
    for group, table in {
        "encoding": ENCODINGS, "json": JSON, "file": FILES, "array": ARRAYS, "gzip": GZIP,
        "zstd": ZSTD, "csv": CSV, "parquet": PARQUET, "arrow": ARROW, "path": PATHS,
        "mix": MIXES, "info": INFOS,
    }.items()
    for name, bad in table.items()
}  # fmt: skip

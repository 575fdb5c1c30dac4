"""Bad data files that are compressed, and CSV."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any

from support.bad_file_kit import GOOD, MIB, TWO, Bad, named

_MANY = (GOOD + b"\n") * 2000
_GZ = gzip.compress(_MANY, mtime=0)


def gz(data: bytes | Callable[[], bytes], code: str, words: str, field: str = "line") -> Bad:
    return named("rows.jsonl.gz", data, code, words, field)


GZIP = {
    "3 bytes": gz(_GZ[:3], "QC-DATA-031", "end early"),
    "12 bytes": gz(_GZ[:12], "QC-DATA-031", "end early"),
    "cut in the middle": gz(_GZ[: len(_GZ) // 2], "QC-DATA-031", "end early"),
    "no trailer": gz(_GZ[:-8], "QC-DATA-031", "end early"),
    "half a trailer": gz(_GZ[:-3], "QC-DATA-031", "end early"),
    "wrong checksum": gz(_GZ[:-8] + b"abcd" + _GZ[-4:], "QC-DATA-031", "CRC"),
    "wrong length": gz(_GZ[:-4] + b"abcd", "QC-DATA-031", "length"),
    "trailing text": gz(_GZ + b"more", "QC-DATA-031", "gzip"),
    "second member cut": gz(_GZ + _GZ[:40], "QC-DATA-031", "end early"),
    "unknown method": gz(_GZ[:2] + b"\x07" + _GZ[3:], "QC-DATA-031", "method"),
    "noise": gz(_GZ[:60] + b"\xff" * 60 + _GZ[120:], "QC-DATA-031", "is damaged or cut"),
    "of nothing": gz(gzip.compress(b""), "QC-DATA-002", "no rows", ""),
    "of gzip": gz(gzip.compress(_GZ), "QC-DATA-003", "compressed twice"),
    "of Parquet": gz(gzip.compress(b"PAR1xxxxPAR1"), "QC-DATA-003", "gzip of Parquet"),
    "of UTF-16": gz(gzip.compress(TWO.decode().encode("utf-16")), "QC-DATA-003", "UTF-16"),
    "of a bad line": gz(gzip.compress(TWO + b"x\n"), "QC-DATA-004", "not JSON", "line 3"),
    "of a cut array": gz(gzip.compress(b"[" + GOOD), "QC-DATA-031", "ends inside of", "element 1"),
    "of CSV": gz(gzip.compress(b"prompt,response\n"), "QC-DATA-003", "looks like CSV"),
    "of text": gz(b"hello", "QC-DATA-004", "not JSON"),
    "of short CSV": named("rows.csv.gz", gzip.compress(b"a,b\n1\n"), "QC-DATA-032",
        "number of cells", "line 2"),
}  # fmt: skip


def _zstd(data: bytes, **options: Any) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(**options).compress(data)


def zst(make: Callable[[], bytes], code: str, words: str, field: str = "line") -> Bad:
    return named("rows.jsonl.zst", make, code, words, field)


def _wide_window() -> bytes:
    """A frame header that asks for a window of 2 GiB, and one raw block."""
    return b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x09\0\0x"


def _dictionary() -> bytes:
    """A frame header that asks for dictionary 7."""
    return b"\x28\xb5\x2f\xfd\x01\x50\x07" + b"\x09\0\0x"


ZSTD = {
    "5 bytes": zst(lambda: _zstd(_MANY)[:5], "QC-DATA-031", "end early"),
    "cut in the middle": zst(lambda: _zstd(_MANY)[: len(_zstd(_MANY)) // 2], "QC-DATA-031",
        "end early"),
    "cut by a byte": zst(lambda: _zstd(_MANY)[:-1], "QC-DATA-031", "end early"),
    "checksum cut": zst(lambda: _zstd(_MANY, write_checksum=True)[:-2], "QC-DATA-031", "end early"),
    "wrong checksum": zst(lambda: _zstd(_MANY, write_checksum=True)[:-4] + b"abcd", "QC-DATA-031",
        "checksum"),
    "trailing text": zst(lambda: _zstd(_MANY) + b"more text", "QC-DATA-031", "is damaged or cut"),
    "second frame cut": zst(lambda: _zstd(_MANY) + _zstd(_MANY)[:20], "QC-DATA-031", "end early"),
    "noise": zst(lambda: b"\x28\xb5\x2f\xfd" + b"\xff" * 60, "QC-DATA-031", "is damaged or cut"),
    "window of 2 GiB": zst(_wide_window, "QC-DATA-031", "is damaged or cut"),
    "dictionary": zst(_dictionary, "QC-DATA-031", "ictionary"),
    "of nothing": zst(lambda: _zstd(b""), "QC-DATA-002", "no rows", ""),
    "of gzip": zst(lambda: _zstd(_GZ), "QC-DATA-003", "compressed twice"),
    "of a bad line": zst(lambda: _zstd(TWO + b"{]\n"), "QC-DATA-004", "not JSON", "line 3"),
    "of 17 MiB": zst(lambda: _zstd(GOOD + b'\n{"a": "' + b"x" * (17 * MIB)), "QC-DATA-004",
        "too long", "line 2"),
}  # fmt: skip


def csv(data: bytes, code: str, words: str, field: str = "line 1", name: str = "rows.csv") -> Bad:
    return named(name, data, code, words, field)


_H = b"prompt,response\n"
CSV = {
    "empty": csv(b"", "QC-DATA-032", "no header"),
    "blank line first": csv(b"\n" + _H + b"a,b\n", "QC-DATA-032", "no header"),
    "only a header": csv(_H, "QC-DATA-002", "no rows", ""),
    "header and blank lines": csv(_H + b"\n\n", "QC-DATA-002", "no rows", ""),
    "column twice": csv(b"prompt,prompt\na,b\n", "QC-DATA-032", "'prompt' twice"),
    "column twice, with blanks": csv(b"prompt, prompt\na,b\n", "QC-DATA-032", "'prompt' twice"),
    "column without a name": csv(b"prompt,,response\na,b,c\n", "QC-DATA-032", "column 2"),
    "short record": csv(_H + b"a,b\nc\n", "QC-DATA-032", "found 1, expected 2", "line 3"),
    "long record": csv(_H + b"a,b,c\n", "QC-DATA-032", "found 3, expected 2", "line 2"),
    "open quote": csv(_H + b'a,"b\nc,d\n', "QC-DATA-032", "unexpected end", "line"),
    "text after a quote": csv(_H + b'"a"b,c\n', "QC-DATA-032", "expected after", "line 2"),
    "latin-1": csv(_H + b"a,b\ncaf\xe9,d\n", "QC-DATA-003", "0xe9", "line 3, prompt"),
    "latin-1 header": csv(b"pr\xe9mice,response\na,b\n", "QC-DATA-032", "not UTF-8"),
    "UTF-16": csv((_H + b"a,b\n").decode().encode("utf-16"), "QC-DATA-003", "UTF-16"),
    "semicolons": csv(b"prompt;response\na;b\n", "QC-DATA-032", "semicolons"),
    "tabs": csv(b"prompt\tresponse\na\tb\n", "QC-DATA-032", "tabs"),
    "header over two lines": csv(b'"pro\nmpt",response\na,b\n', "QC-DATA-032", "control character"),
    "a line of 17 MiB": csv(_H + b"a," + b"x" * (17 * MIB) + b"\n", "QC-DATA-004", "too long",
        "line 2"),
    "a cell of 17 MiB": csv(_H + b'a,"' + (b"x" * 65535 + b"\n") * 272 + b'"\n', "QC-DATA-032",
        "field limit", "line"),
    "short record, .tsv": csv(b"prompt\tresponse\na,b\n", "QC-DATA-032", "found 1, expected 2",
        field="line 2", name="rows.tsv"),
    "NUL": csv(b"\0\0\0\0", "QC-DATA-003", "NUL"),
}  # fmt: skip

"""Compares what a run left with what an undisturbed run leaves.

This file decides which bytes have to agree: all of them, except clock times and measured speed and
memory. It also decides what a clean failure is: one error line with a stable code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torture.client import Ended

Print = Mapping[str, str]  #: file -> digest of what must agree
#: What happened at a point. `recovered`: the result is that of the undisturbed run; `lost`: it is
#: absent, or progress that was published is gone; `mixed`: the output's name stood for neither the
#: whole result nor nothing; `silent`: exit status 0, and another result; `unclean`: a traceback, an
#: internal error or no error line; `hung`: it took longer than its limit.
VERDICTS: Final = ("recovered", "lost", "mixed", "silent", "unclean", "hung")
#: Fields of a row of metrics.jsonl that a clock or the process says.
_MEASURED: Final = ("seconds", "tokens_per_second", "memory_gb")
_ERROR: Final = re.compile(r"^error\[(QC-[A-Z0-9]+-\d{3})\] ", re.MULTILINE)


def fingerprint(folder: Path) -> Print:
    """The files of a folder with what must agree of each; empty if there is no folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _content(path: Path) -> bytes:
    """The bytes of a file less what a clock or the process says; those of a torn file as is."""
    data = path.read_bytes()
    try:
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
            kept = [{key: row[key] for key in row if key not in _MEASURED} for row in rows]
            return json.dumps(kept).encode()
        if path.name == "MANIFEST.json":
            return json.dumps(_timeless(json.loads(data)), sort_keys=True).encode()
    except (ValueError, TypeError):
        return data
    return data


def _timeless(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest less its times, and less the digest of the file that holds others."""
    kept = {key: value for key, value in manifest.items() if "sha256" not in key}
    kept.pop("created", None)
    kept.get("files", {}).pop("metrics.jsonl", None)
    kept.get("meta", {}).get("result", {}).pop("measured", None)
    return kept


def differences(found: Print, expected: Print) -> str:
    """The files in which two fingerprints differ, as a short text; empty if there are none."""
    names = sorted(
        name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
    )
    return ", ".join(names)[:200]


def error_code(ended: Ended) -> str:
    """The code of the error that a command printed last, or an empty text."""
    codes = _ERROR.findall(ended.err)
    return codes[-1] if codes else ""


def uncleanness(ended: Ended) -> str:
    """Why the end of a qcore command that failed is not a clean one; empty if it is."""
    if "Traceback (most recent call last)" in ended.err:
        return f"traceback: {ended.last_line[:200]}"
    if "QC-INTERNAL" in ended.err:
        return ended.last_line[:200]
    if ended.status > 0 and not _ERROR.search(ended.err) and not ended.err.startswith("Usage"):
        return f"status {ended.status} without an error line: {ended.last_line[:200]}"
    return ""

r"""``rank_pattern`` and ``alpha_pattern``: the rank and alpha of a module, as PEFT matches them.

This file decides how a key is matched. PEFT takes each key as a regular expression,
``re.match(rf"(.*\.)?({key})$", name)``, and the first key that matches counts. A downloaded
expression may need exponential time, so expressions run in a process of their own, with a limit.
Keys of word characters and dots alone are matched here. `qcore.adapter.peft_config` checks types.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

FIELDS = ("rank_pattern", "alpha_pattern")
_PLAIN = re.compile(r"[\w.]+")
_CPU_SECONDS = 2  #: that matching may take; thousands of modules and keys take milliseconds
_SECONDS = 10  #: the same where other programs use the processor
_CHILD = """
import json, re, resource, sys
keys, names, seconds = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
own = [re.compile(rf"(.*\\.)?({key})$") for key in keys]
json.dump([[bool(one.match(name)) for name in names] for one in own], sys.stdout)
"""


class NumberPatterns:
    """The values of both fields by module.

    Args:
        path: adapter_config.json, for errors; ``None``: the fields are settings of a run.
        config: its content.
        modules: names of all modules that a key may match.

    Attributes:
        unmatched: (field, key) of each key that matches no module.

    Raises:
        InputError: ``QC-ADAPTER-004`` a key takes too long to match.
    """

    def __init__(
        self, path: Path | None, config: Mapping[str, Any], modules: Sequence[str]
    ) -> None:
        self._values: dict[str, dict[str, float]] = {}
        self.unmatched: list[tuple[str, str]] = []
        for field in FIELDS:
            pattern = config.get(field) or {}
            hits = matches(path, field, list(pattern), modules)
            self.unmatched += [(field, key) for key in pattern if not hits[key]]
            of_field = self._values.setdefault(field, {})
            for key, value in pattern.items():
                for module in hits[key]:
                    of_field.setdefault(module, float(value))

    def value(self, field: str, module: str, default: float) -> float:
        """Return the value of a field for a module."""
        return self._values[field].get(module, default)


def matches(
    path: Path | None, field: str, keys: Sequence[str], modules: Sequence[str]
) -> dict[str, list[str]]:
    """Return the modules that each key matches."""
    plain = {key for key in keys if _PLAIN.fullmatch(key)}
    hits = {key: [name for name in modules if _ends_with(name, key)] for key in plain}
    others = [key for key in keys if key not in plain]
    if not others:
        return hits
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([others, modules, _CPU_SECONDS]),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        # The kernel ends the process at its limit; an expression that is wrong ends it with 1.
        late = isinstance(error, subprocess.TimeoutExpired) or error.returncode < 0
        raise InputError(
            "QC-ADAPTER-004",
            "has an expression that takes too long to match"
            if late
            else "has an expression that cannot be matched",
            file=path,
            field=field,
            found=", ".join(others)[:200],
            expected=f"all keys matched within {_CPU_SECONDS} s",
            fix="write the names of the modules instead of the expression",
        ) from None
    for key, row in zip(others, json.loads(child.stdout), strict=True):
        hits[key] = [name for name, hit in zip(modules, row, strict=True) if hit]
    return hits


def _ends_with(name: str, key: str) -> bool:
    """Whether a name ends with a plain key, in which a dot stands for any character."""
    tail = f".{name}"[-len(key) - 1 :]
    if len(tail) <= len(key) or tail[0] != ".":
        return False
    return all(mine in (".", theirs) for mine, theirs in zip(key, tail[1:], strict=True))

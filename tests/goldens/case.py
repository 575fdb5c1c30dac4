"""One recorded command: its words, how it must end, what it writes.

This file decides what a case is; `run_cases` and `error_cases` list the cases.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Verbs that are groups: the record names their commands by two words.
GROUPS = ("adapter", "plugins", "presets", "skus")
#: A short run in float32, without quantization.
FAST = (
    "--device cpu --set dtype=fp32 --set quantization=none --set gradient_accumulation_steps=1 "
    "--set per_device_train_batch_size=2 --set max_steps=2 --set learning_rate=0.01 "
    "--set r=4 --set lora_alpha=8"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One command and how it must end.

    Attributes:
        name: the name of its files in a record.
        command: the words after ``qcore``, as a shell splits them; ``@out`` stands for a path
            that is this case's own.
        code: the error code that it must end with; empty: it must succeed.
        keeps: folders that it writes, whose files are part of the record.
        env: environment variables that it runs with.
        cheap: whether the test suite runs it too: it needs nothing but the inputs, takes no
            more than a second, and its result does not depend on the machine.
        prepare: makes what it needs in the scratch folder.
    """

    name: str
    command: str
    code: str = ""
    keeps: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cheap: bool = False
    prepare: Callable[[Path], None] | None = None

    @property
    def words(self) -> list[str]:
        """The arguments of ``qcore``, without ``--json``."""
        return shlex.split(self.command.replace("@out", f"out/{self.name}"))

    @property
    def verb(self) -> str:
        """The verb, of a group with its command: ``train``, ``presets show``."""
        first, *others = self.words
        return " ".join([first, *others[:1]]) if first in GROUPS else first


Chain = tuple[Case, ...]

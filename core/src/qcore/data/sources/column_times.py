"""Times in Parquet and Arrow files that were text of a conversation.

This file decides which field of a schema is refused. `datasets` and `pyarrow.json` infer timestamps
from strings: ``"2024-05-01"`` and ``"2024-05-01 00:00"`` become the same value, so the string that
a model would be trained on cannot be restored. A time of day is as ambiguous. A date has one
spelling and passes, and so does a time in metadata, such as when a message was sent.

Code: ``QC-DATA-034``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from ...errors import InputError

#: Columns that are text of a conversation.
_TEXT_COLUMNS: Final = frozenset((
    "prompt", "completion", "query", "response", "instruction", "input", "output", "question",
    "problem", "answer", "answers", "solution", "target", "targets", "system", "system_prompt",
    "history",
))  # fmt: skip
#: Keys of messages, calls and tools whose values are text, or hold it at any depth.
_TEXT_KEYS: Final = frozenset((
    "content", "value", "text", "reasoning_content", "reasoning", "thinking", "refusal",
    "arguments", "parameters", "input", "tools", "functions", "chat_template_kwargs",
))  # fmt: skip
_METADATA: Final = frozenset(("metadata", "annotations", "logprobs", "usage", "header"))


def check_times(
    pa: Any, schema: Any, path: Path, ignore: Collection[str], texts: frozenset[str]
) -> None:
    """Refuse times where a conversation has text.

    Args:
        pa: the module `pyarrow`.
        schema: of the file.
        path: the file.
        ignore: columns that are not read.
        texts: further columns and keys of messages that are text.

    Raises:
        InputError: ``QC-DATA-034``.
    """
    for column in schema:
        if column.name in ignore:
            continue
        for names, type_ in _times(pa.types, column.type, (column.name,)):
            if not _is_text(names, texts):
                continue
            raise InputError(
                "QC-DATA-034",
                "has times where a conversation has text; the text that they were made of is lost",
                file=path,
                field=".".join(names),
                found=f"type {type_}",
                expected="type string",
                fix="name the JSON Lines file that it was made of, or write the file again with "
                "type string for this field in its schema (features, in datasets); if it is "
                f"metadata: ignore_columns: [{column.name}] in a mix file",
            )


def _times(kinds: Any, type_: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The timestamps and times of day in a type, each with the keys that lead to it."""
    if kinds.is_timestamp(type_) or kinds.is_time(type_):
        yield names, type_
    elif kinds.is_struct(type_):
        for index in range(type_.num_fields):
            field = type_.field(index)
            yield from _times(kinds, field.type, (*names, field.name))
    elif kinds.is_map(type_):
        yield from _times(kinds, type_.item_type, names)
    elif is_list(kinds, type_) or kinds.is_dictionary(type_) or kinds.is_run_end_encoded(type_):
        yield from _times(kinds, type_.value_type, names)


def _is_text(names: tuple[str, ...], texts: frozenset[str]) -> bool:
    """Whether the keys lead to text; a message may also have metadata, such as its time."""
    for name in names:
        if name in _METADATA:
            return False
        if name in _TEXT_KEYS:
            return True
    return names[-1] in texts or (len(names) == 1 and names[0] in _TEXT_COLUMNS)


def is_list(kinds: Any, type_: Any) -> bool:
    """Whether an Arrow type is a list of any layout."""
    return bool(
        kinds.is_list(type_)
        or kinds.is_large_list(type_)
        or kinds.is_fixed_size_list(type_)
        or kinds.is_list_view(type_)
        or kinds.is_large_list_view(type_)
    )

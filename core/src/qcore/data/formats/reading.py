"""What the converters share while they read one row: field mapping, media kinds, ignored columns.

This file decides how a field mapping is written: with qcore's names (``messages``, ``role``,
``content``, ...), with the keys of an Axolotl dataset (``field_messages``,
``message_property_mappings``, ...) or as an entry of LLaMA-Factory's dataset_info.json
(``formatting``, ``columns``, ``tags``). `qcore.data.sources.read` decides where a mapping is
written.

Code: ``QC-DATA-028`` a field mapping that cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import UsageError, nearest
from ..sources.dataset_info import PLACES

#: Keys of an assistant turn, or of a row, that hold its reasoning.
REASONING = ("reasoning_content", "thinking", "reasoning")
#: Role of an item that is a tool call and nothing else; it becomes part of an assistant turn.
CALL = "call"

_ROW = (
    "messages", "conversations", "system", "tools", "prompt", "completion", "query", "response",
    "instruction", "input", "output", "history", "chat_template_kwargs", "id", "metadata",
)  # fmt: skip
_MESSAGE = ("role", "content", "tool_calls", "tool_call_id", "name", "train", "weight")
_BOTH = ("reasoning_content",)
_ROLES = ("system", "user", "assistant", "tool", CALL)
_AXOLOTL = {
    "field_messages": "messages",
    "field_system": "system",
    "field_tools": "tools",
    "field_thinking": "reasoning_content",
    "message_field_role": "role",
    "message_field_content": "content",
    "message_field_training": "train",
    "message_field_training_detail": "train_detail",
}
_FACTORY = ("formatting", "columns", "tags", "ranking")
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_TAGS = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool",
    "function_tag": CALL, "system_tag": "system",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """A field mapping.

    Attributes:
        format: the format that the mapping implies; empty: detected.
        columns: qcore's key -> key in the rows.
        message: key in the messages -> qcore's key.
        roles: role in the messages -> qcore's role.
        only: whether columns without a mapping are left out.
        ranked: whether the rows are preference pairs.
    """

    format: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    message: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    only: bool = False
    ranked: bool = False


@dataclass(slots=True, kw_only=True)
class Reading:
    """The state of reading one row.

    Attributes:
        kinds: types of media parts that installed plugins read.
        unread: why no media are read, if there is a reason.
        fields: field mapping of the source.
        ignore: keys that the user passes over.
        ignored: keys that were left out, as ``key`` or ``messages[].key``.
    """

    kinds: tuple[str, ...] = ()
    unread: str = ""
    fields: Fields = field(default_factory=Fields)
    ignore: frozenset[str] = frozenset()
    ignored: list[str] = field(default_factory=list)

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row under qcore's keys, without the keys that the user passes over."""
        columns = self.fields.columns
        kept = {key: value for key, value in row.items() if key not in self.ignore}
        if not columns:
            return kept
        taken = {ours: kept.pop(theirs) for ours, theirs in columns.items() if theirs in kept}
        if self.fields.only:
            self.ignored += [key for key, value in kept.items() if value not in (None, "", [], {})]
            return taken
        # A column that has the name of a mapped one is another column: it is not read.
        others = {key: value for key, value in kept.items() if key not in columns}
        self.ignored += [key for key in kept if key in columns]
        return {**taken, **others}


def parse_fields(value: Mapping[str, Any], kinds: Iterable[str] = ()) -> Fields:
    """Read a field mapping in any of the three notations.

    Raises:
        UsageError: ``QC-DATA-028``.
    """
    if not value:
        return Fields()
    if any(key in value for key in (*_FACTORY, *PLACES)):
        return _factory(value, kinds)
    columns: dict[str, str] = {}
    message: dict[str, str] = {}
    roles: dict[str, str] = {}
    media = [name for kind in kinds for name in (kind, f"{kind}s")]
    for key, entry in value.items():
        if key == "roles":
            roles = _roles(entry)
            continue
        if key == "message_property_mappings":
            for ours, theirs in _object(entry, key).items():
                message[_text(theirs, f"{key}.{ours}")] = _text(ours, key)
            continue
        ours = _AXOLOTL.get(key, key).removeprefix("messages[].")
        theirs = _text(entry, key).removeprefix("messages[].")
        if ours in (*_ROW, *media, *_BOTH):
            columns[ours] = theirs
        if ours in (*_MESSAGE, *_BOTH, "train_detail"):
            message[theirs] = ours
        elif ours not in columns:
            known = (*_ROW, *_MESSAGE, *_BOTH, *media, "roles", *_AXOLOTL)
            meant = nearest(key, known)
            raise _wrong(
                key,
                "unknown key of a field mapping",
                expected=", ".join((*_ROW, *_MESSAGE, *_BOTH, *media, "roles")),
                fix=f"did you mean {meant}?" if meant else None,
            )
    return Fields(columns=columns, message=message, roles=roles)


def _factory(value: Mapping[str, Any], kinds: Iterable[str]) -> Fields:
    """An entry of dataset_info.json; columns that it does not name are left out, as there."""
    unknown = [key for key in value if key not in (*_FACTORY, *PLACES)]
    if unknown:
        raise _wrong(unknown[0], "unknown key of a dataset_info.json entry", expected=str(_FACTORY))
    formatting = value.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise _wrong("formatting", "unknown formatting", expected="alpaca, sharegpt or openai")
    given = _object(value.get("columns") or {}, "columns")
    media = [f"{kind}s" for kind in kinds]
    known = ("messages", "history", "system", "tools", *_ALPACA, *media, "audios",
             "chosen", "rejected", "kto_tag")  # fmt: skip
    for key in given:
        if key not in known:
            raise _wrong(f"columns.{key}", "unknown column", expected=", ".join(known))
    if not given:
        given = {"messages": "conversations"} if formatting != "alpaca" else _ALPACA
    # Their names of the parts of an Alpaca row are roles, not keys.
    place = _ALPACA if formatting == "alpaca" else {}
    if formatting == "sharegpt":
        place = {"messages": "conversations"}
    columns = {
        place.get(key, key): _text(theirs, f"columns.{key}")
        for key, theirs in given.items()
        if theirs is not None
    }
    tags = _object(value.get("tags") or {}, "tags")
    message: dict[str, str] = {}
    roles: dict[str, str] = {}
    for key, theirs in tags.items():
        if key in ("role_tag", "content_tag"):
            message[_text(theirs, f"tags.{key}")] = key.removesuffix("_tag")
        elif key in _TAGS:
            roles[_text(theirs, f"tags.{key}")] = _TAGS[key]
        else:
            expected = ", ".join(("role_tag", "content_tag", *_TAGS))
            raise _wrong(f"tags.{key}", "unknown tag", expected=expected)
    ranked = str(value.get("ranking")).lower() == "true" or "kto_tag" in columns
    return Fields(
        format=str(formatting), columns=columns, message=message, roles=roles, only=True,
        ranked=ranked,
    )  # fmt: skip


def _roles(entry: Any) -> dict[str, str]:
    roles = {}
    for ours, theirs in _object(entry, "roles").items():
        if ours not in _ROLES:
            meant = nearest(str(ours), _ROLES)
            fix = f"did you mean {meant}?" if meant else None
            raise _wrong(f"roles.{ours}", "unknown role", expected=", ".join(_ROLES), fix=fix)
        for name in theirs if isinstance(theirs, list | tuple) else [theirs]:
            roles[_text(name, f"roles.{ours}")] = ours
    return roles


def _object(value: Any, at: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise _wrong(at, "is not a mapping", expected="qcore's name: name in the rows")


def _text(value: Any, at: str) -> str:
    if isinstance(value, str) and value:
        return value
    raise _wrong(at, "is not a name", expected="the key in the rows, as a string")


def _wrong(at: str, what: str, *, expected: str, fix: str | None = None) -> UsageError:
    return UsageError("QC-DATA-028", what, field=f"fields.{at}", expected=expected, fix=fix)


Convert = Callable[[dict[str, Any], Reading], dict[str, Any]]

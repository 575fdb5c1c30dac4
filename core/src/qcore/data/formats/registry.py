"""The row formats: core's own and those of plugins; which of them reads a row.

This file decides the order of detection and what a plugin's format may do. Detection is by the keys
of each row, core's formats first; a plugin's format is imported only for a row that none of core's
reads, or by name. A broken plugin does not disturb rows that core reads; a row that it might have
read names it.

Codes: ``QC-DATA-005`` a row that is not an object, ``-023`` no format reads the row, ``-027`` an
unknown format, ``-029`` (a note) columns that are not read; ``QC-PLUGIN-001`` to ``-003`` a
plugin's format that is unusable, raises, or returns something else than a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any, Final, NamedTuple

from ...api.media import RowError
from ...api.records import DataFormat
from ...errors import Failure, PluginError, QcoreError, UsageError, contained, nearest
from ...io.entry_points import DATA_FORMATS, DISABLE, KINDS, Entry, Status, entries, usable
from ..tool_fields import mapping
from . import chat, pairs
from .reading import Convert, Fields, Reading, parse_fields
from .refused import refuse_preference, refuse_text
from .unread import meaningless


class _Builtin(NamedTuple):
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Convert


IGNORED_COLUMN: Final = "QC-DATA-029"
#: In the order of detection.
_BUILTIN: Mapping[str, _Builtin] = {
    "anthropic": _Builtin(chat.is_anthropic, chat.anthropic),
    "sharegpt": _Builtin(chat.is_sharegpt, chat.sharegpt),
    "openai": _Builtin(chat.is_openai, chat.openai),
    "trl": _Builtin(pairs.is_trl, pairs.trl),
    "alpaca": _Builtin(pairs.is_alpaca, pairs.alpaca),
    "ms-swift": _Builtin(pairs.is_ms_swift, pairs.ms_swift),
}
BUILTIN_NAMES = tuple(_BUILTIN)
_MAPPED = ("axolotl", "llama-factory", "llamafactory", "llama_factory", "dataset_info")
#: What a format is called elsewhere.
_OTHER_NAMES = {
    **dict.fromkeys(("chat", "chatml", "messages", "chat_template", "oai"), "openai"),
    **dict.fromkeys(("swift", "modelscope", "pairs"), "ms-swift"),
    **dict.fromkeys(("prompt-completion", "prompt_completion"), "trl"),
    **dict.fromkeys(("claude", "blocks"), "anthropic"),
}


@dataclass(frozen=True, slots=True)
class Converted:
    """A converted row.

    Attributes:
        format: name of the format that has read it.
        row: the canonical row.
        ignored: keys that were left out, as ``key`` or ``messages[].key``.
    """

    format: str
    row: dict[str, Any]
    ignored: tuple[str, ...] = ()


def load_formats(
    points: Iterable[EntryPoint] | None = None, kinds: Collection[str] = (), unread: str = ""
) -> Formats:
    """The formats of core and of the installed plugins; no plugin is imported yet.

    Args:
        points: entry points that are used instead of the environment's.
        kinds: types of media parts that the run reads, beside those of installed plugins.
        unread: why the run reads no media, for errors.
    """
    found = None if points is None else list(points)
    installed = {entry.name for entry in usable(KINDS, found, gated=False)}
    return Formats(entries(DATA_FORMATS, found), sorted({*installed, *kinds}), unread)


class Formats:
    """Converts rows of any known format to canonical rows.

    Args:
        plugins: entry points of plugins' formats.
        kinds: types of media parts that installed plugins read.
        unread: why no media are read, if there is a reason.

    Attributes:
        names: the formats that ``--format`` accepts, in the order of detection.
        kinds: types of media parts that installed plugins read.
        ignored: how many rows had each key that was left out.
    """

    def __init__(
        self, plugins: Iterable[Entry] = (), kinds: Collection[str] = (), unread: str = ""
    ) -> None:
        self._plugins = {
            entry.name: entry for entry in plugins
            if entry.name not in _BUILTIN and entry.status is not Status.DISABLED
        }  # fmt: skip
        self._loaded: dict[str, DataFormat | PluginError] = {}
        self.kinds, self._unread = tuple(kinds), unread
        self._parsed: tuple[Mapping[str, Any], Fields] = ({}, Fields())
        self.names = (*_BUILTIN, *sorted(self._plugins))
        self.ignored: Counter[str] = Counter()

    def check(self, forced: str = "", fields: Mapping[str, Any] | None = None) -> None:
        """Check a format's name and a field mapping before a row is read.

        Raises:
            UsageError: ``QC-DATA-027`` unknown format, ``-028`` invalid field mapping.
            PluginError: ``QC-PLUGIN-001`` a plugin's format that cannot be used.
        """
        self._fields(fields or {})
        if forced and forced not in self.names:
            raise UsageError(
                "QC-DATA-027",
                "unknown row format",
                field="format",
                found=forced,
                expected=", ".join(self.names),
                fix=_name_fix(forced, self.names),
            )
        if forced in self._plugins:
            self._plugin(forced)

    def convert(
        self,
        value: Any,
        *,
        forced: str = "",
        fields: Mapping[str, Any] | None = None,
        ignore: Collection[str] = (),
    ) -> tuple[str, dict[str, Any]]:
        """Name of the format and canonical row; see `read`. Counts `ignored`."""
        read = self.read(value, forced=forced, fields=fields, ignore=ignore)
        if read.ignored:
            self.ignored.update(set(read.ignored))
        return read.format, read.row

    def read(
        self,
        value: Any,
        *,
        forced: str = "",
        fields: Mapping[str, Any] | None = None,
        ignore: Collection[str] = (),
    ) -> Converted:
        """Convert one row.

        Args:
            value: the JSON value of the record; not mutated, but the result may share parts of it.
            forced: name of a format; empty: detected by the row's keys.
            fields: field mapping of the source.
            ignore: keys that are passed over, as ``key`` or ``messages[].key``.

        Raises:
            RowError: the row is refused.
            UsageError: ``QC-DATA-027`` or ``-028``.
            PluginError: ``QC-PLUGIN-001`` to ``-003``.
        """
        if forced:
            self.check(forced, fields)
        row = mapping(value, "", "QC-DATA-005", "is not an object")
        parsed = self._fields(fields) if fields else Fields()
        reading = Reading(
            kinds=self.kinds, unread=self._unread, fields=parsed, ignore=frozenset(ignore)
        )
        if parsed.columns or ignore:
            row = reading.renamed(row)
        name = forced or parsed.format
        if name in self._plugins:
            return Converted(name, self._converted(name, row))
        refuse_preference(row, reading)
        if name:
            return self._forced(name, row, reading) if forced else self._read(name, row, reading)
        for builtin, known in _BUILTIN.items():
            if known.matches(row):
                return self._read(builtin, row, reading)
        return self._by_plugin(row)

    def _forced(self, name: str, row: dict[str, Any], reading: Reading) -> Converted:
        """Read a row in the format that the user named; an error says if its keys are another's."""
        try:
            return self._read(name, row, reading)
        except RowError as bad:
            found = next((one for one, known in _BUILTIN.items() if known.matches(row)), name)
            if found != name and not _BUILTIN[name].matches(row):
                bad.fix = f"leave the format out: the row has the keys of {found}"
            raise

    def _read(self, name: str, row: dict[str, Any], reading: Reading) -> Converted:
        done = _BUILTIN[name].convert(row, reading)
        return Converted(name, done, tuple(reading.ignored))

    def _fields(self, fields: Mapping[str, Any]) -> Fields:
        """The parsed mapping; all rows of a source hand over the same object."""
        if fields is not self._parsed[0]:
            self._parsed = (fields, parse_fields(fields, self.kinds))
        return self._parsed[1]

    def notes(self) -> list[tuple[str, str]]:
        """Each key that was left out, with a statement for the report (code `IGNORED_COLUMN`)."""
        return [
            (key, f"{key} is not read ({count} row{'s' if count > 1 else ''})")
            for key, count in sorted(self.ignored.items())
        ]

    # Formats of plugins.

    def _by_plugin(self, row: dict[str, Any]) -> Converted:
        broken = []
        for name in sorted(self._plugins):
            try:
                chosen = self._plugin(name)
            except PluginError as error:
                broken.append(error.message)
                continue
            if self._called(name, "matches", partial(chosen.matches, row)):
                return Converted(name, self._converted(name, row))
        refuse_text(row)
        _refuse_empty(row)
        keys = ", ".join(list(row)[:12])
        raise RowError(
            "QC-DATA-023",
            "has no keys of a known row format" if row else "is empty",
            found=f"{keys}; {'; '.join(broken)}" if broken else keys or None,
            expected="messages, conversations, prompt and completion, or instruction and output",
            fix=_rename_fix(row),
        )

    def _plugin(self, name: str) -> DataFormat:
        """A plugin's format, imported once.

        Raises:
            PluginError: ``QC-PLUGIN-001``.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(self._plugins[name])
        loaded = self._loaded[name]
        if isinstance(loaded, PluginError):
            raise loaded
        return loaded

    def _load(self, entry: Entry) -> DataFormat | PluginError:
        if entry.status is not Status.AVAILABLE:
            return _unusable(entry, f"is {entry.status.value}", entry.reason)

        def load() -> Any:
            module, _, attribute = entry.value.partition(":")
            return getattr(import_module(module), attribute or "FORMAT")

        found = contained(load)
        if isinstance(found, Failure):
            return _unusable(entry, "cannot be imported", found)
        if not isinstance(found, DataFormat):
            return _unusable(entry, "is not a DataFormat", type(found).__name__)
        if found.name != entry.name:
            return _unusable(entry, "has another name than its entry point", repr(found.name))
        return found

    def _converted(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        done = self._called(name, "convert", partial(self._plugin(name).convert, row))
        if isinstance(done, dict) and isinstance(done.get("messages"), list):
            return done
        raise PluginError(
            "QC-PLUGIN-003",
            f"{_named(self._plugins[name])} returned something else than a canonical row",
            found=type(done).__name__ if not isinstance(done, dict) else ", ".join(map(str, done)),
            expected='{"messages": [...], ...}',
            fix=_remedy(self._plugins[name]),
        )

    def _called(self, name: str, what: str, call: Callable[[], Any]) -> Any:
        found = contained(call)
        if not isinstance(found, Failure):
            return found
        if isinstance(found.error, QcoreError) or (
            what == "convert" and isinstance(found.error, RowError)
        ):
            raise found.error
        raise PluginError(
            "QC-PLUGIN-002",
            f"{_named(self._plugins[name])} failed in {what}",
            found=found,
            fix=_remedy(self._plugins[name]),
        ) from found.error


#: Keys without whose value a row of these formats has no conversation.
_TURN_KEYS: Final = (
    "messages", "conversations", "completion", "output", "response", "prompt", "instruction",
    "query",
)  # fmt: skip


def _name_fix(name: str, known: Collection[str]) -> str:
    """What to write in place of an unknown format."""
    if name.lower() in _MAPPED:
        return "name no format: its rows are read by their keys, or with fields in a mix file"
    meant = _OTHER_NAMES.get(name.lower()) or nearest(name, known)
    return f"did you mean {meant}?" if meant else "name no format: rows are read by their keys"


def _refuse_empty(row: Mapping[str, Any]) -> None:
    """Refuse a row whose keys are known, and one of them is empty."""
    empty = next((key for key in _TURN_KEYS if key in row and not row[key]), None)
    if empty is not None:
        raise RowError(
            "QC-DATA-010",
            "is empty",
            at=empty,
            expected="the messages, or the text of a turn",
            fix="write what is missing, or remove the row",
        )


def _rename_fix(row: Mapping[str, Any]) -> str:
    """A mapping that would make the row readable, or the closest key."""
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        return 'write the messages of a conversation as one row: {"messages": [...]}'
    for answer, prompt in (("completion", "prompt"), ("output", "instruction")):
        if not meaningless(row.get(answer)) and prompt not in row:
            return f"add a {prompt}, or name its column in a mix file: fields: {{{prompt}: <key>}}"
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f"fields: {{messages: {key}}} in a mix file"
        if (meant := nearest(key.lower(), ("messages", "conversations"), cutoff=0.75)) is not None:
            return f"fields: {{{meant}: {key}}} in a mix file"
    return "name the columns in a mix file: fields: {prompt: <key>, completion: <key>}"


def _named(entry: Entry) -> str:
    return f"row format '{entry.name}' of {entry.identity.distribution} {entry.identity.version}"


def _remedy(entry: Entry) -> str:
    return (
        f"update or uninstall {entry.identity.distribution}, "
        f"or leave it out with {DISABLE}={entry.identity.distribution}"
    )


def _unusable(entry: Entry, what: str, found: object) -> PluginError:
    return PluginError(
        "QC-PLUGIN-001",
        f"{_named(entry)} {what}",
        field=entry.value,
        found=found,
        fix=_remedy(entry),
    )

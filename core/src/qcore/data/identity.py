"""The identity of the tokens of a run: by name, everything that decides which tokens its rows give.

This file decides the values of the fields that `qcore.checkpoint.identity.TOKENS` lists: what of a
source decides its rows, and which plugins and libraries act on them. The content of the data files
is bound by `qcore.data.store.stamps`. What divides the samples afterwards (``eval_fraction``,
``seed``) is not part of it, except for the choice of a source's ``weight`` or ``count``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..api.views import CheckpointView
from ..checkpoint.identity import TOKENS, Identity, bind, code_of, token_files, versions_of
from ..io.entry_points import DATA_FORMATS, KINDS, usable
from ..io.version import __version__

if TYPE_CHECKING:
    from ..api.media import MediaReader
    from ..api.records import ChatFormat
    from ..checkpoint.chat_template import Template
    from .rendering.renderer import Options
    from .sources.source import Source

_LIBRARIES: Final = (
    "datasets", "jinja2", "numpy", "pyarrow", "tokenizers", "transformers", "zstandard",
)  # fmt: skip
#: What a source only reports.
_REPORTED: Final = frozenset(("mix", "notes"))


def data_identity(
    sources: Sequence[Source],
    eval_sources: Sequence[Source],
    checkpoint: CheckpointView,
    template: Template,
    chat_format: ChatFormat,
    options: Options,
) -> Identity | None:
    """The identity of some rows for a model; ``None`` if code that acts cannot be read.

    Args:
        sources: the training sources, in order.
        eval_sources: the sources that are only evaluated.
        checkpoint: provides the files of the model.
        template: its chat template.
        chat_format: the format of rendered conversations.
        options: what the run asks of its rows.

    Raises:
        InputError: ``QC-READ-001`` a file of the model cannot be read.
    """
    code = code_of(("qcore", *_modules(chat_format, options.reader)))
    if None in code.values():
        return None
    policies = options.policies
    tree = {
        "qcore": __version__,
        "sources": [_source(source) for source in sources],
        "eval_sources": [_source(source) for source in eval_sources],
        "template": template.sha256,
        "model": token_files(checkpoint),
        "chat_format": {f.name: _plain(getattr(chat_format, f.name)) for f in fields(chat_format)},
        "policies": {f.name: getattr(policies, f.name) for f in fields(policies)},
        "max_length": options.max_length,
        "chat_template_kwargs": _plain(dict(options.variables)),
        "special_tokens": dict(options.special),
        "reader": _reader(options.reader),
        "media_kinds": sorted({entry.name for entry in usable(KINDS, gated=False)}),
        "code": code,
        "versions": versions_of(_LIBRARIES),
    }
    return bind(TOKENS, tree)


def _source(source: Source) -> dict[str, Any]:
    """What decides the rows of a source."""
    names = [f.name for f in fields(source) if f.name not in _REPORTED]
    values = {name: _plain(getattr(source, name)) for name in names}
    return {**values, "files": [str(path.absolute()) for path in source.files]}


def _modules(chat_format: ChatFormat, reader: MediaReader | None) -> Iterator[str]:
    """Modules of the plugins whose code acts on rows."""
    for f in fields(chat_format):
        if callable(value := getattr(chat_format, f.name)):
            yield _name(value)
    if reader is not None:
        yield _name(type(reader))
    for entry in usable(DATA_FORMATS, gated=False):
        yield entry.value


def _reader(reader: MediaReader | None) -> dict[str, Any] | None:
    if reader is None:
        return None
    return {
        "class": _name(type(reader)),
        "kinds": list(reader.kinds),
        "keys": list(reader.keys),
        "control": list(reader.control),
    }


def _plain(value: Any) -> Any:
    """A value as JSON; a callable by its name, whose code is bound by that of its package."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return _name(value) if callable(value) else value


def _name(value: Callable[..., Any]) -> str:
    """Module and name of a function or a class; of an object, those of its class."""
    while isinstance(value, functools.partial):
        value = value.func
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"

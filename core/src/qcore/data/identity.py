"""The identity of the tokens of a run: by name, everything that decides which tokens its rows give.

This file decides what is bound: the sources (their files by path), the files of the model that the
rows' text passes through (template, tokenizer, config, processors), the chat format, the policies
and the other settings of the rows, the code of core and of the plugins that act, and the versions
of the libraries that render, tokenize and decode. The content of the data files is bound by
`qcore.data.store.stamps`. What divides the samples afterwards (``eval_fraction``, ``seed``) is not
part of it, except for the choice of a source's ``weight`` or ``count``.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..api.views import CheckpointView
from ..io.atomic import reading
from ..io.entry_points import DATA_FORMATS, KINDS, usable
from ..io.source_digest import package_digest
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
#: Files of a model folder that have no part in the tokens of a row.
_WITHOUT: Final = frozenset(("generation_config.json", "MANIFEST.json"))


@dataclass(frozen=True, slots=True)
class Identity:
    """What decides the tokens of a run's rows.

    Attributes:
        values: by the name of what is bound, ``policies.turns``; JSON values.
    """

    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Hex digest of all values."""
        text = json.dumps(self.values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differing(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Names whose values differ from those of another identity, in the order of the names."""
        names = sorted({*self.values, *values})
        return tuple(name for name in names if self.values.get(name) != values.get(name))


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
    packages = {"qcore", *_packages(chat_format, options.reader)}
    code = {package: package_digest(package) for package in packages}
    if None in code.values():
        return None
    policies = options.policies
    tree = {
        "qcore": __version__,
        "sources": [_source(source) for source in sources],
        "eval_sources": [_source(source) for source in eval_sources],
        "template": template.sha256,
        "model": dict(_model_files(checkpoint)),
        "chat_format": {f.name: _plain(getattr(chat_format, f.name)) for f in fields(chat_format)},
        "policies": {f.name: getattr(policies, f.name) for f in fields(policies)},
        "max_length": options.max_length,
        "chat_template_kwargs": _plain(dict(options.variables)),
        "special_tokens": dict(options.special),
        "reader": _reader(options.reader),
        "media_kinds": sorted({entry.name for entry in usable(KINDS, gated=False)}),
        "code": code,
        "versions": {name: _version(name) for name in _LIBRARIES},
    }
    # As JSON has them: a tuple is a list, and True is not 1.
    values: dict[str, Any] = json.loads(json.dumps(dict(_flat(tree))))
    return Identity(values)


def _source(source: Source) -> dict[str, Any]:
    """What decides the rows of a source."""
    names = [f.name for f in fields(source) if f.name not in _REPORTED]
    values = {name: _plain(getattr(source, name)) for name in names}
    return {**values, "files": [str(path.absolute()) for path in source.files]}


def _model_files(checkpoint: CheckpointView) -> Iterator[tuple[str, str]]:
    """Digest of each file of the model folder that may decide tokens."""
    for name in checkpoint.sidecars:
        if name.endswith((".json", ".jinja")) and name not in _WITHOUT:
            path = checkpoint.file(name)
            with reading(path):
                yield name, hashlib.sha256(path.read_bytes()).hexdigest()


def _packages(chat_format: ChatFormat, reader: MediaReader | None) -> Iterator[str]:
    """Top-level packages whose code acts on rows, beside core's."""
    for f in fields(chat_format):
        if callable(value := getattr(chat_format, f.name)):
            yield _name(value).partition(".")[0]
    if reader is not None:
        yield _name(type(reader)).partition(".")[0]
    for entry in usable(DATA_FORMATS, gated=False):
        yield entry.value.partition(":")[0].partition(".")[0]


def _reader(reader: MediaReader | None) -> dict[str, Any] | None:
    if reader is None:
        return None
    return {
        "class": _name(type(reader)),
        "kinds": list(reader.kinds),
        "keys": list(reader.keys),
        "control": list(reader.control),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


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


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted names; of a list, by the number of the element where it holds mappings."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(at): one for at, one in enumerate(value, 1)}
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value

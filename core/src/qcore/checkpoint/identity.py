"""Identity: by name, every field that decides a result, for each kind of result that is reused.

This file decides which fields bind a run (`RUN`, for ``--resume``), the stored tokens of rows
(`TOKENS`) and an adapter (`ADAPTER`, for merge, generate and ``--init-adapter``), how a field is
written as flat JSON values, and which fields of two identities differ. It also reads the fields
that several of them share: files of a model folder, config.json, code and versions. The others come
from `qcore.data.identity`, `qcore.training.resume` and `qcore.adapter.bound_base`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from ..io.atomic import reading
from ..io.source_digest import package_digest

if TYPE_CHECKING:
    from ..api.views import CheckpointView

#: Fields of a run. The order is that in which a changed field is named: causes before effects.
RUN: Final[Mapping[str, str]] = {
    "base": "SHA-256 of the base's tensors, by part",
    "qcore": "version of qcore",
    "torch": "version of torch",
    "plugins": "version of each loaded plugin",
    "versions": "version of each other library that computes",
    "config": "config.json of the base",
    "template": "SHA-256 of the chat template",
    "files": "SHA-256 of each tokenizer and processor file",
    "code": "SHA-256 of the Python files of qcore and of each loaded plugin",
    "data": "SHA-256 of the training data",
    "eval_data": "SHA-256 of the evaluation data",
    "media": "SHA-256 of all media",
    "init_adapter": "SHA-256 of the adapter that the run started from",
    "settings": "every setting that computes, with template variables and policies for rows",
    "samples": "SHA-256 of the training samples: token ids, labels, order",
    "eval_samples": "SHA-256 of the evaluation samples",
    "device": "cpu or cuda",
    "kernels": "backend of each op",
}
#: Fields of the stored tokens of rows. The content of data files is bound by their stamps.
TOKENS: Final[Mapping[str, str]] = {
    "qcore": "version of qcore",
    "sources": "what is read, by path and options",
    "eval_sources": "what is read for evaluation alone",
    "template": "SHA-256 of the chat template",
    "model": "SHA-256 of each JSON and template file of the model folder",
    "chat_format": "the format of rendered conversations",
    "policies": "what becomes of rows, turns and reasoning",
    "max_length": "longest sample in tokens",
    "chat_template_kwargs": "template variables",
    "special_tokens": "special tokens that the template receives",
    "reader": "the reader of media",
    "media_kinds": "kinds of media that installed plugins read",
    "code": "SHA-256 of the Python files of qcore and of each plugin that acts on rows",
    "versions": "version of each library that reads, renders and tokenizes",
}
#: Fields of an adapter's base.
ADAPTER: Final[Mapping[str, str]] = {
    "base": "SHA-256 of the base's tensors, by part",
    "config": "config.json of the base, as far as the computation reads it",
}
#: Files of a model folder, beside config.json and weights, that a run reads.
RUN_FILES: Final = (
    "tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*processor_config.json",
)  # fmt: skip
#: Keys of config.json that record who saved the file, and are not bound.
_PROVENANCE: Final = frozenset(("_name_or_path", "transformers_version"))
#: Files of a model folder that have no part in the tokens of a row.
_WITHOUT_TOKENS: Final = frozenset(("generation_config.json", "MANIFEST.json"))


@dataclass(frozen=True, slots=True)
class Identity:
    """The fields that decide a result.

    Attributes:
        values: JSON values by dotted name: ``policies.turns``.
    """

    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Hex digest of all values."""
        text = json.dumps(self.values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differing(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names whose values differ from those of another identity.

        The order is that of the fields; within a field, that of the values.

        Args:
            values: those of the other identity.
        """
        sections = list(dict.fromkeys(name.partition(".")[0] for name in (*self.values, *values)))
        names = dict.fromkeys((*self.values, *values))
        changed = [name for name in names if not same(self.values.get(name), values.get(name))]
        return tuple(sorted(changed, key=lambda name: sections.index(name.partition(".")[0])))


def bind(binding: Mapping[str, str], fields: Mapping[str, Any]) -> Identity:
    """Return the identity of a result.

    Args:
        binding: `RUN`, `TOKENS` or `ADAPTER`.
        fields: values by field. A field that is absent is not bound.

    Raises:
        ValueError: a field that the binding does not list.
    """
    return Identity(flat(ordered(binding, fields)))


def ordered(binding: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields in the order of a binding, for manifests.

    Args:
        binding: as of `bind`.
        fields: values by field.

    Raises:
        ValueError: a field that the binding does not list.
    """
    if unlisted := sorted({*fields} - {*binding}):
        raise ValueError(f"{', '.join(unlisted)} is not a field of this identity")
    return {name: fields[name] for name in binding if name in fields}


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of nested mappings by dotted names, as JSON has them.

    A list of mappings counts as a mapping by position, from 1. A tuple becomes a list.

    Args:
        tree: values of JSON types.
    """
    values: dict[str, Any] = json.loads(json.dumps(dict(_flat(tree))))
    return values


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            value = {str(at): one for at, one in enumerate(value, 1)}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; in Python True equals 1, in a chat template it does not.

    Args:
        one: a value.
        other: another value.
    """
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without the keys that record who saved the file."""
    return {
        key: config_of(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _PROVENANCE
    }


def token_files(checkpoint: CheckpointView) -> dict[str, str]:
    """Return the SHA-256 of each file of a model folder that may decide tokens.

    A plugin's reader may read any of them, so these are all JSON and template files.

    Raises:
        InputError: ``QC-READ-001`` a file cannot be read.
    """
    names = [name for name in checkpoint.sidecars if name.endswith((".json", ".jinja"))]
    return _digests(checkpoint, [name for name in names if name not in _WITHOUT_TOKENS])


def run_files(checkpoint: CheckpointView) -> dict[str, str]:
    """Return the SHA-256 of each tokenizer and processor file of a model folder.

    Raises:
        InputError: ``QC-READ-001`` a file cannot be read.
    """
    names = checkpoint.sidecars
    return _digests(checkpoint, [n for n in names if any(fnmatch(n, each) for each in RUN_FILES)])


def _digests(checkpoint: CheckpointView, names: Sequence[str]) -> dict[str, str]:
    digests = {}
    for name in names:
        path = checkpoint.file(name)
        with reading(path), path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def code_of(modules: Iterable[str]) -> dict[str, str | None]:
    """Return the SHA-256 of the Python files of packages; ``None`` if they cannot be read.

    Args:
        modules: names of modules; the top-level package of each is bound.
    """
    packages = sorted({module.partition(":")[0].partition(".")[0] for module in modules})
    return {package: package_digest(package) for package in packages}


def versions_of(distributions: Collection[str]) -> dict[str, str | None]:
    """Return the versions of distributions; ``None`` for one that is not installed."""
    return {name: _version(name) for name in distributions}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None

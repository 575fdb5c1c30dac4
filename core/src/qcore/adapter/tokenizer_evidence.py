"""Compares the tokenizer and chat template that an adapter folder brings with those of its base.

Trainers save both beside an adapter. If they are not those of the base, the adapter was trained on
other tokens than the base's files give, so the merge or the answer is not what was trained. This
file decides what counts as a difference: tokens and their ids, how text is split, the tokens that
begin and end text, and the text of the template. Padding, truncation and offsets do not count,
because a re-save changes them and no id depends on them. A file that cannot be read is reported.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.tokenizer import load_tokenizer
from ..checkpoint.tokenizer_files import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    TokenizerFiles,
    named_templates,
    optional_json,
    read_tokens,
)
from ..data.rendering.template_kwargs import special_tokens
from ..errors import InputError

#: Parts of tokenizer.json that decide how text becomes ids, beside the vocabulary.
_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
#: Special tokens with an effect on what is rendered, encoded or generated.
_SPECIAL = ("bos_token", "eos_token")
_SHOWN = 4  # tokens that a line names


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerDifference:
    """How the tokenizer and template of an adapter folder differ from those of its base.

    Attributes:
        adapter: files of the adapter folder.
        base: files of the base.
        added: ids of the tokens that the base's tokenizer lacks.
        missing: ids of the tokens that the adapter's tokenizer lacks.
        moved: ids, the adapter's and the base's, of the tokens whose ids differ.
        sections: parts of tokenizer.json that differ.
        special: special tokens, the adapter's and the base's, by name, where they differ.
        template: SHA-256 of the adapter's and of the base's template, if they differ.
        template_name: name of that template in a list of several; empty for the default.
        problems: files that could not be compared, and why.
    """

    adapter: TokenizerFiles
    base: TokenizerFiles
    added: Mapping[str, int] = field(default_factory=dict)
    missing: Mapping[str, int] = field(default_factory=dict)
    moved: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    special: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    template: tuple[str, str] | None = None
    template_name: str = ""
    problems: tuple[str, ...] = ()

    @property
    def tokens(self) -> bool:
        """Whether text becomes other ids."""
        return bool(self.added or self.missing or self.moved or self.sections)

    def lines(self) -> Iterator[str]:
        """Yield one warning for each file that differs."""
        if facts := list(self._facts()):
            yield (
                f"warning: the adapter brings {self.adapter.path / TOKENIZER}, which differs from "
                f"{self.base.path / TOKENIZER}: {'; '.join(facts)}"
            )
        for name, (mine, theirs) in self.special.items():
            yield (
                f"warning: {name} is {mine} in {self.adapter.path / TOKENIZER_CONFIG} and {theirs} "
                f"in {self.base.path / TOKENIZER_CONFIG}"
            )
        if self.template is not None:
            mine, theirs = self.template
            named = f" '{self.template_name}'" if self.template_name else ""
            yield (
                f"warning: the adapter was trained under another chat template{named} (sha256 "
                f"{mine[:12]}) than the checkpoint has ({theirs[:12] or 'none'}): conversations "
                f"render differently; compare {_template_file(self.adapter)} with "
                f"{_template_file(self.base)}"
            )
        for problem in self.problems:
            yield f"warning: the adapter's tokenizer files are not compared: {problem}"

    def _facts(self) -> Iterator[str]:
        """Yield what differs in tokenizer.json."""
        if self.added:
            yield f"{_count(self.added)} that the base's lacks ({_listed(self.added)})"
        if self.missing:
            yield f"{_count(self.missing)} of the base's missing ({_listed(self.missing)})"
        if self.moved:
            ids = {token: f"{mine}, not {theirs}" for token, (mine, theirs) in self.moved.items()}
            yield f"{_count(self.moved)} with another id ({_listed(ids)})"
        if self.sections:
            yield f"another {' and '.join(self.sections)}"


def _count(tokens: Mapping[str, object]) -> str:
    return f"{len(tokens)} token{'s' if len(tokens) != 1 else ''}"


def _listed(tokens: Mapping[str, object]) -> str:
    """Return the first tokens with their ids."""
    shown = [f"{token!r} {number}" for token, number in list(tokens.items())[:_SHOWN]]
    return ", ".join(shown + (["..."] if len(tokens) > _SHOWN else []))


def _template_file(files: TokenizerFiles) -> str:
    named = named_templates(files)
    return next(iter(named.values())).source if named else str(files.path)


def compare_tokenizers(adapter: Path, base: Path) -> TokenizerDifference | None:
    """Compare the tokenizer and template files of an adapter folder with those of its base.

    Args:
        adapter: the adapter folder; files that it lacks are not compared.
        base: the folder of the base.

    Returns:
        The differences; ``None`` if there are none.
    """
    mine, theirs = TokenizerFiles.of(adapter), TokenizerFiles.of(base)
    facts: dict[str, Any] = {}
    problems = []
    for compare in (_tokens, _specials, _templates):
        try:
            facts |= compare(mine, theirs)
        except InputError as error:
            problems.append(error.message)
    facts = {name: value for name, value in facts.items() if value}
    if not facts and not problems:
        return None
    return TokenizerDifference(adapter=mine, base=theirs, problems=tuple(problems), **facts)


def _tokens(mine: TokenizerFiles, theirs: TokenizerFiles) -> dict[str, Any]:
    """Compare the tokenizers: tokenizer.json, or added_tokens.json where the adapter has no other.

    Raises:
        InputError: a file cannot be read.
    """
    if TOKENIZER not in mine.sidecars:
        return _added_tokens_file(mine, theirs)
    if TOKENIZER in theirs.sidecars and filecmp.cmp(
        mine.file(TOKENIZER), theirs.file(TOKENIZER), shallow=False
    ):
        return {}
    ids, content = read_tokens(mine)
    if TOKENIZER not in theirs.sidecars:
        return {"added": ids}
    base_ids, base_content = read_tokens(theirs)
    sections = _different_sections(content, base_content)
    if sections:  # the fields of one may be absent in the other, with the same meaning
        sections = _different_sections(_canonical(mine), _canonical(theirs))
    return {**_different_ids(ids, base_ids), "sections": tuple(sections)}


def _added_tokens_file(mine: TokenizerFiles, theirs: TokenizerFiles) -> dict[str, Any]:
    """Compare added_tokens.json, which tokenizers without tokenizer.json have, with the base."""
    name = "added_tokens.json"
    if name not in mine.sidecars or TOKENIZER not in theirs.sidecars:
        return {}
    added = {t: i for t, i in optional_json(mine, name).items() if type(i) is int}
    base_ids, _ = read_tokens(theirs)
    return {
        key: value for key, value in _different_ids(added, base_ids).items() if key != "missing"
    }


def _different_ids(ids: Mapping[str, int], base_ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "added": _sorted({t: i for t, i in ids.items() if t not in base_ids}),
        "missing": _sorted({t: i for t, i in base_ids.items() if t not in ids}),
        "moved": {t: (i, base_ids[t]) for t, i in ids.items() if base_ids.get(t, i) != i},
    }


def _sorted(tokens: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(tokens.items(), key=lambda item: item[1]))


def _different_sections(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the parts of two tokenizer.json files that differ in meaning, tokens left out."""
    found = [name for name in _SECTIONS if _section(one, name) != _section(other, name)]
    flags = [_flags(content) for content in (one, other)]
    if any(flags[0][token] != flags[1][token] for token in flags[0].keys() & flags[1].keys()):
        found.append("flags of added tokens")
    return found


def _section(content: Mapping[str, Any], name: str) -> Any:
    """Return a part of tokenizer.json as far as it has an effect on ids."""
    part = content.get(name)
    if name == "post_processor" and isinstance(part, dict) and part.get("type") == "ByteLevel":
        return None  # it moves offsets alone
    return _plain(part)


def _flags(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of each added token, such as ``lstrip``, without its id."""
    return {
        token["content"]: _plain({key: flag for key, flag in token.items() if key != "id"})
        for token in content.get("added_tokens") or []
    }


def _plain(value: Any) -> Any:
    """Return a part of tokenizer.json without what has no effect on ids.

    Fields that are off, offsets and the vocabulary are left out; merges are pairs.
    """
    if isinstance(value, dict):
        return {
            key: [pair if isinstance(pair, str) else " ".join(pair) for pair in part]
            if key == "merges"
            else _plain(part)
            for key, part in value.items()
            if key not in ("trim_offsets", "vocab") and part not in (None, False, "")
        }
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _canonical(files: TokenizerFiles) -> dict[str, Any]:
    """Return tokenizer.json as this version of the tokenizers library writes it.

    Raises:
        InputError: ``QC-TOKENIZER-001`` it is not a tokenizer.
    """
    content: dict[str, Any] = json.loads(load_tokenizer(files).to_str())
    return content


def _specials(mine: TokenizerFiles, theirs: TokenizerFiles) -> dict[str, Any]:
    """Compare the special tokens that tokenizer_config.json names."""
    if not mine.tokenizer_config:
        return {}
    named, base_named = (special_tokens(files.tokenizer_config) for files in (mine, theirs))
    return {
        "special": {
            name: (named.get(name, "not set"), base_named.get(name, "not set"))
            for name in _SPECIAL
            if named.get(name) != base_named.get(name)
        }
    }


def _templates(mine: TokenizerFiles, theirs: TokenizerFiles) -> dict[str, Any]:
    """Compare the chat templates by SHA-256; the first name that differs is reported."""
    own = named_templates(theirs)
    for name, template in named_templates(mine).items():
        # As in transformers, the default applies where the named template is missing.
        other = own.get(name) or own.get("default")
        hashes = template.sha256, other.sha256 if other else ""
        if hashes[0] != hashes[1]:
            return {"template": hashes, "template_name": "" if name == "default" else name}
    return {}

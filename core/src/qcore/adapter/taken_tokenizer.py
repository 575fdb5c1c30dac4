"""``--take-tokenizer``: a run uses the tokenizer and chat template that the adapter brings.

This file decides which files of the base are replaced and which are left out, because they would
contradict the adapter's: transformers prefers chat_template.jinja to tokenizer_config.json, and a
special_tokens_map.json or vocab.json of the base describes the base's tokenizer. The tokens of the
adapter must have rows in the embedding. Nothing else of the base changes: generation_config.json
stays. A merge writes the files, `qcore generate` reads them.

Codes: ``QC-MERGE-010`` the adapter brings no tokenizer and no template, ``-011`` its template
contradicts the generation of the base; ``QC-PRE-002`` a token has no row, ``-003`` a token of the
chat format is missing.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.chat_template import Template
from ..checkpoint.json_text import without
from ..checkpoint.tokenizer import load_tokenizer
from ..checkpoint.tokenizer_files import (
    COMPANIONS,
    LEGACY_TEMPLATE,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TokenizerFiles,
    named_templates,
    read_tokens,
)
from ..data.rendering.template_kwargs import special_tokens
from ..data.rendering.tokenizer_check import id_beyond, unknown_tokens
from ..errors import InputError, QcoreError, UsageError, raise_all
from ..io.manifest import MANIFEST
from ..plugins.resolve_model import Identified, identify_files

#: Files of a byte-pair tokenizer that hold what tokenizer.json holds, without added tokens.
_VOCABULARY = ("vocab.json", "merges.txt")
_CONFIG = "config.json"
_FIX = "leave out --take-tokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenTokenizer:
    """What a run takes from the adapter folder.

    Attributes:
        files: files of the adapter folder, by name in a model folder.
        texts: files that are written anew, by name.
        dropped: files of the base that must not be read with these.
        template: the chat template of the run; ``None`` if it has none.
        ids: ids of the tokens.
        tokenizer_config: content of tokenizer_config.json of the run.
    """

    files: Mapping[str, Path]
    texts: Mapping[str, str]
    dropped: frozenset[str]
    template: Template | None
    ids: Mapping[str, int]
    tokenizer_config: Mapping[str, Any]

    def read_by(self, base: Identified) -> Identified:
        """Return the base of a run that reads these files in place of the base's."""
        checkpoint = base.checkpoint.with_files(self.files, self.dropped, self.template)
        return replace(base, checkpoint=checkpoint)

    def as_json(self) -> dict[str, Any]:
        """What the manifest of the output records."""
        return {
            "files": sorted({*self.files, *self.texts}),
            "dropped": sorted(self.dropped),
            "template_sha256": self.template.sha256 if self.template else None,
        }


def plan_tokenizer(base: Identified, folder: Path) -> TakenTokenizer:
    """Plan the tokenizer files of a run that takes those of the adapter.

    Args:
        base: the base.
        folder: the adapter folder.

    Raises:
        UsageError: ``QC-MERGE-010``.
        InputError: ``QC-MERGE-011`` the template contradicts the generation; ``QC-PRE-002`` a token
            has no row in the base, ``-003`` a token that the chat format needs is missing; a file
            cannot be read, or the template does not parse.
    """
    mine, theirs = TokenizerFiles.of(folder), TokenizerFiles.of(base.checkpoint.path)
    if len(named := named_templates(mine)) > 1 and mine.template is None:
        raise InputError(
            "QC-MERGE-011",
            "names several chat templates, and a run takes one",
            file=next(iter(named.values())).source,
            field="chat_template",
            found=", ".join(named),
            expected="one template",
            fix=f"save the one that training used as {TEMPLATE} in the adapter folder",
        )
    if TOKENIZER not in mine.sidecars and mine.template is None:
        raise UsageError(
            "QC-MERGE-010",
            "has no effect: the adapter brings no tokenizer.json and no chat template",
            field="--take-tokenizer",
            found=folder,
            expected=f"{TOKENIZER} or {TEMPLATE} in the adapter folder",
            fix=_FIX,
        )
    takes_tokens = TOKENIZER in mine.sidecars
    files, dropped = _token_files(mine, theirs) if takes_tokens else ({}, set())
    texts = {}
    template = mine.template or theirs.template
    if template is not None and (mine.template is not None or TOKENIZER_CONFIG in files):
        texts[TEMPLATE] = template.text
        dropped |= {LEGACY_TEMPLATE} & theirs.sidecars
        if TOKENIZER_CONFIG in theirs.sidecars and TOKENIZER_CONFIG not in files:
            text = theirs.file(TOKENIZER_CONFIG).read_text(encoding="utf-8")
            if "chat_template" in theirs.tokenizer_config:
                texts[TOKENIZER_CONFIG] = without(text, "chat_template")
    if mine.template is not None:
        _check_template(mine.template)
    ids = _checked_ids(base, mine) if takes_tokens else {}
    taken = TakenTokenizer(
        files=files,
        texts=texts,
        dropped=frozenset(dropped),
        template=template,
        ids=ids,
        tokenizer_config=(mine if TOKENIZER_CONFIG in files else theirs).tokenizer_config,
    )
    if mine.template is not None:
        _check_generation(base, taken)
    return taken


def _token_files(mine: TokenizerFiles, theirs: TokenizerFiles) -> tuple[dict[str, Path], set[str]]:
    """Return the adapter's tokenizer files, and those of the base that contradict them."""
    files = {name: mine.file(name) for name in (TOKENIZER, *COMPANIONS) if name in mine.sidecars}
    stale = set(COMPANIONS) & theirs.sidecars - files.keys() - {TOKENIZER_CONFIG}
    if stale & {*_VOCABULARY} and TOKENIZER in theirs.sidecars:
        models = [read_tokens(each)[1]["model"] for each in (mine, theirs)]
        if models[0].get("vocab") == models[1].get("vocab"):
            stale -= {*_VOCABULARY}
    return files, stale


def _check_template(template: Template) -> None:
    """Raise what makes every rendering fail, such as a syntax error."""
    with template.reopen() as own:
        own.inputs()


def _checked_ids(base: Identified, mine: TokenizerFiles) -> dict[str, int]:
    """Return the ids of the adapter's tokens, each of which has a row in the base.

    Raises:
        InputError: ``QC-PRE-002``, ``-003``, ``QC-TOKENIZER-001``.
    """
    ids: dict[str, int] = load_tokenizer(mine).get_vocab()
    problems: list[QcoreError] = []
    rows = next(tensor.shape[0] for tensor in base.layout.table if tensor.row.group == "embed")
    if (beyond := id_beyond(ids, rows, mine.path)) is not None:
        fix = f"{_FIX}, or name the resized model that training used as the base"
        problems.append(beyond.replace(fix=fix))
    chat = base.chat_format()
    needed = (chat.turn_start, chat.turn_end, *chat.stop_tokens)
    unknown = unknown_tokens(needed, ids.get, file=mine.path / TOKENIZER)
    problems += [error.replace(fix=_FIX) for error in unknown]
    raise_all(problems)
    return ids


def taken_lines(base: Identified, taken: TakenTokenizer) -> Iterator[str]:
    """Yield what the user must know of an output with the adapter's tokenizer.

    Args:
        base: the base.
        taken: what the output takes.
    """
    yield f"taken from the adapter: {', '.join(sorted({*taken.files, *taken.texts}))}"
    for name in sorted(taken.dropped):
        yield f"left out: {name} of the base, which describes the base's tokenizer"
    eos = special_tokens(taken.tokenizer_config).get("eos_token")
    stops = base.checkpoint.generation_config.get("eos_token_id")
    number = taken.ids.get(eos) if eos is not None else None
    if number is not None and stops is not None:
        listed = stops if isinstance(stops, list) else [stops]
        if number not in listed:
            yield (
                f"warning: generation_config.json stops at {listed}, and the adapter's eos_token "
                f"{eos} is {number}: add it to eos_token_id of the output"
            )


def _check_generation(base: Identified, taken: TakenTokenizer) -> None:
    """Refuse a template that contradicts the generation: no verb would open a merge.

    Raises:
        InputError: ``QC-MERGE-011``.
    """
    generation = base.decision.generation.name
    with tempfile.TemporaryDirectory(prefix="qcore-") as folder:
        kept = {name for name in base.checkpoint.sidecars if name.endswith((".json", ".jinja"))}
        for name in {_CONFIG, *kept} - {*taken.files, *taken.texts, *taken.dropped, MANIFEST}:
            shutil.copyfile(base.checkpoint.file(name), Path(folder, name))
        for name, source in taken.files.items():
            shutil.copyfile(source, Path(folder, name))
        for name, text in taken.texts.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        try:
            identify_files(folder, generation=generation)
        except QcoreError as error:
            if not error.code.startswith("QC-DETECT-"):
                raise
            raise InputError(
                "QC-MERGE-011",
                f"contradicts generation {generation} of the base: no verb would read the two "
                "together",
                file=taken.template.source if taken.template is not None else folder,
                found=error.found,
                expected=f"a chat template of generation {generation}",
                fix=_FIX,
            ) from None

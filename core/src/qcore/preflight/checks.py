"""Preflight checks of core (template, tokenizer, settings) and of plugins, reported together.

This file decides the guards that apply to any model: the checkpoint has a chat template, the
tokenizer fits the embedding, the chat format's tokens exist, the settings suit the model
(`qcore.preflight.settings_checks`). Plugins add guards through ``qcore_preflight``. Errors are
raised together; warnings and notes are returned.

A part that config.json describes and the files lack gets one line: that of its owner, if one of
the owner's findings has the part's name as its field, else core's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..api.records import Finding, PreflightRequest, Severity
from ..checkpoint.checkpoint import required_template
from ..config.frozen_map import Plain
from ..config.settings import Settings
from ..data.rendering.tokenizer_check import TOKENIZER, id_beyond, unknown_tokens
from ..errors import InputError, QcoreError, raise_all
from ..plugins.resolve_model import Identified
from .context_length import beyond
from .settings_checks import unsuitable
from .tokenizer_findings import Normalize, tokenizer_findings


def preflight(
    found: Identified,
    *,
    verb: str,
    settings: Settings | None = None,
    template_kwargs: Mapping[str, Plain] | None = None,
    token_ids: Mapping[str, int] | None = None,
    normalize: Normalize | None = None,
) -> tuple[str, ...]:
    """Run the guards of core and of every plugin; raise all errors, return the rest as lines.

    Args:
        found: the model.
        verb: ``train``, ``plan``, ``merge`` or ``generate``.
        settings: those of a training run; ``None`` for other verbs.
        template_kwargs: variables that the chat template is rendered with, where there are no
            settings that say so.
        token_ids: ids by token, where the verb reads text.
        normalize: normalizes text as the tokenizer does, if it does.
    """
    problems, findings = survey(
        found, verb=verb, settings=settings, template_kwargs=template_kwargs, token_ids=token_ids,
        normalize=normalize,
    )  # fmt: skip
    raise_all(problems)
    return tuple(line(finding) for finding in findings)


def survey(
    found: Identified,
    *,
    verb: str,
    settings: Settings | None = None,
    template_kwargs: Mapping[str, Plain] | None = None,
    token_ids: Mapping[str, int] | None = None,
    normalize: Normalize | None = None,
) -> tuple[list[QcoreError], list[Finding]]:
    """Run the guards as `preflight` does, and return the errors and all findings."""
    ids = token_ids or {}
    reads_text = verb in ("train", "generate")
    problems = [] if settings is None else list(unsuitable(found, settings.to_dict()))
    problems += _text(found, ids) if reads_text else ()
    if settings is not None:
        template_kwargs = settings.chat_template_kwargs
    request = PreflightRequest(
        verb=verb,
        checkpoint=found.checkpoint,
        architecture=found.decision.architecture.name,
        generation=found.decision.generation.name,
        layout=found.layout,
        settings=settings,
        template_kwargs=template_kwargs or {},
        token_ids=ids,
    )
    theirs = [finding for _, finding in found.plugins.ask("qcore_preflight", request=request)]
    tokens = tokenizer_findings(found, ids, normalize) if reads_text else ()
    findings = [*_core(found, request), *tokens, *_absent(request, theirs), *theirs]
    return [*problems, *(as_error(f) for f in findings if f.severity is Severity.ERROR)], findings


def as_error(finding: Finding) -> InputError:
    """Convert a finding to an error."""
    return InputError(
        finding.code,
        finding.what,
        file=finding.file,
        field=finding.field,
        found=finding.found,
        expected=finding.expected,
        fix=finding.fix,
    )


def line(finding: Finding) -> str:
    """Format a finding as one line."""
    warning = "warning: " if finding.severity is Severity.WARNING else ""
    text = warning + as_error(finding).message
    return f"{text}. {finding.fix}" if finding.fix else text


def _core(found: Identified, request: PreflightRequest) -> Iterator[Finding]:
    layout, checkpoint = found.layout, found.checkpoint
    for root, count in layout.carried_roots().items():
        yield Finding(
            code="QC-PRE-010",
            severity=Severity.NOTE,
            what=f"{count} tensors belong to no installed plugin and are kept unchanged",
            field=f"{root}.*",
        )
    if found.quantization is not None and request.verb != "merge":  # a merge may keep them
        how = "decoded to bf16" if found.quantization.scales else "used with the values they have"
        yield Finding(
            code="QC-PRE-012",
            severity=Severity.NOTE,
            what=f"{found.quantization.line()}: they are {how}",
            file=str(checkpoint.path),
        )
    length = 0 if request.settings is None else request.settings.max_length
    if (longer := beyond(checkpoint.config, length, "max_length")) is not None:
        yield longer


def _absent(request: PreflightRequest, told: Sequence[Finding]) -> Iterator[Finding]:
    """Notes on absent parts that their owner does not mention."""
    for part in request.layout.absent:
        if part not in [finding.field for finding in told]:
            yield Finding(
                code="QC-PRE-011",
                severity=Severity.NOTE,
                what="config.json claims it, but the checkpoint has none of its tensors",
                field=part,
            )


def _text(found: Identified, ids: Mapping[str, int]) -> Iterator[QcoreError]:
    """Errors of verbs that read text: no template, or a tokenizer that does not fit the model."""
    checkpoint, chat = found.checkpoint, found.chat_format()
    try:
        required_template(checkpoint)
    except InputError as error:
        yield error
    rows = next(tensor.shape[0] for tensor in found.layout.table if tensor.row.group == "embed")
    if (beyond := id_beyond(ids, rows, checkpoint.path)) is not None:
        yield beyond
    needed = (chat.turn_start, chat.turn_end, *chat.stop_tokens)
    yield from unknown_tokens(needed, ids.get, file=checkpoint.path / TOKENIZER)

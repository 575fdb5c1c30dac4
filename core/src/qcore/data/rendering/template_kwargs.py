"""Variables of a chat template: which ones a run may set, and which ones an adapter recorded.

This file decides that a variable must have an effect: one that the template does not read would be
ignored silently, and one that qcore sets itself (``messages``, ``bos_token``) would change the row.
Training records the variables with the adapter and generation uses them again, so both see the
same prompt. `qcore.config.settings` checks the values.

Codes: ``QC-CONFIG-008`` not read by the template, ``-009`` set by qcore itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...checkpoint.chat_template import STANDARD_INPUTS, TOKEN_NAMES
from ...config.frozen_map import Entries, Plain
from ...config.settings import SPECS
from ...config.spec import Origin, check
from ...errors import InputError, UsageError, nearest

if TYPE_CHECKING:
    from ...checkpoint.chat_template import Template

SETTING = "chat_template_kwargs"


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name (``bos_token``, ...), as ``apply_chat_template`` passes them."""
    found = {}
    for name in TOKEN_NAMES:
        token = tokenizer_config.get(name)
        if isinstance(token, dict):  # a serialized AddedToken
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def check_variables(template: Template, variables: Mapping[str, Any]) -> None:
    """Refuse variables that have no effect or that qcore sets itself.

    Args:
        template: the checkpoint's template; only its text is looked at.
        variables: the variables to set.

    Raises:
        UsageError: ``QC-CONFIG-008`` or ``-009``.
        InputError: the template does not parse; as `Template.inputs`.
    """
    for name in variables:
        if name in STANDARD_INPUTS:
            raise UsageError(
                "QC-CONFIG-009",
                "is set by qcore itself",
                field=f"{SETTING}.{name}",
                expected="a variable of the template, such as those in the model card",
                fix="leave it out",
            )
    if not variables:
        return
    known = sorted(template.switches())
    for name in variables:
        if name not in known:
            near = nearest(name, known)
            raise UsageError(
                "QC-CONFIG-008",
                "is not read by the chat template",
                file=template.source,
                field=f"{SETTING}.{name}",
                expected=" or ".join(known) or "none: this template has no variables of its own",
                fix=f"did you mean {near}?" if near else "leave it out",
            )


def recorded_variables(meta: Mapping[str, Any], source: object) -> Entries[Plain]:
    """Read the variables that give the trained prompts from the manifest of an adapter or a merge.

    They are those of ``meta.chat``; manifests of earlier versions have those of the settings.

    Args:
        meta: the manifest's meta.
        source: the folder, for errors.

    Raises:
        InputError: ``QC-ADAPTER-008`` the record is not a valid mapping.
    """
    settings = _inner(meta, {}, "identity", "settings", SETTING)
    given = _inner(meta, settings, "chat", "kwargs")
    try:
        checked = check(SPECS[SETTING], given, Origin(file=source, field=SETTING))
    except UsageError as error:
        raise InputError(
            "QC-ADAPTER-008",
            "is not valid in the manifest",
            file=error.file,
            field=error.field,
            found=error.found,
            expected=error.expected,
            fix="train again, or restore the folder",
        ) from None
    assert isinstance(checked, Entries)  # the setting is a mapping
    return checked


def recorded_template(meta: Mapping[str, Any]) -> str:
    """SHA-256 of the chat template in the manifest of an adapter or a merge; empty without one.

    It is that of ``meta.chat``; manifests of earlier versions have that of the run's identity.
    """
    sha256 = _inner(meta, None, "chat", "template_sha256")
    sha256 = sha256 or _inner(meta, None, "identity", "template")
    return sha256 if isinstance(sha256, str) else ""


def other_template(meta: Mapping[str, Any], template: Template | None, name: str) -> str:
    """A warning that a manifest records another chat template than a checkpoint has; or empty.

    Args:
        meta: the manifest's meta.
        template: of the checkpoint.
        name: what was trained.
    """
    before, now = recorded_template(meta), template.sha256 if template is not None else ""
    if not before or before == now:
        return ""
    return (
        f"{name} was trained under another chat template (sha256 {before[:12]}) than the "
        f"checkpoint has ({now[:12] or 'none'}): conversations render differently"
    )


def mixed_modes(meta: Mapping[str, Any]) -> str:
    """What a manifest says of turns that were trained both with and without reasoning.

    Empty where one mode was trained, or where the manifest does not say.
    """
    some, none = (_inner(meta, 0, "chat", key) for key in ("turns_with_reasoning", "turns_without"))
    if not (isinstance(some, int) and isinstance(none, int) and some and none):
        return ""
    return (
        f"{some} turns were trained with reasoning and {none} without: the chat template's "
        "default decides whether a prompt opens with thinking"
    )


def _inner(meta: Any, default: Any, *keys: str) -> Any:
    """A value of nested mappings; `default` where a key is absent."""
    for key in keys:
        if not isinstance(meta, Mapping) or key not in meta:
            return default
        meta = meta[key]
    return meta

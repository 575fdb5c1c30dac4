"""Variables that a chat template is rendered with: which may be set, and those of a run.

This file decides that a variable has to do something: one that the checkpoint's template does
not read would be set in silence, and one that qcore gives itself (``messages``, ``bos_token``)
would change what a row is. Training records the variables with the adapter and generation
renders with them again, so both see the same prompt. What a value may be is
`qcore.config.settings`' business, and what it means the template's.

Codes: ``QC-CONFIG-008`` not read by the template, ``-009`` given by qcore itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..checkpoint.chat_template import STANDARD_INPUTS, TOKEN_NAMES
from ..config.frozen_map import Entries, Plain
from ..config.settings import SPECS
from ..config.spec import Origin, check
from ..errors import InputError, UsageError, nearest

if TYPE_CHECKING:
    from ..checkpoint.chat_template import Template

SETTING = "chat_template_kwargs"


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Named tokens (``bos_token``, ...) that ``apply_chat_template`` gives to a template."""
    found = {}
    for name in TOKEN_NAMES:
        token = tokenizer_config.get(name)
        if isinstance(token, dict):  # an AddedToken, written out
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def check_variables(template: Template, variables: Mapping[str, Any]) -> None:
    """Refuse a variable that would have no effect, or the wrong one.

    Args:
        template: the checkpoint's template; only its text is looked at.
        variables: what is to be set.

    Raises:
        UsageError: ``QC-CONFIG-008`` or ``-009``.
        InputError: the template does not parse; as `Template.inputs`.
    """
    for name in variables:
        if name in STANDARD_INPUTS:
            raise UsageError(
                "QC-CONFIG-009",
                "is what qcore itself gives to a chat template",
                field=f"{SETTING}.{name}",
                expected="a switch of the template, such as those in its model card",
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
                "is no variable that the chat template reads: it would do nothing",
                file=template.source,
                field=f"{SETTING}.{name}",
                expected=" or ".join(known) or "none: this template has no switches",
                fix=f"did you mean {near}?" if near else "leave it out",
            )


def recorded_variables(meta: Mapping[str, Any], source: object) -> Entries[Plain]:
    """The variables that an adapter was trained with, from its manifest; none where it has none.

    Args:
        meta: the manifest's meta.
        source: the adapter, for errors.

    Raises:
        InputError: ``QC-ADAPTER-008`` what is recorded is no such mapping.
    """
    given: Any = meta
    for key in ("identity", "settings"):
        given = given.get(key) if isinstance(given, Mapping) else None
    given = given.get(SETTING, {}) if isinstance(given, Mapping) else {}
    try:
        checked = check(SPECS[SETTING], given, Origin(file=source, field=SETTING))
    except UsageError as error:
        raise InputError(
            "QC-ADAPTER-008",
            "is not what its manifest says",
            file=error.file,
            field=error.field,
            found=error.found,
            expected=error.expected,
            fix="train again, or restore the folder",
        ) from None
    assert isinstance(checked, Entries)  # the setting is a mapping
    return checked

"""Checks that a base computes what the base of an adapter's training computed, by config.json.

This file decides that an adapter is bound to its base's config.json as far as the computation reads
it (`qcore.checkpoint.identity.ADAPTER`): weights of the same bytes compute something else with
another epsilon or another base of the rotary frequencies. Fingerprints bind the weights; each verb
compares them once it has read these.

Code: ``QC-ADAPTER-024`` config.json computes something else.
"""

from __future__ import annotations

from typing import Any

from ..checkpoint.identity import config_of
from ..errors import InputError, QcoreError
from ..plugins.resolve_model import Identified
from .peft_names import Adapter


def refuse_other_config(base: Identified, adapter: Adapter) -> None:
    """Refuse a base whose config.json computes something else than that of the training.

    Args:
        base: the base of the run.
        adapter: an adapter; without a record of the config it is not compared.

    Raises:
        InputError: ``QC-ADAPTER-024``.
    """
    recorded, present = adapter.base_config, config_of(base.checkpoint.config)
    if recorded is None or recorded == present:
        return
    from ..nn.config_numbers import Difference, first_difference

    bound = base.using_parts(adapter.parts)
    try:
        difference = first_difference(bound, recorded)
    except QcoreError as error:
        # The weights do not fit the blocks of the recorded config.
        difference = Difference("", error.message, "weights for the config.json of the training")
    if difference is None:
        return
    raise InputError(
        "QC-ADAPTER-024",
        "computes something else than the base that the adapter was trained on",
        file=base.checkpoint.path / "config.json",
        field=difference.field or None,
        found=_shown(difference.found),
        expected=_shown(difference.expected),
        fix="name the base with the config.json of the training; a merge can be edited afterwards",
    )


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)[:160]

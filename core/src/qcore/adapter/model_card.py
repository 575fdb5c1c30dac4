"""README.md of an adapter folder: what it is, and the lines that load it.

This file decides the text of the card. The lines name the class that the adapter's tensor names
belong to, because another class of the same model has other names. `qcore.training.checkpoints` and
`qcore.merging.extract` decide what else the folder holds.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

#: Values that vLLM accepts for ``--max-lora-rank``.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the card says.

    Attributes:
        base: hub id or absolute folder of the base.
        revision: commit of the base on the hub; ``None`` for a folder.
        class_name: transformers class that the adapter is written for; empty if the plugin names
            none.
        ranks: ranks of the LoRA pairs.
        groups: number of LoRA pairs by group.
        variables: variables of the chat template that training used.
        tokenizer: whether the folder has the tokenizer of the base.
        dora: whether the pairs have the magnitudes of DoRA.
        made: how the adapter was made.
    """

    base: str
    revision: str | None
    class_name: str
    ranks: frozenset[int]
    groups: Mapping[str, int]
    variables: Mapping[str, object]
    tokenizer: bool
    dora: bool = False
    made: str = "trained with qcore"


def model_card(card: Card) -> str:
    """Return README.md, with the metadata that the hub reads first."""
    of_hub = [f"base_model: {card.base}"] if card.revision is not None else []
    lines = [
        "---",
        *of_hub,
        "library_name: peft",
        "tags:",
        "- lora",
        "- qcore",
        "---",
        "",
        "# LoRA adapter",
        "",
        f"A LoRA adapter of `{card.base}`, {card.made}: {_pairs(card)}.",
        *_variables(card),
        "",
        "`FOLDER` is this folder or its hub id.",
        "",
        "## PEFT",
        "",
        *_peft(card),
        "",
        "## vLLM",
        "",
        *_serving(card),
        "",
        "## qcore",
        "",
        *_fenced(
            "sh",
            "qcore verify FOLDER",
            f"qcore merge --model {_quoted(_named(card))} --adapter FOLDER --output merged",
        ),
        "",
    ]
    return "\n".join(lines)


def _serving(card: Card) -> list[str]:
    if card.dora:
        return ["vLLM does not load adapters with DoRA: merge it with the base first."]
    return [
        *_fenced("sh", _vllm(card)),
        "",
        "Compare an answer of `NAME` with one of the base: vLLM also loads adapters that fit no",
        "module, and then answers as the base does.",
    ]


def _pairs(card: Card) -> str:
    groups = ", ".join(f"{count} in `{group}`" for group, count in card.groups.items())
    low, high = min(card.ranks), max(card.ranks)
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    kind = "pairs with DoRA" if card.dora else "pairs"
    return f"{sum(card.groups.values())} {kind} of {rank} ({groups})"


def _variables(card: Card) -> list[str]:
    if not card.variables:
        return []
    values = json.dumps(dict(card.variables), sort_keys=True)
    return ["", f"It was trained with the chat template variables `{values}`."]


def _peft(card: Card) -> list[str]:
    tokenizer_of = '"FOLDER"' if card.tokenizer else _literal(card.base)
    auto = _fenced(
        "python",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer",
        "",
        'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER", dtype="auto")',
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer_of})",
    )
    if not card.class_name:
        return auto
    revision = f", revision={_literal(card.revision)}" if card.revision is not None else ""
    return [
        *auto,
        "",
        f"This loads the base as `{card.class_name}`, whose module names the adapter has. To load",
        "the base yourself, use the same class; with another one PEFT raises an error:",
        "",
        *_fenced(
            "python",
            "from peft import PeftModel",
            f"from transformers import {card.class_name}",
            "",
            f"base = {card.class_name}.from_pretrained(",
            f'    {_literal(card.base)}{revision}, dtype="auto"',
            ")",
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ),
    ]


def _vllm(card: Card) -> str:
    rank = next((rank for rank in _VLLM_RANKS if rank >= max(card.ranks)), max(card.ranks))
    revision = f" --revision {card.revision}" if card.revision is not None else ""
    return (
        f"vllm serve {_quoted(card.base)}{revision} --enable-lora --max-lora-rank {rank} "
        "--lora-modules NAME=FOLDER"
    )


def _named(card: Card) -> str:
    """The base as qcore takes it."""
    return card.base if card.revision is None else f"{card.base}@{card.revision}"


def _fenced(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```"]


def _literal(value: str | None) -> str:
    """Return a string literal of Python, with double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _quoted(value: str) -> str:
    """Return a word of a shell command."""
    return shlex.quote(value)

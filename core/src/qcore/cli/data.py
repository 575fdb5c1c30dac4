"""``qcore data``: the group of verbs on rows; each verb has a file of its own."""

from __future__ import annotations

import click

from .data_check import check
from .data_compare import diff, parity
from .data_convert import convert, schema
from .data_show import show


@click.group("data")
def command() -> None:
    """See rows as a run trains them: findings, tokens, conversion. No weights are needed."""


for verb in (check, show, diff, parity, convert, schema):
    command.add_command(verb)

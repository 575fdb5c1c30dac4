"""``qcore adapter``: the group of verbs on adapter folders; each verb has a file of its own."""

from __future__ import annotations

import click

from .adapter_combine import combine
from .adapter_diff import diff
from .adapter_extract import extract
from .adapter_show import show


@click.group("adapter")
def command() -> None:
    """See what an adapter holds, compare or combine adapters, or extract one from two models."""


for verb in (show, diff, extract, combine):
    command.add_command(verb)

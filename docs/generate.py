"""Regenerates the settings table, presets and ``--help`` texts in docs/*.md from the source.

Each derived piece stands in a Markdown file between ``<!-- generated: NAME -->`` and
``<!-- end -->``. ``python docs/generate.py`` rewrites the pieces; a test fails when one is
stale. Texts are written by hand everywhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click

DOCS = Path(__file__).parent
_PIECE = re.compile(r"(<!-- generated: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def settings() -> str:
    """One row a setting."""
    from qcore.config.settings import SPECS

    rows = ["| setting | default | allowed | what it is |", "|---|---|---|---|"]
    for name, spec in SPECS.items():
        default = (
            "empty"
            if not spec.default and isinstance(spec.default, str | tuple | Mapping)
            else f"`{spec.default}`".lower()
        )
        rows.append(f"| `{name}` | {default} | {spec.expected} | {spec.help} |")
    return "\n".join(rows).replace('or ""', "or empty") + "\n"


def presets() -> str:
    """One row a preset of core and of the two plugins in this repository."""
    from qcore.config.presets import load_presets

    rows = ["| preset | other names | from | model | for |", "|---|---|---|---|---|"]
    for preset in load_presets():
        if preset.origin in ("core", "qwen35", "qwen36"):
            aliases = ", ".join(f"`{alias}`" for alias in preset.aliases)
            rows.append(
                f"| `{preset.id}` | {aliases} | {preset.origin} | {preset.base_model or ''} "
                f"| {preset.description} |"
            )
    return "\n".join(rows) + "\n"


def help() -> str:
    """``--help`` of every verb of core."""
    from qcore.cli.main import VERBS, cli

    root = click.Context(cli, info_name="qcore", terminal_width=80)
    pieces = []
    for name in VERBS:
        command = cli.get_command(root, name)
        assert command is not None
        pieces += _helps(command, f"qcore {name}")
    return "\n".join(pieces)


def _helps(command: click.Command, path: str) -> Iterator[str]:
    context = click.Context(
        command, info_name=path, terminal_width=80, help_option_names=["-h", "--help"]
    )
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _helps(inner, f"{path} {name}")
        return
    yield f"## {path}\n\n```text\n{command.get_help(context)}\n```\n"


PIECES: dict[str, Callable[[], str]] = {"settings": settings, "presets": presets, "help": help}


def derived(text: str) -> str:
    """A Markdown file with its generated pieces made anew."""

    def piece(match: re.Match[str]) -> str:
        return f"{match[1]}{PIECES[match[2]]()}{match[3]}"

    return _PIECE.sub(piece, text)


def main() -> None:
    """Rewrite the files that hold a generated piece."""
    for path in sorted(DOCS.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = derived(before)
        if after != before:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()

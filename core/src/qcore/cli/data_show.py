"""``qcore data show``: the samples of rows token by token, as text, JSON or one page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import debug_option, json_option
from .data_options import RowOptions, end, model_option, setting_options, source_options

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..data.rendering.renderer import Renderer
    from ..data.views.show import ShownSample
    from ..preflight.rows import RowModel


@click.command("show")
@source_options
@model_option
@click.option(
    "--row",
    "rows",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="Show this row alone; repeatable.",
)
@click.option("--search", default="", metavar="TEXT", help="Show samples that contain TEXT.")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="OUT",
    help="Write one page for a browser.",
)
@setting_options
@json_option
@debug_option
def show(
    model: str,
    rows: tuple[int, ...],
    search: str,
    html: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show the samples of FILES as training with MODEL sees them: which tokens are trained."""
    from ..data.views.page import THUMBNAIL, check_page
    from ..data.views.show import shown_samples
    from ..errors import QcoreError
    from .terminal import terminal_reporter

    if html is not None:
        check_page(html)
    wanted = RowOptions(**options)
    opened = wanted.open(
        model, terminal_reporter(quiet=as_json), preview=0 if html is None else THUMBNAIL
    )
    sources = wanted.sources()
    error: QcoreError | None = None
    with opened.renderer(explain=True, only=rows) as renderer:
        found = _searched(shown_samples(renderer, sources), opened.tokenizer, search)
        if html is not None:
            found = _write_page(html, found, opened, renderer)
        if as_json:
            _print_json(found)
        elif html is not None:
            count = sum(1 for _ in found)
            click.echo(f"{html}: {count:,} samples of {renderer.rows:,} rows")
        else:
            _print(found, opened)
        try:
            renderer.rejects.stop(renderer.notes.counts)
            _check_rows(rows, renderer)
        except QcoreError as stopped:
            error = stopped
    end(error)


def _write_page(
    path: Path, samples: Iterable[ShownSample], opened: RowModel, renderer: Renderer
) -> Iterator[ShownSample]:
    """Pass samples on, and write the page after the last one."""
    from ..data.views.page import Page
    from ..data.views.show import previews

    page = Page(opened.tokenizer, opened.reader.control if opened.reader else ())
    with renderer.notes:
        for sample in samples:
            page.add(sample, previews(sample, renderer, page.thumbnail))
            yield sample
    page.write(
        path,
        model=opened.name,
        rows=renderer.rows,
        refused=renderer.rejects.entries(),
        findings=renderer.notes.findings,
        rejected=renderer.rejects.count,
    )


def _searched(
    samples: Iterable[ShownSample], tokenizer: Tokenizer, search: str
) -> Iterator[ShownSample]:
    wanted = search.casefold()
    for sample in samples:
        if not wanted or wanted in "".join(sample.texts(tokenizer)).casefold():
            yield sample


def _check_rows(rows: Iterable[int], renderer: Renderer) -> None:
    """Refuse the number of a row that no source has.

    Raises:
        UsageError: ``QC-CLI-008``.
    """
    from ..errors import UsageError

    last = max(rows, default=0)
    if last > renderer.rows:
        raise UsageError(
            "QC-CLI-008",
            "there is no such row",
            field="--row",
            found=last,
            expected=f"1 to {renderer.rows}",
        )


def _print(samples: Iterable[ShownSample], opened: RowModel) -> None:
    from .data_view import SampleView

    view = SampleView.of(opened.tokenizer, opened.reader.control if opened.reader else ())
    view.legend()
    for sample in samples:
        view.print(sample)


def _print_json(samples: Iterable[ShownSample]) -> None:
    """Print one object; nothing if an error stops the rows."""
    # A file, because the tokens of all rows must not be held in memory.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
        spool.write('{"rows": [')
        for number, sample in enumerate(samples):
            spool.write(", " if number else "")
            json.dump(sample.as_json(), spool, ensure_ascii=False)
        spool.write("]}\n")
        spool.seek(0)
        while piece := spool.read(1 << 20):
            click.echo(piece, nl=False)

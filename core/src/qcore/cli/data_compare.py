"""``qcore data diff`` and ``qcore data parity``: rows under two models, and under serving."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from .common import debug_option, emit, json_option
from .data_options import RowOptions, end, model_option, setting_options, source_options

if TYPE_CHECKING:
    from ..data.rendering.renderer import Renderer
    from ..errors import QcoreError


@click.command("diff")
@source_options
@click.option(
    "--model", "models", required=True, multiple=True, help="Folder or hub id; give two of them."
)
@setting_options
@json_option
@debug_option
def diff(models: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Report the rows of FILES that two models render, tokenize or train differently."""
    from ..data.views.diff import differences
    from ..data.views.show import shown_samples
    from ..errors import UsageError
    from .data_view import print_rows, visible
    from .terminal import terminal_reporter

    if len(models) != 2:
        raise UsageError(
            "QC-CLI-009", "compares two models", field="--model", found=len(models), expected=2,
            fix="pass --model twice",
        )  # fmt: skip
    wanted = RowOptions(**options)
    reporter = terminal_reporter(quiet=as_json)
    opened = [wanted.open(model, reporter) for model in models]
    sources = wanted.sources()
    with ExitStack() as stack:
        renderers = [stack.enter_context(one.renderer(explain=True)) for one in opened]
        left, right = (shown_samples(renderer, sources) for renderer in renderers)
        found = list(differences(left, right, (opened[0].tokenizer, opened[1].tokenizer)))
    rows = renderers[0].rows
    if as_json:
        emit({"models": list(models), "rows": rows, "differences": [d.as_json() for d in found]})
    else:
        differing = len({one.row for one in found})
        click.echo(f"{differing:,} of {rows:,} rows differ")
        print_rows([{**one.as_json(), "a": visible(repr(one.a)), "b": visible(repr(one.b))}
                    for one in found])  # fmt: skip
    for renderer in renderers:
        end(_stopped(renderer))


@click.command("parity")
@source_options
@model_option
@setting_options
@json_option
@debug_option
def parity(model: str, as_json: bool, **options: Any) -> None:
    """Compare every trained turn of FILES with the prompt that serving MODEL shows."""
    from ..data.views.serving import compare_with_serving
    from ..errors import InputError
    from .data_view import print_rows, visible
    from .terminal import terminal_reporter

    wanted = RowOptions(**options)
    opened = wanted.open(model, terminal_reporter(quiet=as_json))
    sources = wanted.sources()
    with opened.renderer() as renderer:
        report = compare_with_serving(renderer, sources)
    if as_json:
        emit(report.as_json())
    else:
        click.echo(f"{report.turns:,} trained turns of {report.rows:,} rows: "
                   f"{report.differing:,} differ from serving")  # fmt: skip
        print_rows(
            [
                {"row": entry["row"], "turn": entry["turn"], "kind": entry["kind"],
                 "field": entry["field"], "cause": visible(entry["cause"]),
                 "trained": visible(entry["trained"]), "served": visible(entry["served"])}
                for entry in report.as_json()["differences"]
            ]
        )  # fmt: skip
        if report.notes:
            click.echo("Messages that are not trained as their row has them:")
            print_rows([{key: visible(v) if isinstance(v, str) else v for key, v in note.items()}
                        for note in report.noted()])  # fmt: skip
    end(_stopped(renderer))
    if report.differing:
        row, first = report.differences[0]
        end(
            InputError(
                "QC-DATA-059",
                f"{report.differing} of {report.turns} trained turns differ from serving",
                field=f"row {row}, messages[{first.turn}]",
                found=first.cause,
            )
        )


def _stopped(renderer: Renderer) -> QcoreError | None:
    """The error of refused rows; ``None`` if there is none."""
    from ..errors import QcoreError

    try:
        renderer.rejects.stop(renderer.notes.counts)
    except QcoreError as error:
        return error
    return None

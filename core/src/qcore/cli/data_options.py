"""What the verbs of ``qcore data`` share: the options of a run's rows, and the model they open.

This file decides which options these verbs have in common, and that they mean what they mean for
``qcore train``. What is printed is decided by each verb.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .common import fail

if TYPE_CHECKING:
    from ..data.sources.source import Source
    from ..errors import QcoreError
    from ..preflight.rows import RowModel
    from ..reporting import Reporter

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptions:
    """The options of a run's rows, as the user wrote them.

    Attributes:
        files: what to read: files, folders, hub ids.
        data_format: row format of all sources; ``None``: detected.
        media_root: folder below which absolute media paths may lie.
        preset: named settings.
        config_file: file with settings.
        sets: settings.
        generation: of an unproven checkpoint.
    """

    files: tuple[str, ...]
    data_format: str | None
    media_root: Path | None
    preset: str | None
    config_file: Path | None
    sets: tuple[str, ...]
    generation: str | None

    def sources(self) -> tuple[Source, ...]:
        """The sources to read.

        Raises:
            QcoreError: as `read_sources`.
        """
        from ..data.sources.read import read_sources

        return read_sources(
            self.files,
            format=self.data_format or "",
            media_root=self.media_root,
            command="FILES",
        )

    def open(self, model: str, reporter: Reporter, *, preview: int = 0) -> RowModel:
        """The model that the rows are rendered for.

        Args:
            model: as the user named it.
            reporter: receives notes.
            preview: pixels of the largest preview of media; 0: none is made.

        Raises:
            QcoreError: as `load_settings` and `open_row_model`.
        """
        from ..config.resolve import load_settings
        from ..preflight.rows import open_row_model

        settings, _ = load_settings(
            preset=self.preset,
            config_file=self.config_file,
            sets=self.sets,
            flags={"--generation": ("generation", self.generation or None)},
        )
        return open_row_model(model, settings, reporter, preview=preview)


def source_options(command: _F) -> _F:
    """FILES, ``--format`` and ``--media-root``."""
    for option in (
        click.option(
            "--media-root",
            type=click.Path(path_type=Path),
            help="Folder with absolute media paths.",
        ),
        click.option("--format", "data_format", help="Row format; by default found by its keys."),
        click.argument("files", nargs=-1, required=True),
    ):
        command = option(command)
    return command


def setting_options(command: _F) -> _F:
    """The options that change settings."""
    for option in (
        click.option("--generation", help="Take an unproven checkpoint for this generation."),
        click.option(
            "--set", "sets", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable."
        ),
        click.option("--config", "config_file", type=click.Path(path_type=Path), help="run.yaml"),
        click.option("--preset", help="Named settings; see qcore presets list."),
    ):
        command = option(command)
    return command


def model_option(command: _F) -> _F:
    """``--model``."""
    return click.option(
        "--model",
        required=True,
        help="Folder or hub id; config, tokenizer and chat template are enough.",
    )(command)


def end(error: QcoreError | None) -> None:
    """End with the error of refused rows, after the results are printed.

    Raises:
        Exit: with the exit status of the error.
    """
    if error is not None:
        raise click.exceptions.Exit(fail(error, as_json=False))

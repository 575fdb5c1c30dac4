"""Reads the images and videos of a prompt: placeholder tokens, and the vision tower's input.

This file decides how a file is read, how the rendered prompt is expanded to the tokens that stand
for it, and how errors of the modality's reader name the option or the chat template. The reader
itself belongs to the plugin of the modality.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..api.blocks import Media
from ..api.media import MediaReader, Medium, RowError
from ..data.media.files import Finder, Reference
from ..errors import InputError, UsageError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class PromptMedia:
    """Reads media for one model.

    Attributes:
        reader: of the model's modality.
        folder: of the model, for errors.
    """

    reader: MediaReader
    folder: Path

    def read(self, files: Sequence[tuple[str, Path]]) -> list[Medium]:
        """Read files, each with its kind.

        Raises:
            InputError: ``QC-MEDIA-*``, naming the option of the kind.
        """
        media = []
        for kind, path in files:
            try:
                # The user named this file, so a link may lead anywhere.
                real = Path(os.path.realpath(path))
                part = Reference(kind=kind, at=f"--{kind}", given=f"./{real.name}", options={})
                media.append(self.reader.read(Finder(real.parent).payload(part)))
            except RowError as error:
                raise _of_file(error, kind, path) from None
        return media

    def expand(self, rendered: str, media: Sequence[Medium]) -> str:
        """The rendered prompt with as many placeholders as each medium has tokens.

        Raises:
            InputError: the chat template did not render one placeholder for each medium.
        """
        fix = "use the chat template that came with the weights"
        return self._call(lambda: self.reader.expand(rendered, media), fix)

    def place(
        self, ids: list[int], media: Sequence[Medium], device: torch.device
    ) -> tuple[Tensor, Media]:
        """Positions ``[axes, T]`` of a prompt, and the tower's input, both on `device`.

        Raises:
            InputError: the tokens of the prompt do not fit the media.
        """
        placed = self._call(lambda: self.reader.place(ids, media))
        positions = torch.tensor([list(axis) for axis in placed.positions]).to(device)
        where = torch.tensor(placed.where, dtype=torch.int64)
        return positions, self.reader.batch(media, where).to(device)

    def check_text(self, texts: Mapping[str, str]) -> None:
        """Refuse text that holds a placeholder, which would stand for a medium.

        Args:
            texts: by the option that gave it.

        Raises:
            UsageError: ``QC-GENERATE-006``.
        """
        for field, text in texts.items():
            for token in self.reader.control:
                if token in text:
                    raise UsageError(
                        "QC-GENERATE-006",
                        "holds text that stands for media",
                        field=field,
                        found=repr(token),
                        expected="plain text: the chat template writes it",
                        fix="leave it out",
                    )

    def _call(self, call: Callable[[], _T], fix: str | None = None) -> _T:
        try:
            return call()
        except RowError as error:
            raise InputError(
                error.code, error.what, file=self.folder, found=error.found,
                expected=error.expected, fix=fix or error.fix,
            ) from None  # fmt: skip


def _of_file(error: RowError, kind: str, path: Path) -> InputError:
    """An error about a row of a data file, as one about a file that an option names."""
    missing = error.code == "QC-MEDIA-002" and not os.path.lexists(path)
    remote = ":/" in str(path)  # as a path spells "://"
    return InputError(
        error.code,
        "is no file, and nothing is fetched" if missing and remote else error.what,
        file=path,
        field=f"--{kind}",
        found=None if missing else error.found,
        expected="a file" if missing else error.expected,
        # A row names the kind in its content part; here the option does.
        fix="name a file that exists"
        if missing
        else re.sub(r'\{"type": "(\w+)"\}', r"--\1", error.fix)
        if error.fix
        else None,
    )

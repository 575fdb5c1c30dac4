"""Comparison of two models on the same rows: which samples they render or train differently.

This file decides what a difference is and where it begins. The samples are those of training with
each model (`qcore.data.views.show`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..rendering.samples import first_difference

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .show import ShownSample

MISSING, SAMPLES, TEXT, TOKENS, TRAINED = "refused", "samples", "text", "tokens", "trained"
_SHOWN = 60  #: characters on each side


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDifference:
    """The first difference between two models in a sample.

    Attributes:
        row: number of the row.
        sample: number within the row; 0 for a difference of the whole row.
        kind: ``refused`` the row has samples with one model only, ``samples`` another number of
            samples, ``text`` another rendering, ``tokens`` other tokens of the same text,
            ``trained`` other labels of the same tokens.
        token: position of the first token of the first model that differs; -1 for a whole row.
        a: what the first model has there.
        b: what the second model has there.
    """

    row: int
    sample: int
    kind: str
    token: int
    a: str
    b: str

    def as_json(self) -> dict[str, Any]:
        """The entry of ``qcore data diff --json``."""
        return asdict(self)


def differences(
    a: Iterable[ShownSample],
    b: Iterable[ShownSample],
    tokenizers: tuple[Tokenizer, Tokenizer],
) -> Iterator[RowDifference]:
    """Yield the differences between two models, in the order of the rows.

    Args:
        a: samples of the first model, in the order of the rows.
        b: those of the second one, of the same sources.
        tokenizers: of the two models.
    """
    for row, left, right in _paired(a, b):
        if not left or not right:
            here = [f"{len(side)} samples" if side else "refused or left out"
                    for side in (left, right)]  # fmt: skip
            yield RowDifference(row=row, sample=0, kind=MISSING, token=-1, a=here[0], b=here[1])
            continue
        if len(left) != len(right):
            sizes = f"{len(left)} samples", f"{len(right)} samples"
            yield RowDifference(row=row, sample=0, kind=SAMPLES, token=-1, a=sizes[0], b=sizes[1])
        for one, other in zip(left, right, strict=False):
            difference = _difference(one, other, tokenizers)
            if difference is not None:
                yield difference


def _paired(
    a: Iterable[ShownSample], b: Iterable[ShownSample]
) -> Iterator[tuple[int, list[ShownSample], list[ShownSample]]]:
    """The samples of each row that one of the models has."""
    lefts = ((row, list(samples)) for row, samples in groupby(a, lambda s: s.example.row))
    rights = ((row, list(samples)) for row, samples in groupby(b, lambda s: s.example.row))
    left, right = next(lefts, None), next(rights, None)
    while left is not None or right is not None:
        row = min(side[0] for side in (left, right) if side is not None)
        ours = left[1] if left is not None and left[0] == row else []
        theirs = right[1] if right is not None and right[0] == row else []
        yield row, ours, theirs
        left = next(lefts, None) if ours else left
        right = next(rights, None) if theirs else right


def _difference(
    one: ShownSample, other: ShownSample, tokenizers: tuple[Tokenizer, Tokenizer]
) -> RowDifference | None:
    ids, theirs = list(one.example.ids), list(other.example.ids)
    texts = "".join(one.texts(tokenizers[0])), "".join(other.texts(tokenizers[1]))
    at = first_difference(ids, theirs)
    if texts[0] != texts[1]:
        place = first_difference(*texts)
        shown = [text[max(0, place - 20) : place + _SHOWN] for text in texts]
        return _differs(one, TEXT, at, shown[0], shown[1])
    if ids != theirs:
        return _differs(one, TOKENS, at, str(ids[at : at + 4]), str(theirs[at : at + 4]))
    at = first_difference(one.trained, other.trained)
    return None if at == len(ids) else _differs(one, TRAINED, at, _why(one, at), _why(other, at))


def _differs(sample: ShownSample, kind: str, at: int, a: str, b: str) -> RowDifference:
    example = sample.example
    return RowDifference(row=example.row, sample=example.sample, kind=kind, token=at, a=a, b=b)


def _why(sample: ShownSample, at: int) -> str:
    spans = sample.example.token_spans
    return next((span.why for span in spans if span.start <= at < span.end), "")

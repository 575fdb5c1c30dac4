"""Media in the text of a row: placeholders as long as their media, and the tokens they are of.

This file decides how a rendered conversation names its media, as transformers' Qwen3VLProcessor
does, and which tokens no text may hold. What the template prints is the template's, where the
tokens lie is `positions`'. It imports no torch.

- ``QC-VISION-050`` the template printed another number of placeholders than the row has media.
- ``QC-VISION-051`` it printed them in another order of kinds.
- ``QC-VISION-053`` config.json and the tokenizer do not name the same tokens for media.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from qcore.api import Finding, RowError, Severity

from .media import ProcessedMedium

START, END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
PADS = {"image": IMAGE, "video": VIDEO}  #: placeholder by kind
#: Never labels, and no text of a row may hold one.
CONTROL = (START, END, "<|vision_pad|>", IMAGE, VIDEO)

_KINDS = {pad: kind for kind, pad in PADS.items()}
_PLACEHOLDER = re.compile("|".join(map(re.escape, _KINDS)))
#: The key of config.json that names a token, and transformers' id where there is none.
TOKEN_IDS = {IMAGE: ("image_token_id", 248056), VIDEO: ("video_token_id", 248057)}


def expand(text: str, media: Sequence[ProcessedMedium]) -> str:
    """A rendered conversation with every placeholder as long as its medium.

    The template prints ``<|vision_start|>``, one placeholder, ``<|vision_end|>``. An image's
    becomes one per embedding. A video's becomes its frames, ``<1.5 seconds><|vision_start|>``,
    placeholders, ``<|vision_end|>`` for each patch in time; the template's own pair stays around
    them all, as in transformers 5 (4.57 dropped it).

    Raises:
        RowError: ``QC-VISION-050`` another number of placeholders than of media,
            ``QC-VISION-051`` another order of kinds.
    """
    printed = [_KINDS[pad] for pad in _PLACEHOLDER.findall(text)]
    kinds = [medium.kind for medium in media]
    if len(printed) != len(kinds):
        raise RowError(
            "QC-VISION-050",
            "the chat template prints another number of placeholders than the row has media",
            found=_count_by_kind(printed),
            expected=_count_by_kind(kinds),
            fix="leave media out of what the template drops or repeats, such as a turn's reasoning",
        )
    if printed != kinds:
        at = next(n for n, pair in enumerate(zip(printed, kinds)) if len({*pair}) > 1)
        raise RowError(
            "QC-VISION-051",
            f"the chat template prints another kind of placeholder for medium {at + 1} of the row",
            found=printed[at],
            expected=kinds[at],
            fix="use the chat template that came with the weights",
        )
    # Pieces of text and media alternate; there is one piece more.
    pieces = _PLACEHOLDER.split(text)
    return pieces[0] + "".join(
        _expanded(medium) + piece for medium, piece in zip(media, pieces[1:], strict=True)
    )


def _expanded(medium: ProcessedMedium) -> str:
    """What stands for one medium."""
    pad = PADS[medium.kind]
    if medium.kind == "image":
        return pad * medium.tokens
    frames = medium.grid[0]
    assert len(medium.timestamps) == frames, (medium.timestamps, medium.grid)
    frame = f"{START}{pad * (medium.tokens // frames)}{END}"
    return "".join(f"<{second:.1f} seconds>{frame}" for second in medium.timestamps)


def _count_by_kind(kinds: Sequence[str]) -> str:
    return " and ".join(f"{kinds.count(kind)} of {kind}" for kind in PADS)


def configured_ids(config: Mapping[str, object]) -> dict[str, object]:
    """What config.json says the ids of the placeholders are."""
    return {token: config.get(key, default) for token, (key, default) in TOKEN_IDS.items()}


def token_findings(config: Mapping[str, object], token_ids: Mapping[str, int]) -> Iterator[Finding]:
    """Where config.json and the tokenizer differ about the tokens of media.

    Training goes by the tokenizer. Whoever loads the result goes by config.json: there the
    embeddings would land on other tokens, or on none. This matters to a run that reads media,
    and to no other.

    Args:
        config: config.json, whole.
        token_ids: ids of the tokenizer by token.
    """
    for token in (START, END, IMAGE, VIDEO):
        if token not in token_ids:
            yield Finding(
                code="QC-VISION-053",
                severity=Severity.ERROR,
                what="is not in the tokenizer",
                file="tokenizer.json",
                field=repr(token),
                expected="one token, as media need",
                fix="use the tokenizer that came with the weights",
            )
    for token, named in configured_ids(config).items():
        (key, default), known = TOKEN_IDS[token], token_ids.get(token)
        if known is not None and named != known:
            yield Finding(
                code="QC-VISION-053",
                severity=Severity.ERROR,
                what="is not the tokenizer's id of this token",
                file="config.json",
                field=key,
                found=repr(named) if key in config else f"none, which means {default}",
                expected=f"{known} ({token} in tokenizer.json)",
                fix="use the config.json and tokenizer.json that came with the weights",
            )

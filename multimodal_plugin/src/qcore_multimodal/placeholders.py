"""Placeholder tokens of images and video in a rendered conversation, and their config ids.

This file decides how a rendered conversation represents media, as transformers' Qwen3VLProcessor
does, and which tokens no text may contain. The chat template prints one placeholder per medium;
`positions` finds the tokens. It imports no torch.

- ``QC-VISION-050`` the template printed a different number of placeholders than the row has media.
- ``QC-VISION-051`` the template printed placeholders of other kinds than the row's media.
- ``QC-VISION-053`` config.json and the tokenizer disagree about media tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from qcore.api import Finding, RowError, Severity

from .media import ProcessedMedium

START, END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
PADS = {"image": IMAGE, "video": VIDEO}  #: kind to placeholder token
#: Never labels; the text of a row must not contain them.
CONTROL = (START, END, "<|vision_pad|>", IMAGE, VIDEO)

_KINDS = {pad: kind for kind, pad in PADS.items()}
_PLACEHOLDER = re.compile("|".join(map(re.escape, _KINDS)))
#: Token to the config.json key of its id, and transformers' default id.
TOKEN_IDS = {IMAGE: ("image_token_id", 248056), VIDEO: ("video_token_id", 248057)}


def expand(text: str, media: Sequence[ProcessedMedium]) -> str:
    """Repeat every placeholder of a rendered conversation once per embedding of its medium.

    The template prints ``<|vision_start|>``, one placeholder, ``<|vision_end|>``. The placeholder
    of an image is repeated once per embedding. The placeholder of a video becomes one frame for
    each temporal patch: ``<1.5 seconds><|vision_start|>``, placeholders, ``<|vision_end|>``. The
    template's own pair encloses all frames, as in transformers 5 (4.57 dropped it).

    Raises:
        RowError: ``QC-VISION-050`` the number of placeholders differs from the number of media,
            ``QC-VISION-051`` the kinds differ.
    """
    printed = [_KINDS[pad] for pad in _PLACEHOLDER.findall(text)]
    kinds = [medium.kind for medium in media]
    if len(printed) != len(kinds):
        raise RowError(
            "QC-VISION-050",
            "the chat template prints a different number of placeholders than the row has media",
            found=_count_by_kind(printed),
            expected=_count_by_kind(kinds),
            fix="remove media from content that the template drops or repeats, such as reasoning",
        )
    if printed != kinds:
        at = next(n for n, pair in enumerate(zip(printed, kinds)) if len({*pair}) > 1)
        raise RowError(
            "QC-VISION-051",
            f"the chat template prints the wrong kind of placeholder for medium {at + 1}",
            found=printed[at],
            expected=kinds[at],
            fix="use the chat template that came with the weights",
        )
    # Text and media alternate, starting and ending with text.
    pieces = _PLACEHOLDER.split(text)
    return pieces[0] + "".join(
        _expanded(medium) + piece for medium, piece in zip(media, pieces[1:], strict=True)
    )


def _expanded(medium: ProcessedMedium) -> str:
    """The expanded placeholder of one medium."""
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
    """Token ids of the placeholders according to config.json."""
    return {token: config.get(key, default) for token, (key, default) in TOKEN_IDS.items()}


def token_findings(config: Mapping[str, object], token_ids: Mapping[str, int]) -> Iterator[Finding]:
    """Differences between config.json and the tokenizer about media tokens.

    Training uses the tokenizer's ids; a library that loads the result uses those of config.json,
    where the embeddings would replace other tokens or none. This affects only runs that read
    media.

    Args:
        config: config.json.
        token_ids: the tokenizer's ids, by token.
    """
    for token in (START, END, IMAGE, VIDEO):
        if token not in token_ids:
            yield Finding(
                code="QC-VISION-053",
                severity=Severity.ERROR,
                what="is missing from the tokenizer",
                file="tokenizer.json",
                field=repr(token),
                expected="a single token, which images and videos need",
                fix="use the tokenizer that came with the weights",
            )
    for token, named in configured_ids(config).items():
        (key, default), known = TOKEN_IDS[token], token_ids.get(token)
        if known is not None and named != known:
            yield Finding(
                code="QC-VISION-053",
                severity=Severity.ERROR,
                what="differs from the tokenizer's id of this token",
                file="config.json",
                field=key,
                found=repr(named) if key in config else f"none, which means {default}",
                expected=f"{known} ({token} in tokenizer.json)",
                fix="use the config.json and tokenizer.json that came with the weights",
            )

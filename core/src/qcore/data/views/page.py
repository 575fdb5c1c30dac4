"""One self-contained HTML page of samples: search, filters, and why each token is trained.

This file decides what the page holds and that nothing in a row can act in it: the data is one block
of JSON without ``<``, the script writes text nodes alone, and the policy of the page allows the
hashes of its own script and style, images in data URLs, and no request. How it looks is decided by
`page.html`, `page.css` and `page.js`.

Codes: ``QC-DATA-070`` the page would overwrite a file that is not such a page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ...errors import UsageError
from ...io.atomic import writing
from ..findings import DataFinding
from ..rejects import CUT, REFUSED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .show import ShownSample

_MARKER = '<meta name="generator" content="qcore data show">'
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
THUMBNAIL = 160  #: pixels of the longer side of the first thumbnails
THUMBNAILS = 24 << 20  #: characters of all thumbnails
#: Once this share of `THUMBNAILS` is used, further ones have so many pixels: 10,000 photos fit.
_SMALLER = ((0.25, 80), (0.6, 48))


def check_page(path: Path) -> None:
    """Refuse a path that holds something else than a page of qcore.

    Raises:
        UsageError: ``QC-DATA-070``.
        WriteError: it cannot be looked at.
    """
    with writing(path):
        if not path.exists():
            return
        if path.is_file():
            with path.open("rb") as file:
                if _MARKER.encode() in file.read(1024):
                    return
    raise UsageError(
        "QC-DATA-070",
        "exists and is not a page of qcore data show",
        file=path,
        field="--html",
        fix="name another file, or delete it",
    )


def embedded(value: Any) -> str:
    """JSON that is safe inside a script element, whatever its strings are."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


class Page:
    """Collects samples, and writes the page.

    Args:
        tokenizer: of the model.
        media: tokens that stand for media.
    """

    def __init__(self, tokenizer: Tokenizer, media: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._media = tuple(media)
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = sorted({token.content for token in added if token.special} - {*media})
        self._runs = [re.compile(f"(?:{re.escape(token)}){{2,}}") for token in media]
        # A file, because the texts of all samples must not be held in memory.
        self._spool: TextIO = tempfile.TemporaryFile(  # noqa: SIM115, closed with this object
            "w+", encoding="utf-8"
        )
        self._whys: dict[str, int] = {}
        self._sources: dict[str, int] = {}
        self._formats: dict[str, int] = {}
        self._thumbs: dict[str, int] = {}
        self._size = 0
        self._samples = self._tokens = self._supervised = 0

    def add(self, sample: ShownSample, media: Sequence[tuple[str, str]] = ()) -> None:
        """Add a sample.

        Args:
            sample: the sample.
            media: for each of its media: a caption, and a data URL of a picture or nothing.
        """
        texts = sample.texts(self._tokenizer)
        spans = [
            [
                self._shortened(text),
                span.end - span.start,
                _number(self._whys, span.why),
                int(span.trained),
            ]
            for span, text in zip(sample.example.token_spans, texts, strict=True)
        ]
        supervised = sample.supervised
        entry = [
            sample.example.row,
            sample.example.sample,
            _number(self._sources, sample.source),
            _number(self._formats, sample.origin.format),
            sample.place,
            len(sample.example.ids),
            supervised,
            spans,
            [[caption, self._thumbnail(url)] for caption, url in media],
        ]
        self._spool.write(",\n" if self._samples else "")
        self._spool.write(embedded(entry))
        self._samples += 1
        self._tokens += len(sample.example.ids)
        self._supervised += supervised

    def write(
        self,
        path: Path,
        *,
        model: str,
        rows: int,
        refused: Iterable[Mapping[str, Any]],
        findings: Iterable[DataFinding],
        rejected: int,
    ) -> None:
        """Write the page.

        Args:
            path: the file; a page that is there is replaced.
            model: as the user named it.
            rows: rows of all sources.
            refused: entries of `Rejects.entries`, read once.
            findings: what else there is to say.
            rejected: number of refused rows.

        Raises:
            WriteError: ``QC-WRITE-*``.
        """
        listed = chain(
            (self._refused(entry) for entry in refused),
            (finding.as_json() for finding in findings),
        )
        meta = {
            "model": model, "rows": rows, "rejected": rejected, "tokens": self._tokens,
            "supervised": self._supervised, "special": self._special, "media": list(self._media),
            "left": "" if self._size < THUMBNAILS else "thumbnails are left out beyond 24 MB",
        }  # fmt: skip
        before, after = _frame()
        with writing(path):
            part = path.with_name(f".{path.name}.part")
            try:
                with part.open("w", encoding="utf-8") as file:
                    file.write(before + '{"samples":[\n')
                    self._spool.seek(0)
                    for piece in iter(partial(self._spool.read, 1 << 20), ""):
                        file.write(piece)
                    file.write('],\n"findings":[')
                    for number, finding in enumerate(listed):
                        file.write(("," if number else "") + embedded(finding))
                    # After the findings, which name further sources.
                    rest = {
                        "whys": list(self._whys), "sources": list(self._sources),
                        "formats": list(self._formats), "thumbs": list(self._thumbs), "meta": meta,
                    }  # fmt: skip
                    file.write("],\n" + embedded(rest)[1:] + after)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def _refused(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The finding of a row that is refused, skipped, dropped or cut."""
        return {
            "code": entry["code"],
            "severity": "error" if entry["action"] == REFUSED else "warning",
            "row": entry["row"],
            "field": entry["field"],
            "message": entry["reason"],
            "fix": entry["fix"],
            "refused": entry["action"] != CUT,
            "place": entry["place"],
            "source": _number(self._sources, str(entry["file"])),
        }

    def _shortened(self, text: str) -> str:
        for token, run in zip(self._media, self._runs, strict=True):
            text = run.sub(partial(_product, token), text)
        return text

    @property
    def thumbnail(self) -> int:
        """Pixels of the longer side of the next thumbnail."""
        sizes = (size for share, size in _SMALLER if self._size >= share * THUMBNAILS)
        return min(sizes, default=THUMBNAIL)

    def _thumbnail(self, url: str) -> int:
        """The number of a thumbnail; -1 without one."""
        if not url or self._size >= THUMBNAILS:
            return -1
        if url not in self._thumbs:
            self._size += len(url)
        return _number(self._thumbs, url)


def _frame() -> tuple[str, str]:
    """The page before and after its data."""
    folder = files(__package__)
    html, style, script = (
        folder.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "page.js")
    )
    policy = (
        "default-src 'none'; img-src data:; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    html = html.replace("@@POLICY@@", policy).replace("@@STYLE@@", style)
    before, _, after = html.replace("@@SCRIPT@@", script).partition("@@DATA@@")
    return before, after


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")


def _number(names: dict[str, int], name: str) -> int:
    """The number of a name, which is the next one if it is new."""
    return names.setdefault(name, len(names))


def _product(token: str, run: re.Match[str]) -> str:
    return f"{token} x {len(run.group()) // len(token)} "

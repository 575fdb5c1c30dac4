"""Pages of made-up samples, without a checkpoint or a template."""

from __future__ import annotations

from array import array
from pathlib import Path

from support.chat_kit import own_tokenizer

from qcore.data.findings import DataFinding
from qcore.data.rendering.masking import IGNORED, Example
from qcore.data.rendering.samples import Span
from qcore.data.rows import ChatRow
from qcore.data.sources.source import Source
from qcore.data.views.page import Page
from qcore.data.views.show import ShownSample

HOSTILE = (
    '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">'
    "<!--<script> &lt;b&gt; \u2028\u2029 \x1b[31m\x07 \u202eabc \U0001f600"
)


def write_page(path: Path, count: int, image: str = "") -> None:
    """Write a page of `count` rows; every 17th holds hostile text, every 50th is refused.

    Args:
        path: the file.
        count: rows.
        image: the data URL of a picture of the first row.
    """
    tokenizer = own_tokenizer()
    page = Page(tokenizer)
    refused = []
    for row in range(1, count + 1):
        if row % 50 == 0:
            refused.append(
                {"row": row, "file": f"{HOSTILE}.jsonl", "place": f"line {row}",
                 "code": "QC-DATA-006", "field": "messages[0].role", "reason": HOSTILE,
                 "fix": "write user", "action": "refused"}
            )  # fmt: skip
            continue
        said = HOSTILE if row % 17 == 0 else f"Answer number {row}. " * (1 + row % 30)
        parts = (
            (f"<|im_start|>user\nQuestion {row}?<|im_end|>\n", "user turn", False),
            ("<|im_start|>assistant\n", "prompt", False),
            (said, "answer", True),
            ("<|im_end|>", "end of turn", True),
        )
        ids: list[int] = []
        trained: list[bool] = []
        spans: list[Span] = []
        for text, why, on in parts:
            more = tokenizer.encode(text, add_special_tokens=False).ids
            spans.append(Span(start=len(ids), end=len(ids) + len(more), why=why, trained=on))
            ids += more
            trained += [on] * len(more)
        labels = [id_ if on else IGNORED for id_, on in zip(ids, trained, strict=True)]
        example = Example(
            ids=array("i", ids), labels=array("i", labels), line=row, turns=1,
            supervised=sum(trained), row=row, token_spans=tuple(spans),
        )  # fmt: skip
        origin = ChatRow(
            line=row, messages=(), path=path, format="trl" if row % 3 else "openai",
            source=Source(name="rows.jsonl", files=(path,)),
        )  # fmt: skip
        sample = ShownSample(origin=origin, example=example)
        page.add(sample, [("image cat.png", image)] if image and row == 1 else ())
    note = DataFinding(code="QC-DATA-045", severity="note", row=0, field="", message=HOSTILE)
    dropped = DataFinding(
        code="QC-DATA-043", severity="warning", row=2, field="messages[1]", message="is lost"
    )
    page.write(
        path, model=HOSTILE, rows=count, refused=refused, findings=[note, dropped],
        rejected=len(refused),
    )  # fmt: skip

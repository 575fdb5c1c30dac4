"""Chat format of Qwen 3.6: that of Qwen 3.5 with one more template switch and JSON scalars.

The changes from 3.5, JSON in tool arguments and the opt-in ``preserve_thinking``, are made by the
template: they change the text of a turn, not where a turn starts, what inference puts in the
prompt, or what ends a turn. The parser reads ``null`` and ``true`` where that of 3.5 reads ``None``
and ``True``. With ``preserve_thinking`` every assistant turn has a think block; an
empty block is a prompt tail and is not supervised, reasoning in a block is.
"""

from __future__ import annotations

from dataclasses import replace

from qcore.api import ChatFormat
from qcore_qwen35.api import QWEN35, ReplyParser

QWEN36: ChatFormat = replace(QWEN35, parse=ReplyParser(python_scalars=False))

#: Variables that the template compares with ``is true`` or ``is false``.
SWITCHES = ("enable_thinking", "preserve_thinking")

"""Chat format of Qwen 3.6, which is that of Qwen 3.5 with one more template switch.

The changes from 3.5, JSON in tool arguments and the opt-in ``preserve_thinking``, are made by the
template: they change the text of a turn, not where a turn starts, what inference puts in the
prompt, or what ends a turn. With ``preserve_thinking`` every assistant turn has a think block; an
empty block is a prompt tail and is not supervised, reasoning in a block is.
"""

from __future__ import annotations

from qcore.api import ChatFormat
from qcore_qwen35.api import QWEN35

QWEN36: ChatFormat = QWEN35

#: Variables that the template compares with ``is true`` or ``is false``.
SWITCHES = ("enable_thinking", "preserve_thinking")

"""Chat format of Qwen 3.6: that of 3.5.

What changed between them, JSON in tool arguments and the opt-in ``preserve_thinking``, is the
template's own doing: it changes which text a turn holds, not where a turn begins, what
inference puts in the prompt, or what ends it. With ``preserve_thinking`` every assistant turn
has a think block; an empty one is a prompt tail and is not trained, the reasoning in another is.
"""

from __future__ import annotations

from qcore.api import ChatFormat
from qcore_qwen35.api import QWEN35

QWEN36: ChatFormat = QWEN35

#: Variables that the template compares with ``is true`` or ``is false``.
SWITCHES = ("enable_thinking", "preserve_thinking")

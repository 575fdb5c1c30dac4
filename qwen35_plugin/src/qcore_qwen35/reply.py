"""The inverse of the chat template for one assistant turn: text to reasoning, content and calls.

This file decides where reasoning ends and what is a tool call:

- reasoning ends at the first ``</think>``; one newline before it and up to two after it are markup;
- a call is ``<tool_call>``, ``<function=name>``, parameters, ``</function>`` and ``</tool_call>``,
  with only white space between the tags;
- a value ends at the first ``</parameter>`` that ``<parameter=`` or ``</function>`` follows, with
  the newlines that the template writes if there is such a place, so a value may contain the tag;
  one newline at each end is markup;
- up to two newlines before the first call, and white space between and after calls, are markup.

Everything else is content, as it is: text after a call, markup that is cut off or not as above, and
a call that repeats a parameter. Parsing never raises, and its time is linear in the text.
`qcore_qwen35.reply_values` gives values their types.

Some messages cannot be recovered, because another message renders to the same text:

- white space at the ends of content and reasoning, which the template trims;
- ``</think>`` in reasoning, or in content without ``reasoning_content``;
- a whole call in content, or the beginning of one in content before calls;
- a value with lines that are ``</parameter>`` and ``<parameter=...>``, or ``</parameter>``,
  ``</function>`` and ``</tool_call>``;
- a function name with ``<``, ``>`` or a newline, a parameter name with ``>`` or a newline;
- a value whose type the schema does not decide, such as the string ``1`` without a schema.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .reply_values import typed

OPEN_THINK, CLOSE_THINK = "<think>", "</think>"
_ENDS = ("<|im_end|>", "<|endoftext|>")
_CALL = re.compile(r"<tool_call>\s*<function=([^<>\n]+)>\s*")
_PARAMETER = re.compile(r"<parameter=([^>\n]*)>")
_VALUE_END = re.compile(r"</parameter>\s*(?=<parameter=|</function>)")
_EXACT_END = re.compile(r"\n</parameter>\n(?=<parameter=[^>\n]*>\n|</function>\n</tool_call>)")
_CALL_END = re.compile(r"</function>\s*</tool_call>")


@dataclass(frozen=True, slots=True)
class ReplyParser:
    """Parses assistant turns; a `qcore.api.ParseReply`.

    Attributes:
        python_scalars: whether the generation's template writes a number, boolean or null in an
            argument with Python's ``str``; false: as JSON.
    """

    python_scalars: bool

    def __call__(
        self,
        text: str,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        thinking: bool = False,
    ) -> dict[str, Any]:
        """Parse what a model generated into a message.

        Args:
            text: the generated text with its special tokens; the end-of-turn token may be absent.
            tools: function descriptions, nested under ``function`` or flat.
            thinking: whether the prompt opened a think block. If the block is not closed, all of
                the text is reasoning.

        Returns:
            ``role`` and ``content``, with ``reasoning_content`` and ``tool_calls`` if the text has
            them.
        """
        reasoning, content = _without_reasoning(_without_end(text), thinking)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        pieces, calls = _Calls(content).parse()
        if calls:
            declared = _parameters(tools or ())
            message["content"] = "".join(pieces)
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": name,
                        "arguments": self._arguments(values, declared.get(name)),
                    },
                }
                for name, values in calls
            ]
        return message

    def _arguments(self, values: Mapping[str, str], root: Any) -> dict[str, Any]:
        given = root if isinstance(root, Mapping) else {}
        properties, more = given.get("properties"), given.get("additionalProperties")
        properties = properties if isinstance(properties, Mapping) else {}
        return {
            key: typed(value, properties.get(key, more), root, self.python_scalars)
            for key, value in values.items()
        }


def _without_end(text: str) -> str:
    """Remove the end-of-turn token, and the newline that the template writes after it."""
    for end in _ENDS:
        for tail in (end, f"{end}\n"):
            if text.endswith(tail):
                return text.removesuffix(tail)
    return text


def _without_reasoning(text: str, thinking: bool) -> tuple[str, str]:
    """Split a text into reasoning and the rest."""
    if not thinking:
        if not text.startswith(OPEN_THINK) or CLOSE_THINK not in text:
            return "", text
        text = text.removeprefix(OPEN_THINK).removeprefix("\n")
    reasoning, close, rest = text.partition(CLOSE_THINK)
    if close:
        reasoning = reasoning.removesuffix("\n")
        rest = rest.removeprefix("\n").removeprefix("\n")
    return reasoning, rest


def _parameters(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Schema of the parameters by name of the function; the first description of a name counts."""
    found: dict[str, Any] = {}
    for tool in tools:
        described = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(described, Mapping) and isinstance(described.get("name"), str):
            found.setdefault(described["name"], described.get("parameters"))
    return found


@dataclass(slots=True)
class _Calls:
    """Finds the calls in a text.

    Attributes:
        text: the text.
        ends: start and end of every tag that can end a value, in order.
        exact: the same of those with the newlines of the template, which are included.
        dead: positions between parameters from which no call is complete. Several starts of a
            call may lead to one position: without this, the time would be quadratic.
    """

    text: str
    ends: list[tuple[int, int]] = field(default_factory=list)
    exact: list[tuple[int, int]] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)

    def parse(self) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
        """The pieces of text outside of calls, and name and parameters of each call."""
        pieces: list[str] = []
        calls: list[tuple[str, dict[str, str]]] = []
        done = 0
        match = _CALL.search(self.text)
        if match is not None:
            self.ends = [found.span() for found in _VALUE_END.finditer(self.text)]
            self.exact = [found.span() for found in _EXACT_END.finditer(self.text)]
        while match is not None:
            spans, end = self._body(match.end())
            if spans is None:
                match = _CALL.search(self.text, max(end, match.start() + 1))
                continue
            pieces.append(_outside(self.text[done : match.start()], first=not calls))
            values = {key: self.text[start:stop] for key, (start, stop) in spans.items()}
            calls.append((match[1], values))
            done = end
            match = _CALL.search(self.text, done)
        pieces.append(_outside(self.text[done:], first=False) if calls else self.text)
        return pieces, calls

    def _body(self, at: int) -> tuple[dict[str, tuple[int, int]] | None, int]:
        """The ranges of a call's values from `at`, and its end.

        Returns:
            ``None`` for the ranges of a call that is not complete; the search for the next one
            then goes on inside it, or behind a parameter that the call repeats.
        """
        spans: dict[str, tuple[int, int]] = {}
        passed: list[int] = []
        while at not in self.dead:
            passed.append(at)
            end = _CALL_END.match(self.text, at)
            if end is not None:
                return spans, end.end()
            opened = _PARAMETER.match(self.text, at)
            value = self._value(opened.end()) if opened else None
            if opened is None or value is None:
                break
            if opened[1] in spans:
                return None, at
            spans[opened[1]], at = value
        self.dead.update(passed)
        return None, 0

    def _value(self, start: int) -> tuple[tuple[int, int], int] | None:
        """The range of the value after a tag that ends at `start`, and where its end tag ends."""
        newline = self.text.startswith("\n", start)
        if newline:
            found = bisect_left(self.exact, (start + 1, 0))
            if found < len(self.exact):
                stop, after = self.exact[found]
                return (start + 1, stop), after
        found = bisect_left(self.ends, (start, 0))
        if found == len(self.ends):
            return None
        stop, after = self.ends[found]
        start += newline
        return (start, stop - (stop > start and self.text[stop - 1] == "\n")), after


def _outside(text: str, first: bool) -> str:
    """Text outside of calls without the newlines of the markup."""
    if first:
        return text.removesuffix("\n").removesuffix("\n")
    return text if text.strip() else ""


#: The parser of Qwen 3.5.
parse_reply = ReplyParser(python_scalars=True)

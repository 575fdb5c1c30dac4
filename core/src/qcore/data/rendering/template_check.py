"""A self-test of chat template and chat format, run before any row is rendered.

This file decides which properties are tested: in small known conversations exactly the assistant's
words are trained, and the control tokens of a media part are rendered in the turn of its message.
A wrong chat format, or a template of another generation, is an error instead of a wrong mask.
`qcore.data.rendering.masking` makes the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...api.media import RowError
from ...api.records import ChatFormat
from ...errors import InputError
from .masking import IGNORED, labels, spans, trained_text
from .pieces import normalized
from .tokenizer_check import unknown_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ...api.media import MediaReader
    from ...checkpoint.chat_template import Template

_TOOL = {
    "type": "function",
    "function": {
        "name": "find_river",
        "description": "foxglove",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


def _message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def prove_mask(
    template: Template,
    chat_format: ChatFormat,
    tokenizer: Tokenizer,
    *,
    variables: Mapping[str, Any] | None = None,
) -> None:
    """Render known conversations and check the trained text and the generation prompt.

    Args:
        template: the checkpoint's.
        chat_format: the expected format of rendered conversations.
        tokenizer: from `load_tokenizer`.
        variables: variables of the template.

    Raises:
        InputError: ``QC-MASK-003`` the template does not match the chat format,
            ``QC-PRE-003`` the tokenizer lacks a token; or as `Template.render`.
    """
    _check_tokens(chat_format.stop_tokens, tokenizer, "which ends generation")
    if chat_format.turn_end not in chat_format.stop_tokens:
        raise _error(template, "the end-of-turn token is not a stop token", chat_format.turn_end,
                     " or ".join(chat_format.stop_tokens))  # fmt: skip
    proof = _Proof(template, chat_format, tokenizer, variables or {})
    assistant = chat_format.assistant
    plain = [
        _message("user", "amber"),
        _message(assistant, "birch"),
        _message("user", "cedar"),
        _message(assistant, "dahlia"),
    ]
    if "system" in chat_format.roles:
        plain.insert(0, _message("system", "elder"))
    proof.turns(plain)
    proof.prompt(plain)
    thinking = [dict(message) for message in plain]
    thinking[-1]["reasoning_content"] = "fennel"
    proof.turns(thinking)
    if "tool" in chat_format.roles:
        arguments: Any = {"town": "ginkgo"} if chat_format.parse_arguments else '{"town": "ginkgo"}'
        call = {"type": "function", "function": {"name": "find_river", "arguments": arguments}}
        calling = [
            *plain[:-1],
            _message(assistant, "hazel", reasoning_content="iris", tool_calls=[call]),
            _message("tool", "juniper"),
            _message(assistant, "lilac", reasoning_content="mallow"),
            _message("user", "nettle"),
            _message(assistant, "osier"),
        ]
        proof.turns(calling[:-2], tools=[_TOOL])
        proof.turns(calling, tools=[_TOOL])


def prove_media(
    template: Template,
    chat_format: ChatFormat,
    tokenizer: Tokenizer,
    reader: MediaReader,
    *,
    variables: Mapping[str, Any] | None = None,
) -> None:
    """Render each kind of media and check that a placeholder is rendered.

    Args:
        template: the checkpoint's.
        chat_format: the expected format of rendered conversations.
        tokenizer: from `load_tokenizer`.
        reader: reads the media of the rows.
        variables: variables of the template.

    Raises:
        InputError: ``QC-MASK-003`` the template drops a kind, ``QC-PRE-003`` the tokenizer
            lacks a placeholder; or as `Template.render`.
    """
    _check_tokens(reader.control, tokenizer, "which is a placeholder of media")
    proof = _Proof(template, chat_format, tokenizer, variables or {})
    for kind in reader.kinds:
        proof.medium(kind, reader.control)


def _check_tokens(tokens: Sequence[str], tokenizer: Tokenizer, purpose: str) -> None:
    for error in unknown_tokens(tokens, tokenizer.token_to_id, purpose=purpose):
        raise error


class _Proof:
    def __init__(
        self,
        template: Template,
        chat_format: ChatFormat,
        tokenizer: Tokenizer,
        variables: Mapping[str, Any],
    ) -> None:
        self.template = template
        self.format = chat_format
        self.tokenizer = tokenizer
        self.variables = variables

    def turns(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> None:
        """Check that exactly the text of assistant turns is trained."""
        text = self.template.render(messages, tools, **self.variables)
        said = [message for message in messages if message["role"] == self.format.assistant]
        found = self._spans(text, len(said))
        others = [m["content"] for m in messages if m["role"] != self.format.assistant]
        for message, (start, end) in zip(said, found, strict=True):
            self._turn(message, text[start:end], others)
        outside = text
        for start, end in reversed(found):
            outside = outside[:start] + outside[end:]
        for message in said:
            if message["content"] in outside:
                raise self._error(
                    "the text of an assistant turn is rendered outside of it", message["content"]
                )
        for word in others:
            if word not in outside:
                raise self._error("the text of another turn is dropped", f"no {word!r}")
        self._tokens(text, found)

    def _spans(self, text: str, turns: int) -> list[tuple[int, int]]:
        try:
            return spans(text, self.format, turns)
        except RowError as bad:
            raise self._error(f"it {bad.what}", bad.found, bad.expected) from None

    def _turn(self, message: dict[str, Any], trained: str, others: list[str]) -> None:
        content, reasoning = message["content"], message.get("reasoning_content")
        whole = content + self.format.turn_end
        if reasoning is None and "tool_calls" not in message and trained != whole:
            raise self._error("a plain answer is masked wrongly", repr(trained), repr(whole))
        # Reasoning comes first; turns before the last question may omit it.
        first = reasoning if reasoning is not None and reasoning in trained else content
        calls = "tool_calls" in message
        if (
            not trained.startswith(first)
            or content not in trained
            or not trained.endswith(self.format.turn_end if calls else whole)
            or (calls and ("find_river" not in trained or "ginkgo" not in trained))
        ):
            raise self._error(
                "an answer with reasoning or a tool call is masked wrongly", repr(trained)
            )
        for word in others:
            if word in trained:
                raise self._error("the text of another turn is trained", repr(word))

    def _tokens(self, text: str, found: list[tuple[int, int]]) -> None:
        text = normalized(text, self.tokenizer)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        made = labels(encoding.ids, encoding.offsets, found)
        kept = [label for label in made if label != IGNORED]
        decoded = self.tokenizer.decode(kept, skip_special_tokens=False)
        wanted = trained_text(text, found)
        if decoded != wanted:
            raise self._error(
                "the supervised tokens decode to other text",
                repr(decoded),
                repr(wanted),
            )

    def medium(self, kind: str, control: Sequence[str]) -> None:
        """Check that a media part becomes control tokens between the texts around it."""
        parts = [
            {"type": "text", "text": "amber"},
            {"type": kind, kind: kind},
            {"type": "text", "text": "birch"},
        ]
        messages = [{"role": "user", "content": parts}, _message(self.format.assistant, "cedar")]
        try:
            text = self.template.render(messages, **self.variables)
        except InputError as error:
            if error.code != "QC-TEMPLATE-002":
                raise
            return  # the template refuses this kind; rows with it will fail with that error
        self._spans(text, 1)
        _, amber, rest = text.partition("amber")
        between, birch, _ = rest.partition("birch")
        if not amber or not birch or not any(token in between for token in control):
            raise self._error(
                f"a part of type {kind!r} is dropped", repr(text[:120]), " or ".join(control)
            )

    def prompt(self, messages: list[dict[str, Any]]) -> None:
        """Check that a generation prompt ends in a header and a known tail."""
        text = self.template.render(messages[:-1], add_generation_prompt=True, **self.variables)
        header = self.format.turn_start + self.format.assistant + self.format.role_end
        tail = text[text.rfind(header) + len(header) :] if header in text else None
        if tail is None or tail not in ("", *self.format.prompt_tails):
            raise self._error(
                "its generation prompt has an unknown ending",
                repr(text[-60:]),
                " or ".join(repr(header + known) for known in self.format.prompt_tails),
            )

    def _error(self, what: str, found: object | None, expected: object | None = None) -> InputError:
        return _error(self.template, what, found, expected)


def _error(
    template: Template, what: str, found: object | None, expected: object | None
) -> InputError:
    return InputError(
        "QC-MASK-003",
        f"does not match the plugin's chat format: {what}",
        file=template.source,
        found=found,
        expected=expected,
        fix="use the chat template that came with the weights",
    )

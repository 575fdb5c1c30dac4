"""What a chat template does with a conversation, shown by rendering small ones.

This file decides which abilities are probed, because the repair of a row depends on them
(`qcore.data.repairs.repair`): a template of another generation may split think blocks, write tool
calls as JSON or accept a late system turn. `qcore.data.rendering.template_check` checks the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...api.records import ChatFormat
from ...api.views import TemplateView
from ...errors import InputError
from ..think_block import thinking_marks

_REFUSALS = ("QC-TEMPLATE-002", "QC-TEMPLATE-003")  #: of the conversation, not of the template


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What a chat template renders.

    Attributes:
        splits_content: a think block in ``content`` becomes the turn's reasoning.
        reads_reasoning: ``reasoning_content`` is rendered.
        calls: how ``tool_calls`` are rendered: ``json`` as Hermes writes them,
            ``other`` in another way, empty: not at all.
        wraps_results: a tool result is put between the tags of the chat format.
        late_system: a system turn after a user turn is rendered.
        answers_first: a prompt without a user turn is rendered.
    """

    splits_content: bool = True
    reads_reasoning: bool = True
    calls: str = "other"
    wraps_results: bool = True
    late_system: bool = False
    answers_first: bool = False


def probe_abilities(
    template: TemplateView, chat_format: ChatFormat, variables: Mapping[str, Any] | None = None
) -> Abilities:
    """Render small conversations and look for what became of them.

    Args:
        template: the checkpoint's.
        chat_format: the format of rendered conversations; a value of its `splits_content` is
            taken instead of the probe.
        variables: variables of the template.

    Raises:
        InputError: as `Template.render`, except that the template refuses a conversation.
    """
    probe = _Probe(template, chat_format, variables or {})
    splits, reads = probe.thinking()
    if chat_format.splits_content is not None:
        splits = chat_format.splits_content
    return Abilities(
        splits_content=splits,
        reads_reasoning=reads,
        calls=probe.calls(),
        wraps_results=probe.wraps_results(),
        late_system=probe.late_system(),
        answers_first=probe.answers_first(),
    )


class _Probe:
    def __init__(
        self, template: TemplateView, chat_format: ChatFormat, variables: Mapping[str, Any]
    ) -> None:
        self.template = template
        self.format = chat_format
        self.variables = variables
        self.asked = {"role": "user", "content": "amber"}

    def said(self, content: str, **more: Any) -> dict[str, Any]:
        return {"role": self.format.assistant, "content": content, **more}

    def render(self, *messages: Mapping[str, Any], prompt: bool = False) -> str:
        """The text; empty if the template refuses the conversation."""
        try:
            return self.template.render(
                list(messages), None, add_generation_prompt=prompt, **self.variables
            )
        except InputError as error:
            if error.code not in _REFUSALS:
                raise
            return ""

    def thinking(self) -> tuple[bool, bool]:
        """Whether a think block in content, and ``reasoning_content``, are rendered as such."""
        marks = thinking_marks(self.format)
        if marks is None:
            return False, False
        apart = self.said("birch", reasoning_content="fennel")
        inside = self.said(f"{marks[0]}\nfennel\n{marks[1]}\n\nbirch")
        texts = [self.render(self.asked, said, self.asked, said) for said in (apart, inside)]
        return bool(texts[0]) and texts[0] == texts[1], "fennel" in texts[0]

    def _called(self) -> tuple[str, str]:
        arguments: Any = {"town": "ginkgo"} if self.format.parse_arguments else '{"town": "ginkgo"}'
        call = {"type": "function", "function": {"name": "find_river", "arguments": arguments}}
        if "tool" not in self.format.roles:
            return "", ""
        calling = self.said("", tool_calls=[call])
        alone = self.render(self.asked, calling)
        answered = self.render(
            self.asked, calling, {"role": "tool", "content": "juniper"}, self.said("lilac")
        )
        return alone, answered

    def calls(self) -> str:
        """How calls are rendered."""
        text, _ = self._called()
        if "find_river" not in text:
            return ""
        written = '{"name": "find_river", "arguments": {"town": "ginkgo"}}'
        return "json" if written in text else "other"

    def wraps_results(self) -> bool:
        """Whether results are put between tags."""
        tags = self.format.result_tags
        if tags is None:
            return False
        _, text = self._called()
        before, result, after = text.partition("juniper")
        inside = before.rstrip().endswith(tags[0]) and after.lstrip().startswith(tags[1])
        return bool(result) and inside

    def late_system(self) -> bool:
        """Whether a system turn may follow a user turn."""
        if "system" not in self.format.roles:
            return False
        late = {"role": "system", "content": "elder"}
        text = self.render(self.asked, self.said("birch"), late, self.asked, self.said("cedar"))
        return text.find("birch") < text.find("elder") < text.find("cedar")

    def answers_first(self) -> bool:
        """Whether the prompt of a reply to nothing but a system turn is rendered."""
        if "system" not in self.format.roles:
            return False
        return "elder" in self.render({"role": "system", "content": "elder"}, prompt=True)

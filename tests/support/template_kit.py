"""Own chat templates in the manner of each generation of the Qwen family.

Put together from the rules that tests/qwen36/conversations.txt states; no published template is
in here. What is not named by an argument is the same in all generations.
"""

from __future__ import annotations

from qcore.checkpoint.chat_template import Template

PYTHON = "v | tojson if v is mapping or (v is sequence and v is not string) else v | string"
JSON = "v if v is string else v | tojson"
STRIPPED = "loop.index0 > ns.last"
ALWAYS = "true"
OPT_IN = "(preserve_thinking is defined and preserve_thinking is true) or loop.index0 > ns.last"
OPT_OUT = "preserve_thinking is undefined or preserve_thinking is true or loop.index0 > ns.last"
THINK = "OFF if enable_thinking is defined and enable_thinking is false else ON"
NO_THINK = "ON if enable_thinking is defined and enable_thinking is true else OFF"

_TEXT = """\
EXTRA
{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}{%- for part in content or [] -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1, body='', why='') -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if ns.last < 0 -%}{{ raise_exception('No user turn.') }}{%- endif -%}
{%- set system = text(messages[0].content) | trim if messages[0].role == 'system' else none -%}
{%- if tools or system is not none -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if tools -%}
    {{- '# Tools\\n' + tools | tojson + '\\n</IMPORTANT>' -}}
    {%- if system -%}{{- '\\n\\n' -}}{%- endif -%}
  {%- endif -%}
  {{- (system or '') + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- set ns.body = text(m.content) | trim -%}
  {%- if m.role == 'user' -%}
    {{- '<|im_start|>user\\n' + ns.body + '<|im_end|>\\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + ns.body + '\\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- elif m.role == 'assistant' -%}
    {%- set ns.why = m.reasoning_content or '' -%}
    {%- if m.reasoning_content is not string and '</think>' in ns.body -%}
      {%- set ns.why = ns.body.split('</think>')[0].split('<think>')[-1] -%}
      {%- set ns.body = ns.body.split('</think>')[-1] | trim -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if KEEP -%}{{- '<think>\\n' + ns.why | trim + '\\n</think>\\n\\n' -}}{%- endif -%}
    GENERATION{{- ns.body -}}
    {%- for c in m.tool_calls or [] -%}
      {%- set f = c.function or c -%}
      {{- '\\n\\n' if loop.first and ns.body else '' if loop.first else '\\n' -}}
      {{- '<tool_call>\\n<function=' + f.name + '>\\n' -}}
      {%- for k, v in (f.arguments or {}) | items -%}
        {{- '<parameter=' + k + '>\\n' -}}{{- ARGUMENTS -}}{{- '\\n</parameter>\\n' -}}
      {%- endfor -%}
      {{- '</function>\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>' -}}ENDGENERATION{{- '\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{{- TAIL -}}{%- endif -%}
"""


def family_template(
    arguments: str = PYTHON,
    keep: str = STRIPPED,
    tail: str = THINK,
    *,
    extra: str = "",
    training: bool = False,
) -> Template:
    """A template of the family.

    Args:
        arguments: how a tool argument ``v`` is written.
        keep: when a turn has its think block.
        tail: what inference puts after the assistant's header.
        extra: text at its start.
        training: marks what is trained with ``{% generation %}``.
    """
    tail = tail.replace("OFF", "'<think>\\n\\n</think>\\n\\n'").replace("ON", "'<think>\\n'")
    text = _TEXT
    for word, value in (
        ("ENDGENERATION", "{%- endgeneration -%}" if training else ""),
        ("GENERATION", "{%- generation -%}" if training else ""),
        ("EXTRA", extra),
        ("ARGUMENTS", arguments),
        ("KEEP", keep),
        ("TAIL", tail),
    ):
        text = text.replace(word, value)
    return Template(text, "chat_template.jinja")


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OWN_35 = family_template()
OWN_35_NO_THINK = family_template(tail=NO_THINK)
OWN_36 = family_template(JSON, OPT_IN)
LATER = family_template(JSON, OPT_OUT, extra="{{- reasoning_effort | default('') -}}")

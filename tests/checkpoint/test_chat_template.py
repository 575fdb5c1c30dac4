"""Templates: the text of ``apply_chat_template``, in a process that bombs cannot leave."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import TEMPLATE, own_template, own_tokenizer
from support.tiers import fast

from qcore.checkpoint import chat_template_worker as render_worker
from qcore.checkpoint.chat_template import Prefix, Template
from qcore.data.rows import ChatRow
from qcore.errors import InputError

WORDS = ["amber", "<b>bold</b>", "a & b", "it's so", "हिन्दी", "مُحَمَّد", "e\u0301",
         "{{ x }}", "line\nline", "  padded  ", "你好", "👍🏽", "\u2028",
         "</div>", "{% if %}", "0"]  # fmt: skip
VALUES: list[Any] = [True, None, 3, -0.5, 1e30, "text", "<&'>", ["a", 1, None],
                     {"k": [False]}, ""]  # fmt: skip
SKUS = {
    "think": "qwen3.5/Qwen3.5-4B",
    "no-think": "qwen3.5/Qwen3.5-0.8B",
    "3.6": "qwen3.6/Qwen3.6-27B",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Find <b>& sort</b> it's “this”",
            "parameters": {"z": 1, "a": {"default": None, "enum": ["é", True]}},
        },
    }
]


def conversation(rng: random.Random) -> list[dict[str, Any]]:
    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))

    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": text()})
    for _ in range(rng.randint(1, 3)):
        parts = [{"type": "text", "text": text()} for _ in range(rng.randint(1, 3))]
        messages.append({"role": "user", "content": rng.choice([text(), parts]), "name": None})
        for _ in range(rng.choice([0, 0, 1, 2])):
            calls = [
                {"type": "function", "function": {
                    "name": "find",
                    "arguments": {f"k{n}": rng.choice(VALUES) for n in range(rng.randint(0, 3))},
                }}
                for _ in range(rng.randint(1, 2))
            ]  # fmt: skip
            messages.append(
                {"role": "assistant", "content": rng.choice([None, "", text()]),
                 "tool_calls": calls, **thought(rng, text())}
            )  # fmt: skip
            messages.extend({"role": "tool", "content": text()} for _ in calls)
        messages.append({"role": "assistant", "content": text(), **thought(rng, text())})
    return messages


def thought(rng: random.Random, text: str) -> dict[str, Any]:
    key = rng.choice(["reasoning_content", "thinking", "reasoning", None, None])
    return {} if key is None else {key: rng.choice([text, "", None])}


@pytest.fixture(scope="module")
def stock() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own_tokenizer(), eos_token="<|im_end|>"
    )


def compare(template: Template, stock: Any, count: int) -> None:
    rng = random.Random(7)
    with template:
        for number in range(count):
            messages = conversation(rng)
            more: dict[str, Any] = {"tools": rng.choice([None, TOOLS])}
            more["add_generation_prompt"] = bool(number % 2)
            if number % 3 == 0:
                more["enable_thinking"] = rng.choice([True, False, "false", 0])
            if number % 5 == 0:
                more["preserve_thinking"] = more["keep_thinking"] = rng.choice([True, "true"])
            wanted = stock.apply_chat_template(
                messages, chat_template=template.text, tokenize=False, **more
            )
            assert template.render(messages, eos_token="<|im_end|>", **more) == wanted


@pytest.mark.parametrize("sku", SKUS)
def test_real_templates_render_as_in_transformers(shared: Path, stock: Any, sku: str) -> None:
    text = (shared / "skus" / SKUS[sku] / "chat_template.jinja").read_text(encoding="utf-8")
    compare(Template(text, sku), stock, 60)


OWN = (
    TEMPLATE.replace("tools | tojson", "tools | tojson(indent=2)").replace(
        "m.content | trim", "(m.content if m.content is string else m.content | tojson) | trim"
    )
    + "{{ eos_token }}{{ bos_token }}{{ [1] | tojson(separators=(',', ':'), sort_keys=True) }}"
    + "{% for n in range(5) %}{% if n == 1 %}{% continue %}{% endif %}{{ n }}"
    + "{% if n == 3 %}{% break %}{% endif %}{% endfor %}"
    + "{% set ns = namespace(self=1) %}{{ ns.self }}{{ dict(a=1) | tojson }}\n"
    + "    {% if true %}    \n  kept\n    {% endif %}  \n{{ documents is none }}"
    + "{{ '%05.1f' % 2.25 }}{{ messages[0].absent }}{{ {'b': 1, 'a': 2} | items | list }}"
)


def test_own_template_renders_as_in_transformers(stock: Any) -> None:
    compare(own_template(OWN), stock, 40)


def test_time_is_local_as_in_transformers(stock: Any) -> None:
    text = "{{ strftime_now('%Y %Z') }}"
    wanted = stock.apply_chat_template([{"role": "user"}], chat_template=text, tokenize=False)
    assert own_template(text).render([]) == wanted


LOOP = "{% for a in range(99999) %}"
BOMBS = {
    "endless": (LOOP * 3 + "{% endfor %}" * 3, "QC-TEMPLATE-004"),
    "power": ("{{ 7 ** (7 ** 10) }}", "QC-TEMPLATE-004"),
    "huge output": (LOOP + "{{ 'x' * 1000 }}{% endfor %}", "QC-TEMPLATE-006"),
    "one huge block": ("{{ 'x' * 30000000 }}", "QC-TEMPLATE-006"),
    "memory": ("{{ 'x' * 10 ** 12 }}", "QC-TEMPLATE-005"),
    "memory by doubling": (
        "{% set ns = namespace(x='x' * 64) %}" + LOOP + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "QC-TEMPLATE-005",
    ),
    "memory by nesting": (
        "{% set ns = namespace(x=[1]) %}" + LOOP + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "QC-TEMPLATE-005",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "QC-TEMPLATE-003"),
    "range": ("{% for a in range(10 ** 9) %}{% endfor %}", "QC-TEMPLATE-003"),
    "deep source": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "QC-TEMPLATE-003"),
    "deep blocks": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, None),
    "padding": ("{{ '%999999999999d' % 1 }}", None),
    "format": ("{{ '{:>9999999999}'.format(1) }}", None),
    "deep data": (  # too deep to print, or no time to come so far: the machine decides
        "{% set ns = namespace(x=[]) %}" + LOOP + "{% set ns.x = [ns.x] %}{% endfor %}"
        "{{ ns.x | tojson }}",
        None,
    ),
}  # fmt: skip


@pytest.mark.timing
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_bounded(bomb: str) -> None:
    text, code = BOMBS[bomb]
    start = time.monotonic()
    with Template(text, "bomb.jinja") as template, pytest.raises(InputError) as caught:
        template.render([{"role": "user", "content": "q"}])
    assert time.monotonic() - start < 4
    assert caught.value.file == "bomb.jinja"
    assert caught.value.code.startswith("QC-TEMPLATE-00")
    assert code is None or caught.value.code == code


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
    "{{ lipsum.__globals__['os'].popen('touch FILE').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['sys'].modules['os'].system('touch FILE') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch FILE') }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(dict) }}",
    "{{ ''.format_map.__self__.__class__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "{{ namespace(_x=1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch FILE') }}",
    "{{ dict.__subclasses__() }}",
    "{{ tojson.__globals__ }}",
    "{{ ().__getattribute__('__class__') }}",
    "{{ (messages|map(attribute='__class__')|list)[0].__name__ }}",
]


@pytest.mark.parametrize("payload", fast(ESCAPES, *ESCAPES[::3]))
def test_sandbox_escapes_are_not_executed(tmp_path: Path, payload: str) -> None:
    target = tmp_path / "executed"
    with Template(payload.replace("FILE", str(target)), "evil.jinja") as template:
        text = ""
        with suppress(InputError):
            text = template.render([{"role": "user"}])
        for word in ("class", "object", "builtin", "function", "root:"):
            assert word not in text
    assert not target.exists()


@pytest.mark.parametrize(
    "text", ["{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}", "{{ messages.clear() }}"]
)
def test_a_template_changes_nothing_that_it_is_given(text: str) -> None:
    with own_template(text) as template, pytest.raises(InputError, match="sandbox forbids"):
        template.render([{"role": "user"}])


def test_the_process_has_nothing_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    with own_template("x") as template:
        template.render([])
        assert template._worker is not None
        proc = Path("/proc") / str(template._worker._process.pid)
        if not proc.is_dir():
            pytest.skip("no /proc here")
        assert b"secret" not in (proc / "environ").read_bytes()
        limits = (proc / "limits").read_text()
        assert str(render_worker.MEMORY) in limits
    assert not proc.is_dir() or "zombie" in (proc / "status").read_text()


def test_starts_about_as_fast_as_jinja_alone() -> None:
    """Processor time, side by side: how fast this machine is says nothing about the worker."""

    def spent(job: Callable[[], object]) -> float:
        before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        job()
        return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before

    def bare() -> None:
        subprocess.check_call([sys.executable, "-c", "import jinja2.sandbox, jinja2.ext, json"])

    def worker() -> None:
        with own_template("x") as template:
            assert template.render([]) == "x"

    pairs = [(spent(bare), spent(worker)) for _ in range(5)]
    assert min(ours for _, ours in pairs) < 1.5 * min(alone for alone, _ in pairs), pairs


def test_importing_imports_nothing_heavy() -> None:
    code = (
        "import sys, qcore.checkpoint.chat_template, qcore.data.dataset;"
        "import qcore.data.rendering.template_check;"
        "print([m for m in ('torch', 'transformers', 'jinja2', 'tokenizers') "
        "if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("text", "code", "field", "says"),
    [
        ("a\n{{ x", "QC-TEMPLATE-001", "line 2", "unexpected end"),
        ("a\n\n{{ raise_exception('Only\nso') }}", "QC-TEMPLATE-002", "line 3", "found Only so"),
        ("a\n{{ messages[0].x.y }}", "QC-TEMPLATE-003", "line 2", "no attribute 'x'"),
        ("a\n{{ 1 / 0 }}", "QC-TEMPLATE-003", "line 2", "division"),
        ("{{ messages | nothing }}", "QC-TEMPLATE-001", "line 1", "No filter named"),
        ("{{ '\\ud800' }}", "QC-TEMPLATE-003", None, "surrogates"),
        ("{% generation %}x", "QC-TEMPLATE-001", "line 1", "endgeneration"),
    ],
)
def test_failures_name_source_line_and_reason(
    text: str, code: str, field: str | None, says: str
) -> None:
    with Template(text, "given.jinja") as template, pytest.raises(InputError) as caught:
        template.render([{"role": "user"}])
    error = caught.value
    assert (error.code, error.file, error.exit_code) == (code, "given.jinja", 65)
    assert says in error.message
    assert "\n" not in error.message
    if field is not None:
        assert error.field == field


def test_goes_on_after_a_failure_and_after_a_kill() -> None:
    text = (
        "{% if messages[0].content == 'loop' %}" + LOOP * 3 + "{% endfor %}" * 3 + "{% endif %}"
        "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    with own_template(text) as template:
        for said in ("a", "no", "b", "loop", "c"):
            message = [{"role": "user", "content": said}]
            if said in ("no", "loop"):
                with pytest.raises(InputError):
                    template.render(message)
            else:
                assert template.render(message) == said


def said(words: Any) -> list[ChatRow]:
    return [
        ChatRow(line=n, messages=({"role": "user", "content": w},)) for n, w in enumerate(words)
    ]


def test_many_rows_keep_order_and_only_their_own_errors() -> None:
    rows = said("no" if number % 50 == 7 else f"{number} é" for number in range(200))
    text = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}{{ v }}"
    with (
        own_template(text + "{{ messages[0].content }}") as template,
        template.batches(v="v ") as batches,
    ):
        made: list[Any] = []
        for start in range(0, 200, 64):
            batches.ask([(row, [Prefix(1)]) for row in rows[start : start + 64]])
            made += batches.answers()
        for number, (text,) in enumerate(made):
            if number % 50 == 7:
                assert isinstance(text, InputError)
                assert text.code == "QC-TEMPLATE-002"
            else:
                assert text == f"v {number} é"
        assert batches.answers() == []
        batches.ask([])
        assert batches.answers() == []
        batches.ask([(rows[0], [Prefix(1)])])  # left in the middle


PARTS = (
    "{% for m in messages %}{{ m.content }}{% if m.content == 'c' %}"
    "{{ raise_exception('no') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{{ mode }}{% endif %}"
)


def test_prefixes_of_a_row_are_rendered_in_one_request() -> None:
    row = ChatRow(line=1, messages=tuple({"role": "user", "content": c} for c in "abcd"))
    prefixes = [
        Prefix(2), Prefix(1, prompt=True), Prefix(1, True, {"mode": "off"}), Prefix(3), Prefix(0),
    ]  # fmt: skip
    with own_template(PARTS) as template, template.batches(mode="on") as batches:
        batches.ask([(row, prefixes)])
        (texts,) = batches.answers()
        assert [t if isinstance(t, str) else t.code for t in texts] == [
            "ab", "a>on", "a>off", "QC-TEMPLATE-002", "",
        ]  # fmt: skip


def test_texts_are_whole_whatever_they_share() -> None:
    """Only what differs from the last text of a row is sent."""
    rng = random.Random(5)
    words = [rng.choice(["é", "ab", "a", "👍🏽", "", "x" * 9]) for _ in range(40)]
    row = ChatRow(line=1, messages=tuple({"role": "user", "content": c} for c in words))
    prefixes = [
        Prefix(rng.randrange(41), rng.random() < 0.5, {"mode": rng.choice(words)})
        for _ in range(200)
    ]
    with own_template(PARTS) as template, template.batches() as batches:
        batches.ask([(row, prefixes)])
        (texts,) = batches.answers()
        for prefix, text in zip(prefixes, texts, strict=True):
            tail = f">{prefix.variables['mode']}" if prefix.prompt else ""
            assert text == "".join(words[: prefix.count]) + tail


def test_a_process_that_ends_between_batches_is_started_again() -> None:
    rows = said("abc")
    with own_template("{{ messages[0].content }}") as template, template.batches() as batches:
        for row in rows:
            batches.ask([(row, [Prefix(1)])])
            assert batches.answers() == [[row.messages[0]["content"]]]
            assert batches._process is not None
            batches._process._process.kill()
            batches._process._process.wait()


@pytest.mark.timing
def test_a_row_that_hangs_stops_the_rows_and_is_named() -> None:
    text = "{% if messages[0].content == '2' %}" + LOOP * 3 + "{% endfor %}" * 3 + "{% endif %}x"
    start = time.monotonic()
    with own_template(text) as template, template.batches() as batches:
        batches.ask([(row, [Prefix(1)]) for row in said("01234")])
        with pytest.raises(InputError) as caught:
            batches.answers()
    assert caught.value.code == "QC-TEMPLATE-004"
    assert "line 2" in caught.value.message
    assert time.monotonic() - start < 7  # the row alone again, to find it


def test_inputs_are_what_the_caller_may_set(shared: Path) -> None:
    common = {"messages", "tools", "add_generation_prompt", "enable_thinking", "add_vision_id"}
    for sku, more in (("think", set()), ("no-think", set()), ("3.6", {"preserve_thinking"})):
        text = (shared / "skus" / SKUS[sku] / "chat_template.jinja").read_text(encoding="utf-8")
        with Template(text, sku) as template:
            assert template.inputs() == common | more


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (TEMPLATE, {"messages", "tools", "keep_thinking", "add_generation_prompt"}),
        ("{% if a %}{% set b = 1 %}{% endif %}{{ b }}", {"a"}),
        ("{% if x is not defined %}{% set x = 1 %}{% endif %}{{ x }}", {"x"}),
        ("{% set x = x | default(true) %}{{ x }}", {"x"}),
        ("{% macro f(c) %}{{ c is defined }}{{ loop }}{% endmacro %}{{ f(d) }}", {"d"}),
        ("{{ range(3) }}{{ namespace() }}{{ raise_exception }}{{ strftime_now }}", set()),
        ("{% generation %}{{ a }}{% endgeneration %}", {"a"}),
    ],
)
def test_inputs_are_loads_less_stores(text: str, names: set[str]) -> None:
    with own_template(text) as template:
        assert template.inputs() == names


def test_hash_ignores_trailing_newlines_only(shared: Path) -> None:
    known = {
        "think": "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715",
        "no-think": "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80",
        "3.6": "e84f32a23fdda27689f868aa4a1a5621f41133e51a48d7f3efcbea2839574259",
    }
    for sku, wanted in known.items():
        text = (shared / "skus" / SKUS[sku] / "chat_template.jinja").read_text(encoding="utf-8")
        assert Template(text, sku).sha256 == Template(text + "\n\n", sku).sha256 == wanted
        assert Template(text + " ", sku).sha256 != wanted

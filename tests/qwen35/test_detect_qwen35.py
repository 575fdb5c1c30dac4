"""Qwen 3.5 told from its siblings: alone, beside a 3.6 plugin, and beside a later one.

The templates here are our own, in the manner of each generation; the tests at the end use the
published files where they are at hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcore.api.records import Claim
from qcore.checkpoint.chat_template import Template
from qcore.errors import QcoreError
from qcore.plugins.detect import detect
from qcore.testing import discover_plugins, fake_checkpoint, write_distribution
from qcore_qwen35.detect import NEXT, TEMPLATE_HASHES, architecture_of, claims

PYTHON = "v | tojson if v is mapping or (v is sequence and v is not string) else v | string"
JSON = "v if v is string else v | tojson"
STRIPPED = "loop.index0 > ns.last"
ALWAYS = "true"
OPT_IN = "(preserve_thinking is defined and preserve_thinking is true) or loop.index0 > ns.last"
OPT_OUT = "preserve_thinking is undefined or preserve_thinking is true or loop.index0 > ns.last"
THINK = "{% if enable_thinking is defined and enable_thinking is false %}OFF{% else %}ON{% endif %}"
NO_THINK = "{% if enable_thinking is defined and enable_thinking %}ON{% else %}OFF{% endif %}"


def template(
    arguments: str = PYTHON, keep: str = STRIPPED, tail: str = THINK, extra: str = ""
) -> Template:
    tail = tail.replace("OFF", "{{ '<think>\\n\\n</think>\\n\\n' }}")
    tail = tail.replace("ON", "{{ '<think>\\n' }}")
    text = f"""{extra}
{{%- set ns = namespace(last=0) %}}
{{%- for m in messages %}}{{% if m.role == 'user' %}}{{% set ns.last = loop.index0 %}}{{% endif %}}
{{%- endfor %}}
{{%- for m in messages %}}
  {{{{- '<|im_start|>' + m.role + '\\n' }}}}
  {{%- if m.role == 'assistant' and ({keep}) %}}
    {{{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}}}
  {{%- endif %}}
  {{{{- m.content }}}}
  {{%- for call in m.tool_calls or [] %}}
    {{{{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}}}
    {{%- for k, v in call.function.arguments | items %}}
      {{{{- '<parameter=' + k + '>\\n' }}}}{{{{ {arguments} }}}}{{{{ '\\n</parameter>\\n' }}}}
    {{%- endfor %}}
    {{{{- '</function>\\n</tool_call>' }}}}
  {{%- endfor %}}
  {{{{- '<|im_end|>\\n' }}}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{tail}{{%- endif %}}"""
    return Template(text, "chat_template.jinja")


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OWN_36 = template(JSON, OPT_IN)  # stands for the published 3.6 template
LATER = template(JSON, OPT_OUT, extra="{{ reasoning_effort | default('') }}")

_ABSENT = object()


def config(bos: Any = _ABSENT, eos: Any = 248044, text_only: bool = False, **more: Any) -> Any:
    text = {
        "model_type": "qwen3_5_text",
        "eos_token_id": eos,
        "hidden_size": 64,
        "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        **more,
    }
    if bos is not _ABSENT:
        text["bos_token_id"] = bos
    if text_only:
        return text
    return {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 1}}


def without(given: dict[str, Any], *keys: str) -> dict[str, Any]:
    text = {key: value for key, value in given["text_config"].items() if key not in keys}
    return {**given, "text_config": text}


#: name -> (config, template, fields and starts of signs, of bars, pip lines of bars)
CASES: dict[str, tuple[Any, Template | None, list[str], list[str], set[str | None]]] = {
    # the config alone
    "bos absent": (config(), None, ["absent"], [], set()),
    "bos null": (config(None), None, ["null"], [], set()),
    "bos null, text class": (config(None, text_only=True), None, ["null"], [], set()),
    "bos of later ones": (config(248044), None, [], ["248044"], {NEXT}),
    "bos, text class": (config(248044, text_only=True), None, [], ["248044"], {NEXT}),
    "bos of nobody": (config(1), None, [], ["1"], {None}),
    "bos zero is set": (config(0), None, [], ["0"], {None}),
    "token ids stripped": (without(config(), "eos_token_id"), None, [], [], set()),
    "token ids aligned with the tokenizer": (config(None, 248046), None, [], [], set()),
    "shape keys gone": (without(config(), "linear_num_key_heads"), None, [], [], set()),
    "bos taken out of a later one": (
        config(None, output_gate_type="swish"), None, [], [], set()),
    "bos at top level only": ({**config(), "bos_token_id": 248044}, None, ["absent"], [], set()),
    "re-save with text-level rotary factor": (
        config(None, partial_rotary_factor=0.25), None, ["null"], [], set()),
    "own vocabulary": (config(None, 5), None, [], [], set()),
    "empty text_config": ({"model_type": "qwen3_5", "text_config": {}}, None, [], [], set()),
    # the template, beside a config that says nothing
    "renders as 3.5, thinking": (config(None, 5), template(), ["renders"], [], set()),
    "renders as 3.5, not thinking": (
        config(None, 5), template(tail=NO_THINK), ["renders"], [], set()),
    "renders as 3.6": (config(None, 5), OWN_36, [], ["keeps", "scalar"], {NEXT}),
    "renders as a later one": (config(None, 5), LATER, [], ["keeps", "scalar"], {None}),
    "training 3.5, keeps all reasoning": (config(None, 5), template(keep=ALWAYS), [], [], set()),
    "training 3.6, keeps all reasoning": (
        config(None, 5), template(JSON, ALWAYS), [], ["scalar"], {NEXT}),
    "3.5 arguments with the opt-in switch": (
        config(None, 5), template(keep=OPT_IN), [], ["keeps"], {NEXT}),
    "3.5 arguments, no thinking switch": (
        config(None, 5), template(tail="ON"), [], [], set()),
    "3.5 arguments, no tail": (config(None, 5), template(tail=""), [], [], set()),
    "plain ChatML": (config(None, 5), Template(CHATML, "t"), [], [], set()),
    "refuses every conversation": (
        config(None, 5), Template("{{ raise_exception('no') }}", "t"), [], [], set()),
    "does not parse": (config(None, 5), Template("{% if %}", "t"), [], [], set()),
    # both
    "3.5 with its template": (config(), template(), ["absent", "renders"], [], set()),
    "3.5 with plain ChatML": (config(), Template(CHATML, "t"), ["absent"], [], set()),
    "3.5 with a 3.6 template": (config(), OWN_36, ["absent"], ["keeps", "scalar"], {NEXT}),
    "3.6 with a 3.5 template": (config(248044), template(), ["renders"], ["248044"], {NEXT}),
    "3.6 with a training template": (
        config(248044), template(JSON, ALWAYS), [], ["248044", "scalar"], {NEXT}),
    "later one in full": (config(248044), LATER, [], ["248044", "keeps", "scalar"], {None}),
}  # fmt: skip


def claim(given: Any, with_template: Template | None) -> Claim:
    (found,) = claims(fake_checkpoint(given, with_template))
    assert found.generation == "3.5"
    return found


@pytest.mark.parametrize("name", CASES)
def test_signs_and_bars(name: str) -> None:
    given, with_template, signs, bars, pips = CASES[name]
    found = claim(given, with_template)
    assert len(found.supporting) == len(signs)
    assert all(sign.value.startswith(start) for sign, start in zip(found.supporting, signs))
    assert len(found.opposing) == len(bars)
    assert all(bar.value.startswith(start) for bar, start in zip(found.opposing, bars))
    assert {bar.pip for bar in found.opposing} == pips


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("qwen3_5", "qwen3_5"),
        ("qwen3_5_text", "qwen3_5"),
        ("qwen3_5_moe", "qwen3_5_moe"),
        ("qwen3_5_moe_text", "qwen3_5_moe"),
    ],
)
def test_the_architecture_is_the_model_types(model_type: str, architecture: str) -> None:
    given = fake_checkpoint({**config(), "model_type": model_type})
    (found,) = claims(given)
    assert (architecture_of(given), found.generation) == (architecture, "3.5")
    assert [sign.value for sign in found.supporting] == ["absent"]


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_next", "qwen3_vl_moe", "qwen4_exp", None])
def test_another_family_is_not_claimed(model_type: str | None) -> None:
    assert list(claims(fake_checkpoint({**config(), "model_type": model_type}))) == []


def test_a_published_template_is_known_by_hash_and_not_rendered() -> None:
    class Published:
        sha256 = next(iter(TEMPLATE_HASHES))

    (sign,) = claim(config(None, 5), Published()).supporting  # type: ignore[arg-type]
    assert sign.value == "sha256 a4aee8afcf2e, published, thinking"


FAKE_36 = """
from qcore import hookimpl
from qcore.api import Claim, Evidence, Generation
from qcore_qwen35.detect import TEMPLATE_INPUTS

HASH = {hash!r}

@hookimpl
def qcore_describe():
    yield Generation(name="3.6", architectures=("qwen3_5",), template_hashes=(HASH,),
                     template_inputs=(*TEMPLATE_INPUTS, "preserve_thinking"))

@hookimpl
def qcore_detect(checkpoint):
    text = checkpoint.config.get("text_config", checkpoint.config)
    template = checkpoint.template
    evidence = []
    if text.get("bos_token_id") is None:
        evidence.append(Evidence(field="bos_token_id", value="null", expected="248044",
                                 supports=False, pip="qcore-qwen35"))
    if template is not None and template.sha256 == HASH:
        evidence.append(Evidence(field="chat template", value="published", supports=True))
    yield Claim(generation="3.6", evidence=tuple(evidence))
"""
FAKE_LATER = """
from qcore import hookimpl
from qcore.api import Claim, Evidence, Generation

@hookimpl
def qcore_describe():
    yield Generation(name="3.9", architectures=("qwen3_5",))

@hookimpl
def qcore_detect(checkpoint):
    text = checkpoint.config.get("text_config", checkpoint.config)
    template = checkpoint.template
    evidence = []
    if text.get("bos_token_id") is None:
        evidence.append(Evidence(field="bos_token_id", value="null", expected="248044",
                                 supports=False))
    elif template is not None and "reasoning_effort" in template.inputs():
        evidence.append(Evidence(field="chat template", value="reasoning_effort", supports=True))
    elif template is not None:
        evidence.append(Evidence(field="chat template", value="no reasoning_effort",
                                 expected="one", supports=False))
    yield Claim(generation="3.9", evidence=tuple(evidence))
"""


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Folders of a fake 3.6 plugin and of one for a later generation."""
    next_, later = tmp_path_factory.mktemp("next"), tmp_path_factory.mktemp("later")
    write_distribution(next_, "qcore-qwen36", module="fake_qwen36", plugin="qwen36",
                       source=FAKE_36.format(hash=OWN_36.sha256),
                       model_types=("qwen3_5", "qwen3_5_text"))  # fmt: skip
    write_distribution(later, "qcore-later", module="fake_later", plugin="later", source=FAKE_LATER,
                       model_types=("qwen3_5", "qwen3_5_text"))  # fmt: skip
    sys.path[:0] = [str(next_), str(later)]
    yield next_, later
    sys.path.remove(str(next_))
    sys.path.remove(str(later))


def outcome(given: Any, with_template: Template | None, *folders: Path) -> str:
    """The generation, or the code of the refusal."""
    plugins = discover_plugins(*folders, distributions=("qcore-qwen35",))
    try:
        return detect(fake_checkpoint(given, with_template), plugins).generation.name
    except QcoreError as error:
        return error.code if "\n" not in error.message else "more than one line"


UNPROVEN, CONTRADICTED, MISSING = "QC-DETECT-003", "QC-DETECT-004", "QC-DETECT-006"

#: name of the case -> outcome with 3.5 alone, with 3.6 beside it, with 3.6 and a later one
OUTCOMES = {
    "bos absent": ("3.5", "3.5", "3.5"),
    "bos null": ("3.5", "3.5", "3.5"),
    "bos null, text class": ("3.5", "3.5", "3.5"),
    "bos of later ones": (MISSING, UNPROVEN, UNPROVEN),
    "bos, text class": (MISSING, UNPROVEN, UNPROVEN),
    "bos of nobody": (CONTRADICTED, UNPROVEN, UNPROVEN),
    "token ids stripped": (UNPROVEN, UNPROVEN, UNPROVEN),
    "token ids aligned with the tokenizer": (UNPROVEN, UNPROVEN, UNPROVEN),
    "bos taken out of a later one": (UNPROVEN, UNPROVEN, UNPROVEN),
    "own vocabulary": (UNPROVEN, UNPROVEN, UNPROVEN),
    "renders as 3.5, thinking": ("3.5", "3.5", "3.5"),
    "renders as 3.5, not thinking": ("3.5", "3.5", "3.5"),
    "renders as 3.6": (MISSING, CONTRADICTED, CONTRADICTED),
    "renders as a later one": (CONTRADICTED, CONTRADICTED, CONTRADICTED),
    "training 3.5, keeps all reasoning": (UNPROVEN, UNPROVEN, UNPROVEN),
    "training 3.6, keeps all reasoning": (MISSING, CONTRADICTED, CONTRADICTED),
    "does not parse": ("QC-TEMPLATE-001",) * 3,
    "3.5 with its template": ("3.5", "3.5", "3.5"),
    "3.5 with plain ChatML": ("3.5", "3.5", "3.5"),
    "3.5 with a 3.6 template": (MISSING, CONTRADICTED, CONTRADICTED),
    "3.6 with a 3.5 template": (MISSING, UNPROVEN, UNPROVEN),
    "3.6 with a training template": (MISSING, UNPROVEN, UNPROVEN),
    "later one in full": (CONTRADICTED, CONTRADICTED, "3.9"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes_beside_siblings(name: str, siblings: tuple[Path, Path]) -> None:
    given, with_template, *_ = CASES[name]
    next_, later = siblings
    assert (
        outcome(given, with_template),
        outcome(given, with_template, next_),
        outcome(given, with_template, next_, later),
    ) == OUTCOMES[name]


def test_a_published_sibling_is_taken_by_its_own_plugin(siblings: tuple[Path, Path]) -> None:
    next_, later = siblings
    assert outcome(config(248044), OWN_36) == MISSING
    assert outcome(config(248044), OWN_36, next_) == "3.6"
    assert outcome(config(248044), OWN_36, next_, later) == "3.6"
    # Its template without newline, its weights without token ids: still not 3.5.
    assert outcome(config(None), Template(OWN_36.text + "\n", "t"), next_) == CONTRADICTED


def test_a_later_checkpoint_is_refused_with_the_plugin_that_takes_it() -> None:
    plugins = discover_plugins(distributions=("qcore-qwen35",))
    for with_template in (None, OWN_36):
        with pytest.raises(QcoreError) as caught:
            detect(fake_checkpoint(config(248044), with_template), plugins)
        assert caught.value.exit_code == 69
        assert caught.value.fix == "pip install qcore-qwen36"
        assert "text_config.bos_token_id: 248044, expected null or absent" in caught.value.message


def test_one_newer_than_that_plugin_too_is_not_sent_to_it() -> None:
    with pytest.raises(QcoreError) as caught:
        detect(
            fake_checkpoint(config(248044), LATER),
            discover_plugins(distributions=("qcore-qwen35",)),
        )
    assert caught.value.code == CONTRADICTED
    assert "qwen36" not in caught.value.message + (caught.value.fix or "")


def test_generation_may_be_named_where_nothing_is_proven() -> None:
    plugins = discover_plugins(distributions=("qcore-qwen35",))
    decision = detect(fake_checkpoint(config(None, 5), Template(CHATML, "t")), plugins, "3.5")
    assert (decision.generation.name, decision.forced) == ("3.5", True)
    with pytest.raises(QcoreError, match="bos_token_id"):
        detect(fake_checkpoint(config(248044)), plugins, "3.5")


def test_the_plugin_and_detection_import_no_torch() -> None:
    code = """
import sys
from types import SimpleNamespace
from qcore.plugins.manager import Plugins
from qcore.plugins.detect import detect
given = SimpleNamespace(
    headers={},
    path=__import__("pathlib").Path("m"), source="m", template=None,
    config={"model_type": "qwen3_5_text", "eos_token_id": 248044, "linear_conv_kernel_dim": 4,
            "linear_num_key_heads": 2, "linear_num_value_heads": 2})
print(detect(given, Plugins.discover()).generation.name,
      {"torch", "transformers", "peft", "jinja2", "yaml"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split(maxsplit=1) == ["3.5", "set()\n"], done.stderr


# The published files, where they are at hand.


def published(shared: Path, name: str) -> tuple[Any, Template | None]:
    folder = shared / "skus" / name
    path = folder / "chat_template.jinja"
    return (
        json.loads((folder / "config.json").read_text()),
        Template(path.read_text(), str(path)) if path.exists() else None,
    )


@pytest.mark.parametrize("size", ["0.8B", "2B", "4B", "9B", "27B"])
def test_published_3_5(shared: Path, siblings: tuple[Path, Path], size: str) -> None:
    given, with_template = published(shared, f"qwen3.5/Qwen3.5-{size}")
    found = claim(given, with_template)
    assert [sign.field for sign in found.supporting] == [
        "text_config.bos_token_id",
        "chat template",
    ]
    assert found.opposing == ()
    for folders in ((), siblings):
        assert outcome(given, with_template, *folders) == "3.5"
        assert outcome(given, None, *folders) == "3.5"
    # As transformers saves it, and the text class alone.
    text = {**given["text_config"], "bos_token_id": None, "pad_token_id": None}
    assert outcome({**given, "text_config": text}, with_template, *siblings) == "3.5"
    assert outcome(text, None, *siblings) == "3.5"
    # An edit of the template that changes no rule is seen through by rendering.
    assert with_template is not None
    edited = Template("{#- ours #}" + with_template.text, "t")
    assert [sign.value[:7] for sign in claim(config(None, 5), edited).supporting] == ["renders"]


def test_published_3_6(shared: Path, siblings: tuple[Path, Path]) -> None:
    given, with_template = published(shared, "qwen3.6/Qwen3.6-27B")
    quant, _ = published(shared, "qwen3.6/nvidia--Qwen3.6-27B-NVFP4")
    for cfg, tpl in ((given, with_template), (given, None), (quant, None)):
        assert claim(cfg, tpl).supporting == ()
        assert {bar.pip for bar in claim(cfg, tpl).opposing} == {NEXT}
        assert outcome(cfg, tpl) == MISSING
        assert outcome(cfg, tpl, *siblings) in ("3.6", UNPROVEN)
    # Edited to pass for 3.5: the template still bars it.
    text = {**given["text_config"], "bos_token_id": None}
    assert outcome({**given, "text_config": text}, with_template) == MISSING
    assert outcome({**given, "text_config": text}, None) == UNPROVEN


def test_published_mixture_of_experts_is_another_architecture(shared: Path) -> None:
    given, with_template = published(shared, "qwen3.5/Qwen3.5-35B-A3B")
    decision = detect(
        fake_checkpoint(given, with_template), discover_plugins(distributions=("qcore-qwen35",))
    )
    assert decision.architecture.name == "qwen3_5_moe"
    assert decision.generation.name == "3.5"

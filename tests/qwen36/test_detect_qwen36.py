"""Qwen 3.6 told from 3.5 before it and from what came after, with the real plugins.

The templates are our own, in the manner of each generation; the tests at the end use the
published files where they are at hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.model_kit import as_text_class, key_list, small_config, small_shapes, write_json
from support.template_kit import (
    ALWAYS,
    CHATML,
    JSON,
    LATER,
    NO_THINK,
    OPT_IN,
    OPT_OUT,
    OWN_35,
    OWN_36,
    PYTHON,
    family_template,
)
from support.tiers import fast

from qcore.api.records import Claim, PreflightRequest
from qcore.checkpoint.chat_template import Template
from qcore.errors import QcoreError
from qcore.plugins.detect import Decision, detect
from qcore.plugins.manager import Plugins
from qcore.plugins.resolve_model import identify
from qcore.testing import discover_plugins, fake_checkpoint, write_sparse_checkpoint
from qcore_qwen36 import plugin
from qcore_qwen36.detect import TEMPLATE_HASHES, claims

BOTH = ("qcore-qwen35", "qcore-qwen36")
ABSENT = object()
#: As both generations publish it, the begin-of-text id aside.
TEXT = {
    "model_type": "qwen3_5_text",
    "eos_token_id": 248044,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
MOE = {"qwen3_5": "qwen3_5_moe", "qwen3_5_text": "qwen3_5_moe_text"}


def config(bos: Any = ABSENT, **text: Any) -> dict[str, Any]:
    given = {} if bos is ABSENT else {"bos_token_id": bos}
    return {"model_type": "qwen3_5", "text_config": TEXT | given | text, "vision_config": {}}


def text_class(given: dict[str, Any]) -> dict[str, Any]:
    section: dict[str, Any] = given["text_config"]
    return section


SAYS_NOTHING = config(None, eos_token_id=5)
COMMENTED = Template("{#- ours -#}" + OWN_36.text, "t")
TRAINING = family_template(JSON, ALWAYS, training=True)  # no preserve_thinking at all
TRAINING_35 = family_template(PYTHON, ALWAYS, training=True)
EFFORT = family_template(JSON, OPT_IN, extra="{{- reasoning_effort | default('') -}}")
DEFAULT_ON = family_template(JSON, OPT_OUT)
OFF_BY_DEFAULT = family_template(JSON, OPT_IN, NO_THINK)
NO_SWITCH = family_template(JSON, OPT_IN, "ON")
OTHER_BLOCK = Template(  # preserving keeps an earlier turn's reasoning in another form
    OWN_36.text.replace(
        "'<think>\\n' + ns.why", "('<think>\\n' if loop.index0 > ns.last else '<t>') + ns.why"
    ),
    "t",
)
assert OTHER_BLOCK.text != OWN_36.text
OTHER_CALLS = Template(OWN_36.text.replace("<function=", "<call="), "t")

UNPROVEN, CONTRADICTED, MISSING = "QC-DETECT-003", "QC-DETECT-004", "QC-DETECT-006"

#: name -> config, template, starts of the signs and of the bars of 3.6, outcome with 3.5 alone,
#: outcome with both
CASES: dict[str, tuple[Any, Template | None, list[str], list[str], str, str]] = {
    # the config alone
    "bos absent": (config(), None, [], ["null or absent"], "3.5", "3.5"),
    "bos null": (config(None), None, [], ["null or absent"], "3.5", "3.5"),
    "bos of 3.6 and later": (config(248044), None, [], [], MISSING, UNPROVEN),
    "bos of 3.6, text class": (text_class(config(248044)), None, [], [], MISSING, UNPROVEN),
    "bos of nobody": (config(1), None, [], ["1"], CONTRADICTED, CONTRADICTED),
    "bos lost by a trainer": (config(None, eos_token_id=248046), None, [], [], UNPROVEN, UNPROVEN),
    "bos taken out of a later one": (
        config(None, output_gate_type="swish"), None, [], [], UNPROVEN, UNPROVEN),
    # the template, beside a config that says nothing
    "3.6": (SAYS_NOTHING, OWN_36, ["renders"], [], MISSING, "3.6"),
    "3.6 with a comment": (SAYS_NOTHING, COMMENTED, ["renders"], [], MISSING, "3.6"),
    "3.6 for training, switch kept": (
        SAYS_NOTHING, family_template(JSON, OPT_IN, training=True), ["renders"], [], MISSING,
        "3.6"),
    "3.5": (SAYS_NOTHING, OWN_35, [], ["scalar"], "3.5", "3.5"),
    "training template": (SAYS_NOTHING, TRAINING, [], [], MISSING, UNPROVEN),
    "training template of 3.5": (SAYS_NOTHING, TRAINING_35, [], ["scalar"], UNPROVEN, UNPROVEN),
    "3.5 arguments, opt-in": (
        SAYS_NOTHING, family_template(keep=OPT_IN), [], ["scalar"], MISSING, CONTRADICTED),
    "no thinking by default": (SAYS_NOTHING, OFF_BY_DEFAULT, [], [], MISSING, UNPROVEN),
    "no thinking switch": (SAYS_NOTHING, NO_SWITCH, [], [], MISSING, UNPROVEN),
    "preserving in another form": (SAYS_NOTHING, OTHER_BLOCK, [], [], MISSING, UNPROVEN),
    "calls in another form": (SAYS_NOTHING, OTHER_CALLS, [], [], MISSING, UNPROVEN),
    "plain ChatML": (SAYS_NOTHING, Template(CHATML, "t"), [], [], UNPROVEN, UNPROVEN),
    "refuses every conversation": (
        SAYS_NOTHING, Template("{{ raise_exception('no') }}", "t"), [], [], UNPROVEN, UNPROVEN),
    # newer than 3.6
    "reads reasoning_effort": (
        config(248044), EFFORT, ["renders"], [], CONTRADICTED, CONTRADICTED),
    "preserves by default": (
        config(248044), DEFAULT_ON, [], ["keeps"], CONTRADICTED, CONTRADICTED),
    "later one in full": (config(248044), LATER, [], ["keeps"], CONTRADICTED, CONTRADICTED),
    # both
    "3.6 in full": (config(248044), OWN_36, ["renders"], [], MISSING, "3.6"),
    "3.6 in full, text class": (
        text_class(config(248044)), OWN_36, ["renders"], [], MISSING, "3.6"),
    "3.5 in full": (config(), OWN_35, [], ["null or absent", "scalar"], "3.5", "3.5"),
    "3.5 with a 3.6 template": (
        config(), OWN_36, ["renders"], ["null or absent"], MISSING, CONTRADICTED),
    "3.6 with a 3.5 template": (config(248044), OWN_35, [], ["scalar"], MISSING, CONTRADICTED),
    "3.6 with plain ChatML": (config(248044), Template(CHATML, "t"), [], [], MISSING, UNPROVEN),
    "3.6 with a training template": (config(248044), TRAINING, [], [], MISSING, UNPROVEN),
    "3.6 with a 3.5 training template": (
        config(248044), TRAINING_35, [], ["scalar"], MISSING, CONTRADICTED),
}  # fmt: skip


def decide(
    given: Any, template: Template | None, plugins: Plugins, named: str | None = None
) -> Decision:
    return detect(fake_checkpoint(given, template), plugins, named)


def refusal(
    given: Any, template: Template | None, plugins: Plugins, named: str | None = None
) -> QcoreError:
    with pytest.raises(QcoreError) as caught:
        decide(given, template, plugins, named)
    assert "\n" not in caught.value.message
    return caught.value


def outcome(given: Any, template: Template | None, *real: str) -> str:
    """The generation, or the code of the refusal."""
    try:
        return decide(given, template, discover_plugins(distributions=real)).generation.name
    except QcoreError as error:
        return error.code if "\n" not in error.message else "more than one line"


def claim(given: Any, template: Template | None) -> Claim:
    (found,) = claims(fake_checkpoint(given, template))
    assert found.generation == "3.6"
    return found


@pytest.mark.parametrize("name", CASES)
def test_signs_and_bars(name: str) -> None:
    given, template, signs, bars, *_ = CASES[name]
    found = claim(given, template)
    assert [
        sign.value[: len(start)] for sign, start in zip(found.supporting, signs, strict=True)
    ] == signs
    assert [
        bar.value[: len(start)] for bar, start in zip(found.opposing, bars, strict=True)
    ] == bars


@pytest.mark.parametrize("name", CASES)
def test_outcomes(name: str) -> None:
    given, template, *_, alone, both = CASES[name]
    assert (outcome(given, template, "qcore-qwen35"), outcome(given, template, *BOTH)) == (
        alone,
        both,
    )


@pytest.mark.parametrize("name", CASES)
def test_the_mixture_of_experts_is_judged_alike(name: str) -> None:
    given, template, *_ = CASES[name]
    moe = json.loads(json.dumps(given))
    for section in (moe, moe.get("text_config", {})):
        if "model_type" in section:
            section["model_type"] = MOE[section["model_type"]]
    assert list(claims(fake_checkpoint(given, template))) == list(
        claims(fake_checkpoint(moe, template))
    )


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_next", "qwen3_vl_moe", "qwen4_exp", None])
def test_another_family_is_not_claimed(model_type: str | None) -> None:
    assert list(claims(fake_checkpoint({**config(248044), "model_type": model_type}, OWN_36))) == []


def test_the_published_template_is_known_by_hash_and_not_rendered() -> None:
    class Published:
        sha256 = TEMPLATE_HASHES[0]

    (sign,) = claim(config(248044), Published()).supporting  # type: ignore[arg-type]
    assert sign.value == "sha256 e84f32a23fdd, published"


# What a user sees.


def test_not_installed_gives_the_pip_line() -> None:
    for template in (None, OWN_36):
        error = refusal(config(248044), template, discover_plugins(distributions=("qcore-qwen35",)))
        assert (error.code, error.exit_code) == (MISSING, 69)
        assert "not installed" in error.message
        assert error.fix == "pip install qcore-qwen36"
        # An override is no substitute for the plugin.
        for named in ("3.5", "3.6"):
            refusal(
                config(248044), template, discover_plugins(distributions=("qcore-qwen35",)), named
            )


def test_disabled_says_how_to_enable_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "qwen36")
    error = refusal(config(248044), OWN_36, Plugins.discover())
    assert (error.code, error.exit_code) == (MISSING, 69)
    assert error.fix == "take 'qwen36' out of QCORE_DISABLE_PLUGINS"
    assert decide(config(), OWN_35, Plugins.discover()).generation.name == "3.5"


def test_without_the_plugin_that_it_stands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "qwen35")
    error = refusal(config(248044), OWN_36, Plugins.discover())
    assert (error.code, error.fix) == (
        "QC-DETECT-001",
        "take 'qwen35' out of QCORE_DISABLE_PLUGINS",
    )


def test_an_override_fills_a_gap_and_beats_no_contradiction() -> None:
    both = discover_plugins(distributions=BOTH)
    for template in (None, TRAINING, Template(CHATML, "t")):
        assert "--generation 3.6" in str(refusal(config(248044), template, both).fix)
        taken = decide(config(248044), template, both, "3.6")
        assert (taken.generation.name, taken.forced) == ("3.6", True)
        assert any("named by --generation" in line for line in taken.evidence)
        assert "bos_token_id" in refusal(config(248044), template, both, "3.5").message
    for given, template in (
        (config(), None),
        (config(), OWN_36),
        (config(248044), OWN_35),
        (config(248044), LATER),
        (config(248044), EFFORT),
    ):
        for named in ("3.6", "3.5") if template is not None else ("3.6",):
            refusal(given, template, both, named)


def test_one_newer_than_3_6_is_told_why() -> None:
    for template, word in (
        (EFFORT, "reads reasoning_effort"),
        (DEFAULT_ON, "unless preserve_thinking is false"),
        (LATER, "unless preserve_thinking is false"),
    ):
        for real in (BOTH, BOTH[:1]):
            error = refusal(config(248044), template, discover_plugins(distributions=real))
            assert error.code == CONTRADICTED
            assert word in error.message or real != BOTH
            assert "pip install" not in (error.fix or "")


def test_the_record() -> None:
    decision = decide(config(248044), OWN_36, discover_plugins(distributions=BOTH))
    assert decision.generation is plugin.GENERATION
    assert (decision.architecture.name, decision.architecture_plugin.name) == ("qwen3_5", "qwen35")
    assert decision.plugin.distribution == "qcore-qwen36"


# Folders with files.


def folder(path: Path, config: Any, shapes: Any, template: str | None) -> Path:
    write_sparse_checkpoint(path, config, shapes)
    write_json(path / "tokenizer_config.json", {})
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


def generation(path: Path, **more: Any) -> str:
    """The generation that `identify` decides, with what is installed; or the refusal's code."""
    try:
        return identify(str(path), **more).decision.generation.name
    except QcoreError as error:
        return error.code


def test_small_folders(tmp_path: Path) -> None:
    given = small_config(bos_token_id=248044)
    shapes = small_shapes()
    assert generation(folder(tmp_path / "a", given, shapes, OWN_36.text)) == "3.6"
    assert generation(folder(tmp_path / "b", given, shapes, None)) == UNPROVEN
    assert generation(tmp_path / "b", generation="3.6") == "3.6"
    assert generation(folder(tmp_path / "c", small_config(), shapes, OWN_35.text)) == "3.5"
    # A save of the text class, with another version's name and a newline after the template.
    text = {**given["text_config"], "architectures": ["Qwen3_5ForCausalLM"],
            "transformers_version": "5.23.0", "tie_word_embeddings": True}  # fmt: skip
    saved = folder(tmp_path / "d", text, as_text_class(shapes), OWN_36.text + "\n")
    assert generation(saved) == "3.6"
    found = identify(str(saved))
    assert found.chat_format().prompt_tails == ("<think>\n\n</think>\n\n", "<think>\n")
    assert found.provenance()["plugins"].keys() == {"qcore-qwen35", "qcore-qwen36"}


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({}, []),
        ({"enable_thinking": False, "preserve_thinking": True}, []),
        ({"enable_thinking": "false"}, ["enable_thinking"]),
        ({"preserve_thinking": 1, "enable_thinking": 0}, ["enable_thinking", "preserve_thinking"]),
    ],
)
def test_a_switch_that_is_no_boolean_is_refused(given: dict[str, Any], fields: list[str]) -> None:
    """Both templates ask ``is true`` and ``is false``: a text or a number would do nothing."""
    plugins = discover_plugins(distributions=BOTH)
    plugins.for_model_type("qwen3_5") if hasattr(plugins, "for_model_type") else None
    request: Any = PreflightRequest(
        verb="train", checkpoint=fake_checkpoint(config(248044)), architecture="other",
        generation="3.6", layout=None, template_kwargs=given,
    )  # type: ignore[arg-type]  # fmt: skip
    findings = list(plugin.qcore_preflight(request))
    assert [finding.field for finding in findings] == [f"chat_template_kwargs.{f}" for f in fields]
    assert {finding.code for finding in findings} <= {"QC-QWEN36-001"}
    from qcore_qwen35.plugin import qcore_preflight

    earlier: Any = PreflightRequest(
        verb="train", checkpoint=fake_checkpoint(config()), architecture="other",
        generation="3.5", layout=None, template_kwargs=given,
    )  # type: ignore[arg-type]  # fmt: skip
    found = list(qcore_preflight(earlier))
    assert [finding.field for finding in found] == [
        f"chat_template_kwargs.{f}" for f in fields if f == "enable_thinking"
    ]
    assert list(qcore_preflight(request)) == [], "3.6 is guarded once"


# The published files, where they are at hand.


def sources(shared: Path, name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], str]:
    source = shared / "skus" / name
    return (
        json.loads((source / "config.json").read_text()),
        key_list(source / "weight_keys.txt"),
        (source / "chat_template.jinja").read_text(encoding="utf-8"),
    )


RESAVED = {"transformers_version": "5.23.0"}


def resaved(given: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5.23 makes of a config when it saves it."""
    text = {k: v for k, v in given["text_config"].items() if k != "partial_rotary_factor"}
    nulls = {"bos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
    text = {**nulls, **text}
    tower = {**given["vision_config"], "model_type": given["model_type"] + "_vision"}
    return {**given, **RESAVED, "text_config": text, "vision_config": tower}


@pytest.mark.parametrize(
    ("name", "wanted"),
    fast([
        ("qwen3.5/Qwen3.5-0.8B", "3.5"),
        ("qwen3.5/Qwen3.5-2B", "3.5"),
        ("qwen3.5/Qwen3.5-4B", "3.5"),
        ("qwen3.5/Qwen3.5-9B", "3.5"),
        ("qwen3.5/Qwen3.5-27B", "3.5"),
        ("qwen3.5/Qwen3.5-35B-A3B", "3.5"),
        ("qwen3.6/Qwen3.6-27B", "3.6"),
        ("qwen3.6/Qwen3.6-35B-A3B", "3.6"),
    ], ("qwen3.5/Qwen3.5-0.8B", "3.5"), ("qwen3.5/Qwen3.5-35B-A3B", "3.5"),
       ("qwen3.6/Qwen3.6-27B", "3.6"), names=2),
)  # fmt: skip
def test_published(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wanted: str
) -> None:
    given, shapes, template = sources(shared, name)
    unproven = "3.5" if wanted == "3.5" else UNPROVEN
    for label, cfg in (("hub", given), ("resaved", resaved(given))):
        path = folder(tmp_path / label, cfg, shapes, template)
        assert generation(path) == wanted
        (path / "chat_template.jinja").unlink()
        assert generation(path) == unproven
        assert generation(path, generation=wanted) == wanted
        assert generation(path, generation="3.5" if wanted == "3.6" else "3.6") != wanted
        edited = "{#- ours #}" + template + "\n\n"
        (path / "chat_template.jinja").write_text(edited, encoding="utf-8")
        assert generation(path) == wanted
        newer = "{%- if reasoning_effort is defined %}{% endif %}" + template
        (path / "chat_template.jinja").write_text(newer, encoding="utf-8")
        assert generation(path) == CONTRADICTED
        assert generation(path, generation=wanted) == CONTRADICTED
    # One side swapped.
    other = "qwen3.6/Qwen3.6-27B" if wanted == "3.5" else "qwen3.5/Qwen3.5-27B"
    mixed = folder(tmp_path / "mixed", given, shapes, sources(shared, other)[2])
    assert generation(mixed) == CONTRADICTED
    assert generation(mixed, generation=wanted) == CONTRADICTED
    # With the other plugin out of the way.
    path = folder(tmp_path / "alone", given, shapes, template)
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "qwen36")
    assert generation(path) == ("3.5" if wanted == "3.5" else MISSING)


@pytest.mark.parametrize(
    "name", ["qwen3.6/nvidia--Qwen3.6-27B-NVFP4", "qwen3.5/nvidia--Qwen3.5-122B-A10B-NVFP4"]
)
def test_published_quantized_configs(shared: Path, name: str) -> None:
    """Re-saves by third parties: the config alone proves 3.5 and never 3.6."""
    given = json.loads((shared / "skus" / name / "config.json").read_text())
    (found,) = claims(fake_checkpoint(given))
    assert found.supporting == ()
    assert [bar.value for bar in found.opposing] == (["null or absent"] if "3.5" in name else [])


def test_the_later_switch_on_the_published_template(shared: Path, tmp_path: Path) -> None:
    """The published 3.6 template with preserving turned on by default is no 3.6."""
    given, shapes, template = sources(shared, "qwen3.6/Qwen3.6-27B")
    old = "preserve_thinking is defined and preserve_thinking is true"
    assert old in template
    newer = template.replace(old, "preserve_thinking is undefined or preserve_thinking is true")
    path = folder(tmp_path / "newer", given, shapes, newer)
    assert generation(path) == CONTRADICTED
    assert generation(path, generation="3.6") == CONTRADICTED

"""The decision table of detection, outcome by outcome, with plugins that claim on demand."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from qcore.checkpoint.chat_template import Template
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.errors import InputError, PluginError, QcoreError, UsageError
from qcore.plugins.detect import Decision, detect
from qcore.plugins.manager import Plugins
from qcore.testing import discover_plugins, fake_checkpoint, write_distribution

KNOWN = "{{ messages }} known"
KNOWN_HASH = Template(KNOWN, "t").sha256

#: One generation of the architecture ``toy``; its claim is read from the config:
#: ``{"claims": {"1": ["sign"], "2": ["bar", "pip-name"]}}``.
GENERATION = """
from dataclasses import replace
from qcore import hookimpl
from qcore.api import Architecture, Claim, Evidence, Generation

NAME = {name!r}
FOR = Evidence(field="config.mark", value=NAME, supports=True)
AGAINST = Evidence(field="config.bos", value="7", expected="none", supports=False)

@hookimpl
def qcore_describe():
    {architecture}
    yield Generation(name=NAME, architectures=("toy",), template_hashes={hashes!r},
                     template_inputs={inputs!r})

@hookimpl
def qcore_detect(checkpoint):
    for item in checkpoint.config.get("claims", {{}}).get(NAME, ()):
        if item == "none":
            yield Claim(generation=NAME)
        elif item == "sign":
            yield Claim(generation=NAME, evidence=(FOR,))
        elif item == "both":
            yield Claim(generation=NAME, evidence=(FOR, AGAINST))
        elif item == "bar":
            yield Claim(generation=NAME, evidence=(AGAINST,))
        elif item.startswith("pip "):
            yield Claim(generation=NAME, evidence=(replace(AGAINST, pip=item[4:]),))
        elif item == "foreign generation":
            yield Claim(generation="1" if NAME != "1" else "2")
"""
ARCHITECTURE = 'yield Architecture(name="toy", model_types=("toy",), root="m", build=print)'
MODALITY = """
from qcore import hookimpl
from qcore.api.records import Modality

@hookimpl
def qcore_describe():
    some = dict(root="m.tower", kinds=("it",), build=print, reader=print)
    yield Modality(name="image", section="vision_config", architectures=("toy",), **some)
    yield Modality(name="audio", section="audio_config", architectures=("toy",), **some)
    yield Modality(name="smell", section="vision_config", architectures=("other",), **some)
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Generations 1 (brings the architecture), 2 and 3, and two modalities."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = ["dmod_1", "dmod_2", "dmod_3", "dmod_m"]
    for name, hashes, inputs in (
        ("1", (KNOWN_HASH,), ("messages", "thinking")),
        ("2", (), ("messages", "preserve")),
        ("3", (), ()),
    ):
        source = GENERATION.format(
            name=name,
            architecture=ARCHITECTURE if name == "1" else "",
            hashes=hashes,
            inputs=inputs,
        )
        write_distribution(tmp_path, f"dist-{name}", module=f"dmod_{name}", plugin=f"gen{name}",
                           source=source, model_types=("toy",))  # fmt: skip
    write_distribution(tmp_path, "dist-m", module="dmod_m", plugin="eyes", source=MODALITY,
                       model_types=("toy",))  # fmt: skip
    yield lambda: discover_plugins(tmp_path)
    for name in made:
        sys.modules.pop(name, None)


def toy(template: str | None = None, **claims: Any) -> Any:
    config = {"model_type": "toy", "claims": {k[1:]: [v] for k, v in claims.items()}}
    return fake_checkpoint(config, None if template is None else Template(template, "t"))


def refused(call: Any, kind: type[QcoreError], code: str) -> QcoreError:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.code == code
    assert "\n" not in caught.value.message
    return caught.value


def test_one_without_bar_has_a_sign(plugins: Any) -> None:
    decision = detect(toy(_1="sign", _2="none", _3="bar"), plugins())
    assert (decision.architecture.name, decision.generation.name) == ("toy", "1")
    assert (decision.plugin.name, decision.plugin.distribution) == ("gen1", "dist-1")
    assert not decision.forced
    assert [(sign.field, sign.value) for sign in decision.supporting] == [("config.mark", "1")]
    assert decision.evidence == (
        "architecture toy: model_type toy, plugin 'gen1' (dist-1 1.0)",
        "generation 1: config.mark: 1",
        "not 3: config.bos: 7, expected none",
    )


def test_owner_of_generation_and_of_architecture_are_told_apart(plugins: Any) -> None:
    decision = detect(toy(_1="bar", _2="sign"), plugins())
    assert (decision.architecture_plugin.name, decision.plugin.name) == ("gen1", "gen2")


def test_two_with_a_sign_are_both_named(plugins: Any) -> None:
    error = refused(
        lambda: detect(toy(_2="sign", _3="sign"), plugins()), PluginError, "QC-DETECT-005"
    )
    assert "2 (gen2): config.mark: 2; 3 (gen3): config.mark: 3" in error.message
    assert error.exit_code == 69


def test_a_sign_with_a_bar_does_not_count(plugins: Any) -> None:
    assert detect(toy(_1="both", _2="sign"), plugins()).generation.name == "2"
    refused(lambda: detect(toy(_1="both", _2="none"), plugins()), InputError, "QC-DETECT-003")
    refused(lambda: detect(toy(_1="both", _2="bar"), plugins()), InputError, "QC-DETECT-004")


def test_unproven_is_refused_and_may_be_named(plugins: Any) -> None:
    given = toy(_1="bar", _2="none", _3="none")
    error = refused(lambda: detect(given, plugins()), InputError, "QC-DETECT-003")
    assert "1 is barred: config.bos: 7" in error.message
    assert "2 or 3" in error.message
    assert "--generation 2 or --generation 3" in (error.fix or "")
    decision = detect(given, plugins(), "3")
    assert (decision.generation.name, decision.forced, decision.supporting) == ("3", True, ())
    assert "generation 3: named by --generation; nothing proves or bars it" in decision.evidence
    refused(lambda: detect(given, plugins(), "1"), InputError, "QC-DETECT-003")  # barred
    refused(lambda: detect(given, plugins(), "9"), UsageError, "QC-DETECT-007")  # unknown


def test_naming_what_is_proven_changes_nothing_and_naming_another_is_refused(plugins: Any) -> None:
    given = toy(_1="sign", _2="none")
    assert detect(given, plugins(), "1") == detect(given, plugins())
    error = refused(lambda: detect(given, plugins(), "2"), UsageError, "QC-DETECT-007")
    assert "expected 1, because config.mark: 1" in error.message


def test_contradicted_is_refused_whatever_is_named(plugins: Any) -> None:
    given = toy(_1="bar", _2="bar", _3="bar")
    for named in (None, "1", "2", "3"):
        error = refused(
            lambda named=named: detect(given, plugins(), named), InputError, "QC-DETECT-004"
        )
        assert all(f"not {name}: config.bos: 7" in error.message for name in "123")


def test_contradicted_with_a_plugin_that_would_fit(plugins: Any) -> None:
    error = refused(
        lambda: detect(toy(_1="pip dist-next", _2="bar"), plugins()), PluginError, "QC-DETECT-006"
    )
    assert error.fix == "pip install dist-next"
    assert "needs dist-next, which is not installed" in error.message
    # One that is installed and bars it as well is no help.
    refused(lambda: detect(toy(_1="pip Dist_2", _2="bar"), plugins()), InputError, "QC-DETECT-004")


def test_contradicted_with_the_fitting_plugin_disabled(
    plugins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "gen2")
    error = refused(lambda: detect(toy(_1="pip dist-2"), plugins()), PluginError, "QC-DETECT-006")
    assert error.fix == "take 'gen2' out of QCORE_DISABLE_PLUGINS"


def test_nobody_claims_anything(plugins: Any) -> None:
    error = refused(lambda: detect(toy(), plugins()), InputError, "QC-DETECT-004")
    assert "no installed plugin knows its generation" in error.message
    refused(lambda: detect(toy(), plugins(), "1"), InputError, "QC-DETECT-004")


def test_a_template_that_another_lists_is_a_bar(plugins: Any) -> None:
    error = refused(
        lambda: detect(toy(KNOWN, _1="bar", _2="sign"), plugins()), InputError, "QC-DETECT-004"
    )
    assert f"not 2: chat template: sha256 {KNOWN_HASH[:12]}, the one of 1" in error.message
    # Trailing newlines do not hide it; its own generation is not barred by it.
    assert detect(toy(KNOWN + "\n\n", _1="sign", _2="sign"), plugins()).generation.name == "1"


def test_a_template_input_that_it_does_not_list_is_a_bar(plugins: Any) -> None:
    given = toy("{{ messages }}{{ preserve }}{{ bos_token }}{{ tools }}", _1="sign", _2="sign")
    decision = detect(given, plugins())
    assert decision.generation.name == "2"
    assert (
        "not 1: chat template: reads preserve, expected only variables that 1 has"
        in decision.evidence
    )
    effort = toy("{{ messages }}{{ effort }}", _1="sign", _2="sign")
    error = refused(lambda: detect(effort, plugins()), InputError, "QC-DETECT-004")
    assert "not 2: chat template: reads effort" in error.message
    # One that states no inputs bars none.
    assert detect(toy("{{ effort }}", _1="sign", _3="sign"), plugins()).generation.name == "3"


def test_a_template_that_does_not_parse_is_refused_as_such(plugins: Any) -> None:
    refused(lambda: detect(toy("{% if %}", _1="sign"), plugins()), InputError, "QC-TEMPLATE-001")


def test_unknown_model_type_names_what_is_installed(plugins: Any) -> None:
    error = refused(
        lambda: detect(fake_checkpoint({"model_type": "novel"}), plugins()),
        PluginError,
        "QC-DETECT-001",
    )
    assert "config.json: model_type" in error.message
    assert "found 'novel', expected one of toy" in error.message
    assert error.exit_code == 69
    scope = plugins().for_model_type("novel")  # a scope knows what else is installed
    again = refused(
        lambda: detect(fake_checkpoint({"model_type": "novel"}), scope),
        PluginError,
        "QC-DETECT-001",
    )
    assert again.message == error.message
    nothing = refused(
        lambda: detect(fake_checkpoint({"model_type": "novel"}), Plugins.discover([])),
        PluginError,
        "QC-DETECT-001",
    )
    assert "none is installed" in nothing.message


def test_architecture_whose_plugin_is_disabled(
    plugins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "gen1")
    error = refused(lambda: detect(toy(_2="sign"), plugins()), PluginError, "QC-DETECT-001")
    assert error.fix == "take 'gen1' out of QCORE_DISABLE_PLUGINS"


def test_two_architectures_for_one_model_type(plugins: Any, tmp_path: Path) -> None:
    source = GENERATION.format(
        name="4", architecture=ARCHITECTURE.replace('"toy", model', '"toy2", model'), hashes=(),
        inputs=(),
    )  # fmt: skip
    write_distribution(tmp_path, "dist-4", module="dmod_4", plugin="gen4", source=source,
                       model_types=("toy",))  # fmt: skip
    error = refused(lambda: detect(toy(_1="sign"), plugins()), PluginError, "QC-DETECT-002")
    assert "'toy' of plugin 'gen1' (dist-1 1.0)" in error.message
    assert "'toy2' of plugin 'gen4' (dist-4 1.0)" in error.message
    sys.modules.pop("dmod_4", None)


@pytest.mark.parametrize(
    ("claim", "fault"),
    [
        ("foreign generation", "claims generation '1', which it does not describe"),
    ],
)
def test_a_claim_to_what_is_not_its_own_stops_the_verb(
    plugins: Any, claim: str, fault: str
) -> None:
    error = refused(
        lambda: detect(toy(_1="sign", _2=claim), plugins()), PluginError, "QC-DETECT-008"
    )
    assert f"plugin 'gen2' (dist-2 1.0) {fault}" in error.message
    assert "QCORE_DISABLE_PLUGINS=gen2" in (error.fix or "")


def test_two_claims_for_one_generation_stop_the_verb(plugins: Any) -> None:
    given = fake_checkpoint({"model_type": "toy", "claims": {"1": ["sign", "none"]}})
    error = refused(lambda: detect(given, plugins()), PluginError, "QC-DETECT-008")
    assert "claims generation '1' twice" in error.message


def test_modalities_are_those_that_serve_it_and_have_a_section(plugins: Any) -> None:
    def of(**sections: Any) -> list[str]:
        given = toy(_1="sign")
        given.config.update(sections)
        return [modality.name for modality in detect(given, plugins()).modalities]

    assert of() == []
    assert of(vision_config={"depth": 1}) == ["image"]
    assert of(vision_config={"depth": 1}, audio_config={}) == ["image", "audio"]  # as yielded
    assert of(vision_config=None) == []


def test_order_of_distributions_does_not_matter(plugins: Any) -> None:
    def decide(points: list[Any]) -> Decision:
        return detect(toy(_1="bar", _2="sign", _3="none"), Plugins.discover(points))

    from importlib import metadata

    points = [
        point for dist in metadata.distributions(path=[sys.path[0]]) for point in dist.entry_points
    ]
    assert decide(points) == decide(points[::-1])


def test_a_real_folder_is_detected(plugins: Any, tmp_path: Path) -> None:
    model = tmp_path / "a model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": "toy", "claims": {"1": ["sign"], "2": ["sign"]}})
    )
    (model / "chat_template.jinja").write_text(KNOWN)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (model / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + struct.pack("<f", 0.0)
    )
    assert detect(Checkpoint.open(model), plugins()).generation.name == "1"

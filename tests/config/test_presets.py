"""Presets: the contract holds for every installed file; broken ones are named, never fatal."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import qcore
from qcore.config.presets import KIND, Presets, load_presets
from qcore.config.resolve import Settings, load_settings
from qcore.config.spec import line_of
from qcore.errors import PluginError, UsageError

GOOD = """\
schema_version: 1
default_base_models: {"1": org/base}
presets:
  - id: tiny-8g
    aliases: [tiny]
    description: For a test
    settings: {r: 4, learning_rate: 2e-4}
  - id: other-8g
    description: Names its own model
    model: org/own
    settings: {}
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a plugin package whose import fails, with one preset file; gives its entry point."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(text: str | bytes, name: str = "plug", file: str = "a.yaml") -> EntryPoint:
        package = f"presets_of_{name}"
        folder = tmp_path / package / "presets"
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        return EntryPoint(name=name, value=package, group=KIND.group)

    return make


def test_every_installed_preset_keeps_the_contract() -> None:
    presets = load_presets()
    assert presets.broken == ()
    assert presets.claimed_twice == {}
    names = [name for p in presets for name in (p.id, *p.aliases)]
    assert len(names) == len(set(names))
    for preset in presets:
        assert presets.get(preset.id) is preset
        assert preset.description
        settings, origins = load_settings(preset=preset.id, presets=presets)
        for name, value in preset.settings.items():
            assert getattr(settings, name) == value
            assert origins[name] == f"preset {preset.id}"
        sets = [line_of(n, v).replace(": ", "=", 1) for n, v in preset.settings.items()]
        assert load_settings(sets=sets)[0] == settings, "each key is one that --set accepts"


def test_cores_presets_name_no_model() -> None:
    folder = Path(qcore.__file__).parent / "presets"
    for file in folder.glob("*.yaml"):
        assert not re.search("qwen|/[A-Z]", file.read_text(), re.IGNORECASE), file
    own = [p for p in load_presets() if p.origin == "core"]
    assert {p.id for p in own} >= {"quick", "standard", "long", "low-memory"}
    assert all(p.base_model is None for p in own)


def test_the_plugins_presets_come_from_the_plugin() -> None:
    preset = load_presets().get("qwen3.5-4b-24g")
    assert (preset.origin, preset.base_model) == ("qwen35", "Qwen/Qwen3.5-4B")


def test_discovery_imports_no_plugin() -> None:
    code = (
        "import sys; from qcore.config.presets import load_presets; p = load_presets(); "
        "assert any(x.origin != 'core' for x in p); "
        "assert not [m for m in sys.modules if m.startswith(('qcore_', 'torch'))]"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plugins_file(plugin) -> None:
    presets = load_presets([plugin(GOOD)])
    tiny = presets.get("tiny")
    assert tiny.id == "tiny-8g"
    assert tiny.settings == {"r": 4, "learning_rate": 2e-4}
    assert (tiny.base_model, presets.get("other-8g").base_model) == ("org/base", "org/own")
    assert tiny.origin == "plug"
    assert presets.broken == ()
    assert Settings(**tiny.settings).r == 4


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("schema_version: 1", "schema_version: 2", "schema_version"),
        ("schema_version: 1\n", "", "no schema_version"),
        ('default_base_models: {"1": org/base}\n', "", "no default_base_models"),
        ('{"1": org/base}', "org/base", "a mapping by generation"),
        ('{"1": org/base}', '{"1": }', "no text"),
        ("presets:", "preset:", "key preset"),
        ("id: tiny-8g", "id: Tiny 8G", "Tiny 8G"),
        ("id: tiny-8g", "ident: tiny-8g", "key ident"),
        ("    description: For a test\n", "", "no description"),
        ("aliases: [tiny]", "aliases: tiny", "a list"),
        ("aliases: [tiny]", "aliases: [other-8g]", "two presets of that name"),
        ("r: 4", "rank: 4", "rank"),
        ("r: 4", "r: 4.5", "4.5"),
        ("r: 4", "dtype: fp16", "65504"),
        ("r: 4", "gradient_checkpointing: false, recompute: full", "recompute"),
        ("settings: {}", "settings: []", "a list"),
        ("settings: {}", "settings: {r: 4, r: 5}", "twice"),
        ("2e-4}", "2e-4", "line"),
    ],
)
def test_a_broken_file_is_listed_and_using_it_is_an_error(
    plugin, old: str, new: str, word: str
) -> None:
    assert old in GOOD
    presets = load_presets([plugin(GOOD.replace(old, new, 1))])
    assert {p.origin for p in presets} == {"core"}, "the others keep working"
    (broken,) = presets.broken
    assert word in broken.reason
    assert "\n" not in broken.reason
    assert broken.origin == "plug"
    if "other-8g" in broken.names:
        with pytest.raises(PluginError, match="preset other-8g of plug cannot be used") as caught:
            presets.get("other-8g")
        assert (caught.value.code, caught.value.exit_code) == ("QC-PRESET-002", 69)
    else:
        with pytest.raises(UsageError, match="those of plug could not be read"):
            presets.get("other-8g")


@pytest.mark.parametrize("value", ["no_such_package_here", "no_such.sub", "json", "..", "sys"])
def test_a_plugin_without_files(value: str) -> None:
    presets = load_presets([EntryPoint(name="plug", value=value, group=KIND.group)])
    assert [b.origin for b in presets.broken] == ["plug"]
    assert presets.get("quick")


def test_an_unknown_preset() -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(preset="standart")
    assert caught.value.code == "QC-PRESET-001"
    assert caught.value.fix == "did you mean standard?"


def test_a_plugin_cannot_take_a_name_of_core(plugin) -> None:
    before = load_presets([]).get("quick")
    presets = load_presets([plugin(GOOD.replace("[tiny]", "[quick]"))])
    assert presets.get("quick") == before
    assert presets.broken[0].reason == "quick is already a preset of core"
    with pytest.raises(PluginError):
        presets.get("tiny-8g")
    assert presets.get("other-8g").base_model == "org/own"


def test_a_name_that_two_plugins_bring_is_nobodys(plugin) -> None:
    second = GOOD.replace("id: tiny-8g", "id: small-8g").replace("other-8g", "third-8g")
    points = [plugin(GOOD, "one"), plugin(second, "two")]
    for order in (points, points[::-1]):
        presets = load_presets(order)
        with pytest.raises(PluginError, match="one and two") as caught:
            presets.get("tiny")
        assert caught.value.code == "QC-PRESET-003"
        assert presets.get("tiny-8g").origin == "one"
        assert presets.get("third-8g").origin == "two"


def test_the_installed_default_bases() -> None:
    assert load_presets().default_base_model("3.5") == "Qwen/Qwen3.5-4B"
    assert load_presets([]).default_base_models() == {}
    assert load_presets().default_base_model("none such") is None


def test_default_bases_by_generation(plugin) -> None:
    two = GOOD.replace('{"1": org/base}', '{"1": org/base, "2": org/next}')
    presets = load_presets([plugin(two)])
    assert presets.default_base_models() == {"1": "org/base", "2": "org/next"}
    assert presets.default_base_model("2") == "org/next"
    assert presets.get("tiny").base_model is None, "of two generations neither is meant"
    assert presets.get("other-8g").base_model == "org/own"


def test_two_default_bases_of_one_generation_are_nobodys(plugin) -> None:
    second = GOOD.replace("tiny", "small").replace("other", "third")
    same = [plugin(GOOD, "one"), plugin(second, "two")]
    assert load_presets(same).default_base_model("1") == "org/base", "they agree"
    other = [same[0], plugin(second.replace("org/base", "org/else"), "three")]
    presets = load_presets(other)
    assert presets.default_base_models() == {}
    with pytest.raises(PluginError, match=r"org/base \(one\) and org/else \(three\)") as caught:
        presets.default_base_model("1")
    assert caught.value.code == "QC-PRESET-005"
    assert presets.get("tiny").base_model == "org/base", "a preset still has its file's"


def test_a_preset_without_any_installed() -> None:
    with pytest.raises(UsageError):
        Presets(entries=()).get("quick")

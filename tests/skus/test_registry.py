"""SKU records: they say what the real files say; broken ones are named, never fatal."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from support.sku_kit import DERIVED, config_of, derived, folder_of, shapes_of

import qcore
from qcore.api.parameters import Part, Row, Table, cat, stack
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.layout import survey
from qcore.errors import InputError, PluginError, UsageError
from qcore.skus.compare import format_value, part_layouts
from qcore.skus.records import SECTIONS, Mark
from qcore.skus.registry import KIND, Skus, load_skus
from qcore.testing import write_sparse_checkpoint

DENSE = ("0.8B", "2B", "4B", "9B", "27B")
OPEN = (
    *(f"Qwen3.5-{size}" for size in DENSE), "Qwen3.5-35B-A3B", *DERIVED, "Qwen3.6-27B",
    "Qwen3.6-35B-A3B",
)  # fmt: skip
FILED = tuple(sku for sku in OPEN if sku not in DERIVED)

GOOD = """\
schema_version: 1
generation: "1"
sources:
  page: https://example.org/page
  guess: what somebody thought
shared:
  common:
    - mark: verified
      source: page
      values: {licence: MIT, context_native: 4096, modalities: [text]}
skus:
  - id: Org/Small-1B
    architecture: acme
    shared: [common]
    facts:
      - mark: tested
        source: page
        values:
          link: https://example.org/Org/Small-1B
          release_date: 2026-01-31
          class: AcmeForCausalLM
          model_type: acme
          parameters: 1_000
        shape: {hidden_size: 8, layer_types: {sliding: 3, full: 1}}
        tensors: {total: 7, model: 6}
      - mark: hypothesis
        source: [page, guess]
        config: {bos_token_id: null, tie: true, eps: 1e-6, "rope.type": default}
        layout: {text: fused}
        tokens: {<end>: 7}
hosted:
  - id: big-1
    aliases: [Org/Big-1]
    instead: [Org/Small-1B]
    shared: [common as reconstructed]
    facts:
      - mark: hypothesis
        source: guess
        values: {release_date: 2026-02-01}
    served:
      - provider: Cloud
        id: org/big-1-0201
        mark: reconstructed
        source: page
        context: 100_000
        prices: {input: 0.5, output: 2}
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a plugin package whose import fails, with one file of records."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(text: str | bytes, name: str = "plug", file: str = "a.yaml") -> EntryPoint:
        folder = tmp_path / f"skus_of_{name}" / "skus"
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        return EntryPoint(name=name, value=folder.parent.name, group=KIND.group)

    return make


# -- the installed records


def test_the_installed_records_keep_the_contract() -> None:
    skus = load_skus()
    assert (skus.broken, skus.claimed_twice) == ((), {})
    assert {sku.id for sku in skus if not sku.hosted} >= {f"Qwen/{name}" for name in OPEN}
    for sku in skus:
        assert skus.get(sku.id) is sku
        assert sku.generation in ("3.5", "3.6")
        assert list(sku.facts) == list(SECTIONS)
        for facts in sku.facts.values():
            for key, fact in facts.items():
                assert fact.source, (sku.id, key)
                assert isinstance(fact.mark, Mark)


def test_cores_sources_hold_no_record() -> None:
    assert not list(Path(qcore.__file__).parent.rglob("skus/*.yaml"))
    assert load_skus([]).entries == ()


def test_no_record_is_all_verified_and_none_is_all_guesses() -> None:
    """The marks tell apart; a record of which all is certain was not looked at closely."""
    for sku in load_skus():
        if not sku.hosted:
            marks = {fact.mark for facts in sku.facts.values() for fact in facts.values()}
            assert {Mark.VERIFIED, Mark.TESTED, Mark.RECONSTRUCTED} <= marks, sku.id
    unsure = load_skus().get("Qwen/Qwen3.5-122B-A10B")
    assert unsure.facts["layout"]["mtp"].mark is Mark.HYPOTHESIS
    assert unsure.facts["tensors"]["total"].mark is Mark.HYPOTHESIS


def test_what_is_verified_of_a_config_is_verbatim_somewhere() -> None:
    """Sizes are verified only where the publisher's own config.json was seen."""
    verbatim = {"Qwen/Qwen3.5-0.8B", "Qwen/Qwen3.5-27B", "Qwen/Qwen3.5-35B-A3B"}
    for sku in load_skus():
        if not sku.hosted:
            marks = {fact.mark for fact in sku.facts["shape"].values()}
            assert (marks == {Mark.VERIFIED}) == (sku.id in verbatim), sku.id


# -- against the real files


def looked_up(config: dict[str, Any], key: str) -> Any:
    """As a person would look it up: in the text section, else at the top."""
    for section in (config["text_config"], config):
        value: Any = section
        for word in key.split("."):
            value = value.get(word) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


@pytest.mark.parametrize("name", FILED)
def test_a_record_says_what_config_json_says(shared: Path, name: str) -> None:
    sku, config = load_skus().get(f"Qwen/{name}"), config_of(shared, name)
    assert sku.value("class") == config["architectures"][0]
    assert sku.value("model_type") == config["model_type"] == sku.architecture
    assert sku.value("text_model_type") == config["text_config"]["model_type"]
    assert sku.value("context_native") == config["text_config"]["max_position_embeddings"]
    compared = 0
    for key, fact in {**sku.facts["shape"], **sku.facts["config"]}.items():
        value = looked_up(config, key)
        if key == "layer_types":
            value = {word: value.count(word) for word in set(value)}
        assert value == fact.value, key
        compared += 1
    assert compared >= 30


@pytest.mark.parametrize("name", FILED)
def test_a_record_says_what_the_key_list_says(shared: Path, name: str) -> None:
    sku, shapes = load_skus().get(f"Qwen/{name}"), shapes_of(shared, name)
    counts = {key: fact.value for key, fact in sku.facts["tensors"].items()}
    assert counts == {
        "total": len(shapes),
        "model.visual": sum(key.startswith("model.visual.") for key in shapes),
        "mtp": sum(key.startswith("mtp.") for key in shapes),
    }
    assert sku.value("parameters") == sum(map(math.prod, shapes.values()))
    lies = {key: fact.value for key, fact in sku.facts["layout"].items()}
    for part, prefix in (("text", "model.language_model."), ("mtp", "mtp.")):
        names = [key for key in shapes if key.startswith(prefix)]
        way = "dense"
        if any(".experts." in key for key in names):
            way = "per expert" if any(re.search(r"experts\.\d", key) for key in names) else "fused"
        assert lies[part] == way


@pytest.mark.parametrize("name", DERIVED)
def test_a_record_without_files_says_what_its_dimensions_give(shared: Path, name: str) -> None:
    sku, shapes = load_skus().get(f"Qwen/{name}"), shapes_of(shared, name)
    assert sku.value("parameters") == sum(map(math.prod, shapes.values()))
    assert sku.facts["tensors"]["total"].value == len(shapes)
    assert sku.facts["tensors"]["mtp"].value == sum(key.startswith("mtp.") for key in shapes)


@pytest.mark.parametrize(
    ("name", "mtp_fused"), [("Qwen3.5-35B-A3B", False), ("Qwen3.6-35B-A3B", True)]
)
def test_the_derivation_of_key_lists_is_right(shared: Path, name: str, mtp_fused: bool) -> None:
    assert derived(config_of(shared, name), mtp_fused=mtp_fused) == shapes_of(shared, name)


@pytest.mark.parametrize("name", FILED)
def test_a_record_says_what_template_and_tokenizer_say(shared: Path, name: str) -> None:
    import hashlib
    import json

    sku = load_skus().get(f"Qwen/{name}")
    text = (folder_of(shared, name) / "chat_template.jinja").read_bytes().rstrip(b"\n")
    assert sku.value("template_sha256") == (hashlib.sha256(text).hexdigest(),)
    special = json.loads((shared / "skus" / "tokenizer" / "special_tokens.json").read_text())
    ids = {entry["token"]: entry["id"] for entry in special}
    tokens = {token: fact.value for token, fact in sku.facts["tokens"].items()}
    assert tokens == {token: ids[token] for token in tokens}
    assert len(tokens) >= 12


@pytest.mark.parametrize("name", FILED)
def test_default_thinking_is_what_the_template_does(shared: Path, name: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text = (folder_of(shared, name) / "chat_template.jinja").read_text()
    messages = [{"role": "user", "content": "hello"}]
    tail = env.from_string(text).render(messages=messages, add_generation_prompt=True)
    thinks = tail.endswith("<think>\n")
    assert thinks or tail.endswith("</think>\n\n")
    assert load_skus().get(f"Qwen/{name}").value("thinking_by_default") is thinks


# -- hosted ones


def catalogue(shared: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(provider, model id there) -> its entry, with what it takes from its base."""
    root = shared / "skus" / "hosted" / "models.dev"
    folders = {
        "alibaba": "DashScope",
        "alibaba-cn": "DashScope (China)",
        "openrouter": "OpenRouter",
    }
    found = {}
    for folder, provider in folders.items():
        base = root / "providers" / folder / "models"
        for path in base.rglob("*.toml"):
            entry = tomllib.loads(path.read_text())
            if "base_model" in entry:
                below = tomllib.loads((root / "models" / f"{entry['base_model']}.toml").read_text())
                entry = {**below, **entry, "limit": {**below["limit"], **entry.get("limit", {})}}
            found[provider, str(path.relative_to(base).with_suffix(""))] = entry
    return found


def test_hosted_records_say_what_the_catalogue_says(shared: Path) -> None:
    listed = catalogue(shared)
    offers = 0
    for sku in load_skus():
        for one in sku.served:
            entry = listed.pop((one.provider, one.id))
            assert not entry["open_weights"]
            assert one.prices == {k: v for k, v in entry["cost"].items() if k != "tiers"}
            assert (one.context, one.output) == (
                entry["limit"]["context"], entry["limit"]["output"]
            )  # fmt: skip
            assert ("tiers" in entry["cost"]) == ("above" in (one.note or ""))
            assert "2026-07-02" in one.source
            assert set(entry["modalities"]["input"]) == set(sku.value("modalities"))
            offers += 1
        for name in sku.instead:
            assert load_skus().get(name).generation == sku.generation
            assert not load_skus().get(name).hosted
    assert offers == 15
    left = [name for (_, name), entry in listed.items() if not entry["open_weights"]]
    assert all("qwen3.7" in name for name in left), "only those out of scope have no record"


@pytest.mark.parametrize(
    "model",
    ["qwen3.6-plus", "Qwen/Qwen3.6-plus", "QWEN/QWEN3.6-PLUS", "qwen/qwen3.6-plus",
     "qwen/qwen3.5-plus-02-15", "qwen3.5-flash-02-23", "Qwen3.6-Max-Preview",
     "qwen/qwen3.6-flash@main", "qwen/qwen3.6-plus:free"],
)  # fmt: skip
def test_a_hosted_model_is_refused_in_words(model: str) -> None:
    with pytest.raises(InputError, match="served by API only") as caught:
        load_skus().refuse_hosted(model)
    error = caught.value
    assert (error.code, error.exit_code) == ("QC-SKU-005", 65)
    generation = "3.6" if "3.6" in model else "3.5"
    assert f"generation {generation}" in error.message
    assert error.fix is not None
    assert f"Qwen/Qwen{generation}-" in error.fix


@pytest.mark.parametrize(
    "model", ["Qwen/Qwen3.5-4B", "qwen3.5-4b", "acme/qwen3.6-plus", "qwen3.6-plus-2b", "", "./x"]
)
def test_other_names_are_left_to_the_hub(model: str) -> None:
    load_skus().refuse_hosted(model)


# -- discovery and use, with a plugin of our own


def test_discovery_imports_no_plugin() -> None:
    code = (
        "import sys; from qcore.skus.registry import load_skus; assert load_skus().entries; "
        "assert not [m for m in sys.modules if m.startswith(('qcore_', 'torch'))]"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plugins_file(plugin) -> None:
    skus = load_skus([plugin(GOOD)])
    assert (skus.broken, skus.claimed_twice) == ((), {})
    small, big = skus.get("small-1b"), skus.get("ORG/BIG-1")
    assert (small.id, small.generation, small.architecture) == ("Org/Small-1B", "1", "acme")
    assert (small.origin, small.hosted, big.hosted, big.architecture) == ("plug", False, True, None)
    assert small.value("parameters") == 1000
    assert small.value("release_date") == "2026-01-31"
    assert small.facts["shape"]["layer_types"].value == {"sliding": 3, "full": 1}
    config = {key: fact.value for key, fact in small.facts["config"].items()}
    assert config == {"bos_token_id": None, "tie": True, "eps": 1e-6, "rope.type": "default"}
    licence = small.facts["values"]["licence"]
    assert (licence.mark, licence.source) == (Mark.VERIFIED, "https://example.org/page")
    fact = small.facts["layout"]["text"]
    assert fact.source == "https://example.org/page; what somebody thought"
    assert big.facts["values"]["licence"].mark is Mark.RECONSTRUCTED, "as weakened"
    assert big.facts["values"]["release_date"].mark is Mark.HYPOTHESIS
    (offer,) = big.served
    assert (offer.context, offer.output, offer.prices) == (
        100_000,
        None,
        {"input": 0.5, "output": 2},
    )
    assert big.names() == {"big-1", "org/big-1", "org/big-1-0201", "big-1-0201"}


def test_as_mark_never_makes_a_fact_better_known(plugin) -> None:
    text = GOOD.replace("mark: verified", "mark: hypothesis").replace(
        "shared: [common]", "shared: [common as tested]"
    )
    licence = load_skus([plugin(text)]).get("small-1b").facts["values"]["licence"]
    assert licence.mark is Mark.HYPOTHESIS


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("schema_version: 1", "schema_version: 2", "schema_version"),
        ('generation: "1"\n', "", "no generation"),
        ("mark: tested", "mark: certain", "certain"),
        ("      - mark: tested\n        source: page", "      - source: page", "no mark"),
        (
            "        source: page\n        values:\n          link",
            "        values:\n          link",
            "no source",
        ),
        ("source: [page, guess]", "source: [page, gues]", "gues"),
        ("source: guess\n", "source:\n", "no text"),
        ("shared: [common]", "shared: [comon]", "comon"),
        ("[common as reconstructed]", "[common as likely]", "likely"),
        ("class: AcmeForCausalLM", "clas: AcmeForCausalLM", "the key clas"),
        ("parameters: 1_000", "parameters: many", "a whole number"),
        ("parameters: 1_000", 'parameters: "1000"', "a whole number"),
        ("          parameters: 1_000\n", "", "no parameters"),
        ("        shape: {hidden_size: 8, layer_types: {sliding: 3, full: 1}}\n", "", "no shape"),
        ("release_date: 2026-01-31", "release_date: 31 January", "YYYY-MM-DD"),
        ("layout: {text: fused}", "layout: {text: fuse}", "dense, fused or per expert"),
        ("model_type: acme", "model_type: acme\n          licence: BSD", "the value twice"),
        ("tensors: {total: 7", "tensors: {total: 7, total: 8", "twice"),
        ("id: big-1\n", "id: Org/Small-1B\n", "org/small-1b twice"),
        ("prices: {input: 0.5", "prices: {inputs: 0.5", "the key inputs"),
        ("prices: {input: 0.5", "prices: {input: cheap", "a number"),
        ("    instead: [Org/Small-1B]\n", "", "no instead"),
        ("skus:\n", "skuss:\n", "the key skuss"),
        ("modalities: [text]", "modalities: text", "a list of texts"),
        ("mark: tested", "mark: &a tested", "anchor"),
    ],
)
def test_a_broken_file_is_listed_and_using_it_is_an_error(
    plugin, old: str, new: str, word: str
) -> None:
    assert old in GOOD
    other = GOOD.replace("Small-1B", "Other-2B").replace("big-1", "vast").replace("Big-1", "Vast")
    skus = load_skus([plugin(GOOD.replace(old, new, 1)), plugin(other, "sound")])
    assert {sku.origin for sku in skus} == {"sound"}, "the others keep working"
    (broken,) = skus.broken
    assert word in broken.reason, broken.reason
    assert "\n" not in broken.reason
    assert (broken.origin, broken.file is not None) == ("plug", True)
    with pytest.raises(PluginError, match="of plug cannot be used") as caught:
        skus.get("Small-1B")
    assert (caught.value.code, caught.value.exit_code) == ("QC-SKU-002", 69)
    skus.refuse_hosted("big-1")  # an open model must train beside a broken record


@pytest.mark.parametrize("text", [b"\xff\xfe", b"", b"- 1", b"a: [", b"x" * (1 << 21)])
def test_a_file_that_is_no_mapping_is_listed(plugin, text: bytes) -> None:
    (broken,) = load_skus([plugin(text)]).broken
    assert broken.origin == "plug"
    assert "\n" not in broken.reason


@pytest.mark.parametrize("value", ["no_such_package_here", "no_such.sub", "json", "..", "sys"])
def test_a_plugin_without_files(value: str) -> None:
    skus = load_skus([EntryPoint(name="plug", value=value, group=KIND.group)])
    assert [bad.origin for bad in skus.broken] == ["plug"]
    assert skus.entries == ()


def test_an_id_that_two_plugins_bring_is_nobodys(plugin) -> None:
    second = GOOD.replace("big-1", "vast").replace("Big-1", "Vast")
    points = [plugin(GOOD, "one"), plugin(second, "two")]
    for order in (points, points[::-1]):
        skus = load_skus(order)
        for name in ("Org/Small-1B", "small-1b"):
            with pytest.raises(PluginError, match="one and two") as caught:
                skus.get(name)
            assert (caught.value.code, caught.value.exit_code) == ("QC-SKU-003", 69)
        assert {sku.id for sku in skus} == {"big-1", "vast"}


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        load_skus().get("qwen3.5-35b-a3")
    assert caught.value.code == "QC-SKU-001"
    assert caught.value.fix == "did you mean Qwen/Qwen3.5-35B-A3B?"
    with pytest.raises(UsageError, match="those of plug could not be read"):
        load_skus([EntryPoint(name="plug", value="json", group=KIND.group)]).get("zzz")
    with pytest.raises(UsageError):
        Skus(entries=()).get("zzz")


# -- how experts lie, told from where they were found

STACKS = Part(
    name="text",
    owner="test",
    rows=(
        Row("m.norm", "hidden", "norm"),
        Row("m.cube", "experts hidden 2", "norm"),  # of three dimensions, and no stack
        Row(
            "m.layers.{layer}.up", "experts 2*hidden hidden", "experts",
            also=stack("expert", cat("m.layers.{layer}.{expert}.a", "m.layers.{layer}.{expert}.b")),
        ),
    ),
    dims={"hidden": 4, "experts": 3},
    axes={"layer": (0, 1), "expert": (0, 1, 2)},
)  # fmt: skip
DENSE_PART = Part(
    name="mtp", owner="test", rows=(Row("mtp.w", "hidden", "mtp"),), dims={"hidden": 4},
    optional=True,
)  # fmt: skip


def layouts_of(folder: Path, *layers: dict[str, tuple[int, ...]], mtp: bool) -> dict[str, str]:
    shapes = {"m.norm": (4,), "m.cube": (3, 4, 2)} | ({"mtp.w": (4,)} if mtp else {})
    for layer in layers:
        shapes |= layer
    found = Checkpoint.open(write_sparse_checkpoint(folder, {"model_type": "test"}, shapes))
    layout, problems = survey(Table([STACKS, DENSE_PART]), found)
    assert problems == []
    return part_layouts(layout)


def test_layouts_are_told_from_the_tensors(tmp_path: Path) -> None:
    def fused(n: int) -> dict[str, tuple[int, ...]]:
        return {f"m.layers.{n}.up": (3, 8, 4)}

    def apart(n: int) -> dict[str, tuple[int, ...]]:
        return {f"m.layers.{n}.{e}.{side}": (4, 4) for e in range(3) for side in "ab"}

    told = layouts_of(tmp_path / "a", fused(0), fused(1), mtp=True)
    assert told == {"text": "fused", "mtp": "dense"}
    told = layouts_of(tmp_path / "b", apart(0), apart(1), mtp=False)
    assert told == {"text": "per expert", "mtp": "absent"}
    told = layouts_of(tmp_path / "c", fused(0), apart(1), mtp=True)
    assert told == {"text": "1 fused, 1 per expert", "mtp": "dense"}


def test_values_read_as_people_read_them() -> None:
    assert format_value(None) == "none"
    assert format_value(True) == "true"
    assert format_value(248044) == "248044"
    assert format_value(873_438_784) == "873,438,784"
    assert format_value((1, "a")) == "1, a"
    assert format_value({"full": 2}) == "2 full"

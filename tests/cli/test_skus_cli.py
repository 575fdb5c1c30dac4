"""``qcore skus``, ``inspect`` beside the record, and refusing what has no weights."""

from __future__ import annotations

import json
import math
import resource
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from support.cli_kit import Ended, apart, here, modules_after
from support.model_kit import as_text_class, edit_json, small_config, small_shapes
from support.sku_kit import DERIVED, derived, folder_of, shapes_of, write_sku
from support.tiers import fast

from qcore.skus.registry import Skus, load_skus
from qcore.testing import write_sparse_checkpoint

SCRIPT = Path(sysconfig.get_path("scripts")) / "qcore"
DENSE = ("Qwen3.5-0.8B", "Qwen3.5-2B", "Qwen3.5-4B", "Qwen3.5-9B", "Qwen3.5-27B", "Qwen3.6-27B")
EXPERTS = ("Qwen3.5-35B-A3B", *DERIVED, "Qwen3.6-35B-A3B")


def serves(model_type: str, generation: str) -> bool:
    """Whether the installed plugins build this model type and know this generation."""
    from qcore.plugins.manager import Plugins

    if model_type not in Plugins.discover().installed.model_types:
        return False
    described = Plugins.discover().for_model_type(model_type).describe()
    kinds = {kind for one in described.architectures.values() for kind in one.record.model_types}
    return model_type in kinds and generation in described.generations


def needs(sku: str) -> None:
    generation = sku.removeprefix("Qwen").partition("-")[0]
    if not serves("qwen3_5_moe" if sku in EXPERTS else "qwen3_5", generation):
        pytest.skip(f"no installed plugin takes {sku}")


def differing(ended: Ended) -> dict[str, Any]:
    """Field -> (found, recorded) of the record's differences."""
    return {
        one["field"]: (one["found"], one["recorded"]) for one in ended.json["record"]["differences"]
    }


# -- list and show


def test_list_json(capsys: pytest.CaptureFixture[str]) -> None:
    ended = here(capsys, "skus", "list", "--json")
    assert (ended.code, ended.err) == (0, "")
    told = ended.json
    assert told.keys() == {"skus", "broken", "claimed_twice"}
    assert (told["broken"], told["claimed_twice"]) == ([], {})
    rows = {row["id"]: row for row in told["skus"]}
    assert rows["Qwen/Qwen3.5-27B"] == {
        "id": "Qwen/Qwen3.5-27B", "generation": "3.5", "parameters": 27_781_427_952,
        "context": 262_144, "context_extended": 1_010_000, "licence": "Apache-2.0",
        "weights": "open", "release_date": "2026-02-24", "origin": "qwen35",
    }  # fmt: skip
    assert rows["qwen3.5-plus"]["weights"] == "hosted"
    assert rows["qwen3.5-plus"]["parameters"] is None


def test_list_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    ended = here(capsys, "skus", "list")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].split()[:4] == ["id", "generation", "parameters", "context"]
    (line,) = [line for line in lines if line.startswith("Qwen/Qwen3.5-4B ")]
    assert line.split() == [
        "Qwen/Qwen3.5-4B", "3.5", "4.7", "B", "262,144", "Apache-2.0", "open", "2026-03-02",
    ]  # fmt: skip


def test_show_tells_every_value_with_mark_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    sku = load_skus().get("Qwen/Qwen3.5-122B-A10B")
    people = here(capsys, "skus", "show", "qwen3.5-122b-a10b")
    assert (people.code, people.err) == (0, "")
    values = [fact for facts in sku.facts.values() for fact in facts.values()]
    lines = people.out.splitlines()
    assert len(lines) == 1 + len(values) + len({fact.source for fact in values})
    for mark in ("verified", "tested", "reconstructed", "hypothesis"):
        assert sum(f" ({mark} [" in line for line in lines) == sum(
            fact.mark.value == mark for fact in values
        )
    told = here(capsys, "skus", "show", "Qwen/Qwen3.5-122B-A10B", "--json").json
    assert told["facts"]["layout"]["mtp"] == {
        "value": "per expert", "mark": "hypothesis", "source": sku.facts["layout"]["mtp"].source,
    }  # fmt: skip
    assert told["architecture"] == "qwen3_5_moe"


def test_show_of_a_hosted_one(capsys: pytest.CaptureFixture[str]) -> None:
    people = here(capsys, "skus", "show", "qwen/qwen3.5-plus-20260420")
    assert "served by OpenRouter as qwen/qwen3.5-plus-20260420  (reconstructed" in people.out
    assert (
        "context 1,000,000, output 65,536; US dollars per million tokens: input 0.3" in people.out
    )
    assert "open models instead: Qwen/Qwen3.5-397B-A17B" in people.out
    told = here(capsys, "skus", "show", "qwen3.5-plus", "--json").json
    assert {one["provider"] for one in told["served"]} == {
        "DashScope", "DashScope (China)", "OpenRouter",
    }  # fmt: skip


def test_a_typo_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    ended = here(capsys, "skus", "show", "Qwen/Qwen3.5-35B-A3")
    assert ended.code == 2
    assert "did you mean Qwen/Qwen3.5-35B-A3B?" in ended.error("QC-SKU-001")
    as_json = here(capsys, "skus", "show", "qwen3.5-44b", "--json")
    assert (as_json.code, as_json.json["error"]["code"]) == (2, "QC-SKU-001")


@pytest.mark.parametrize("arguments", [("list", "--json"), ("show", "qwen3.5-4b")])
def test_skus_import_neither_torch_nor_a_plugin(arguments: tuple[str, ...]) -> None:
    ended, modules = modules_after("skus", *arguments)
    assert ended.code == 0
    tops = {name.partition(".")[0] for name in modules}
    assert not tops & {"torch", "transformers", "safetensors", "numpy", "rich", "qcore_qwen35"}


# -- what has no weights


@pytest.mark.parametrize(
    "arguments",
    [("inspect", "{m}"), ("generate", "{m}", "--prompt", "x"),
     ("train", "--model", "{m}", "--data", "d", "--output", "o"),
     ("merge", "--model", "{m}", "--adapter", "a", "--output", "o")],
    ids=lambda words: words[0],
)  # fmt: skip
@pytest.mark.parametrize("model", ["qwen3.5-plus", "qwen/qwen3.5-flash-02-23"])
def test_a_hosted_model_is_refused_by_every_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], model: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    ended = here(capsys, *(word.format(m=model) for word in arguments))
    assert ended.code == 65
    line = ended.error("QC-SKU-005")
    assert "served by API only" in line
    assert "Fix: name Qwen/Qwen3.5-" in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sparse_checkpoint(tmp_path / "qwen3.5-plus", small_config(), small_shapes())
    ended = here(capsys, "inspect", "qwen3.5-plus", "--json")
    assert (ended.code, ended.json["generation"]) == (0, "3.5")


# -- train without --model


def test_train_without_a_model_names_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for preset in ((), ("--preset", "quick")):
        ended = here(capsys, "train", "--data", "x", "--output", "y", *preset)
        assert ended.code == 2
        assert "or --generation 3.5 for Qwen/Qwen3.5-4B" in ended.error("QC-CLI-002")


@pytest.mark.parametrize(
    ("flags", "model", "origin"),
    fast([(("--preset", "qwen3.5-2b"), "Qwen/Qwen3.5-2B", "preset qwen3.5-2b-12g"),
          (("--preset", "quick", "--generation", "3.5"), "Qwen/Qwen3.5-4B",
           "the default base of generation 3.5"),
          (("--set", "generation=3.5"), "Qwen/Qwen3.5-4B", "the default base of generation 3.5")],
         names=3),
    ids=["the preset's", "a preset without one", "no preset"],
)  # fmt: skip
def test_train_without_a_model_takes_the_default_and_says_so(
    flags: tuple[str, ...], model: str, origin: str
) -> None:
    code = (
        "import sys, qcore.cli.main as cli, qcore.training.train as verb\n"
        "def train(model, *a, reporter, **k):\n"
        "    reporter.table('', [])\n"
        "    raise SystemExit(f'TRAINS {model}')\n"
        "verb.train = train\n"
        "cli.main()\n"
    )
    ended = apart(
        "train", "--data", "x", "--output", "y", *flags, command=(sys.executable, "-c", code)
    )
    assert f"TRAINS {model}" in ended.err
    assert f"model = {model} (from {origin})" in ended.err


def test_presets_list_tells_the_default_bases(capsys: pytest.CaptureFixture[str]) -> None:
    told = here(capsys, "presets", "list", "--json").json
    assert told["default_base_models"]["3.5"] == "Qwen/Qwen3.5-4B"
    people = here(capsys, "presets", "list").out
    assert "default base of generation 3.5: Qwen/Qwen3.5-4B" in people


# -- inspect beside the record


@pytest.mark.parametrize("sku", fast([*DENSE, *EXPERTS], "Qwen3.5-0.8B", "Qwen3.5-35B-A3B"))
def test_inspect_of_every_sku_differs_in_nothing(shared: Path, tmp_path: Path, sku: str) -> None:
    needs(sku)
    shapes = shapes_of(shared, sku)
    folder = write_sku(shared, tmp_path / sku, sku, shapes)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = apart("inspect", folder, "--json", command=(str(SCRIPT),))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert ended.code == 0, ended.out + ended.err
    told = ended.json
    record = load_skus().get(f"Qwen/{sku}")
    assert told["record"]["id"] == record.id
    assert differing(ended) == {}
    assert told["record"]["note"] is None
    assert told["parameters"] == record.value("parameters") == sum(map(math.prod, shapes.values()))
    assert (told["unaccounted"], told["differences"]) == ([], [])
    layouts = {key: fact.value for key, fact in record.facts["layout"].items()}
    assert told["layouts"] == layouts | {"vision": "dense"}
    assert told["generation"] == record.generation
    assert seconds < 5 * 1.0  # of the processor: five times what is asked for
    _, modules = modules_after("inspect", folder, "--json")
    assert "torch" not in modules


def use_records(monkeypatch: pytest.MonkeyPatch, skus: Skus) -> None:
    """Replace the records under every name by which a verb calls for them."""
    for module in ("qcore.skus.registry", "qcore.preflight.inspect"):
        monkeypatch.setattr(f"{module}.load_skus", lambda *a: skus)


@pytest.fixture
def small_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Skus:
    """A record of the small checkpoint of the tests, in place of the installed ones."""
    text = {"linear_num_value_heads": 4, "hidden_size": 24, "num_hidden_layers": 4}
    total = sum(math.prod(shape) for shape in small_shapes().values())
    file = tmp_path / "records" / "small.yaml"
    file.parent.mkdir()
    file.write_text(f"""\
schema_version: 1
generation: "3.5"
sources: {{page: https://example.org}}
skus:
  - id: Org/Small-1B
    architecture: qwen3_5
    facts:
      - mark: verified
        source: page
        values:
          link: https://example.org
          release_date: 2026-01-01
          licence: MIT
          context_native: 4096
          modalities: [text, image]
          class: Qwen3_5ForConditionalGeneration
          model_type: qwen3_5
          text_model_type: qwen3_5_text
          revisions: [abc]
        shape: {json.dumps(text)}
        config: {{vision_config.depth: 1, bos_token_id: null, tie_word_embeddings: true}}
        generation_config: {{eos_token_id: [7, 8]}}
        tokens: {{<end>: 7}}
      - mark: tested
        source: page
        values: {{parameters: {total}}}
        tensors: {{total: {len(small_shapes())}, model.visual: 3, mtp: 15}}
        layout: {{text: dense, mtp: dense}}
  - id: Org/Other-2B
    architecture: qwen3_5
    facts:
      - mark: verified
        source: page
        values: {{link: https://example.org, release_date: 2026-01-01, licence: MIT,
          context_native: 1, modalities: [text], class: x, model_type: qwen3_5, parameters: 1}}
        shape: {{hidden_size: 32, num_hidden_layers: 8, linear_num_value_heads: 8}}
""")
    from dataclasses import replace

    from qcore.skus.file import read_skus

    skus = Skus(entries=tuple(replace(sku, origin="test") for sku in read_skus(file)))
    use_records(monkeypatch, skus)
    return skus


def inspected(capsys: pytest.CaptureFixture[str], folder: Path) -> Ended:
    ended = here(capsys, "inspect", folder, "--json")
    assert ended.code == 0, ended.out
    return ended


def test_the_record_is_found_by_sizes_and_nothing_differs(
    small_record: Skus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sparse_checkpoint(tmp_path / "any-name", small_config(), small_shapes())
    assert inspected(capsys, folder).json["record"] == {
        "id": "Org/Small-1B", "note": None, "differences": [], "unread": [],
    }  # fmt: skip
    people = here(capsys, "inspect", folder).out
    assert "  record      Org/Small-1B: no difference\n" in people
    assert "  layout      text dense, mtp dense\n" in people


def test_a_name_never_decides_and_is_told_where_it_disagrees(
    small_record: Skus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sparse_checkpoint(tmp_path / "other-2b-tuned", small_config(), small_shapes())
    ended = inspected(capsys, folder)
    assert ended.json["record"]["id"] == "Org/Small-1B"
    found, recorded = differing(ended)["name"]
    assert "which names Org/Other-2B" in found
    assert recorded == "Org/Small-1B"
    for name in ("x-Small-1B-FP8", "another-2b", "other-2bit", "base"):
        folder = write_sparse_checkpoint(tmp_path / name, small_config(), small_shapes())
        assert differing(inspected(capsys, folder)) == {}, "names no other SKU"


def test_a_text_save_is_told_and_no_error(
    small_record: Skus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(vision=False)
    config = {**config["text_config"], "architectures": ["Qwen3_5ForCausalLM"],
              "tie_word_embeddings": True}  # fmt: skip
    folder = write_sparse_checkpoint(tmp_path / "m", config, as_text_class(small_shapes()))
    ended = inspected(capsys, folder)
    found = differing(ended)
    shapes = as_text_class(small_shapes())
    assert found == {
        "class": ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        "model_type": ("qwen3_5_text", "qwen3_5"),
        "vision_config": (None, "a section"),
        "parameters": (
            sum(map(math.prod, shapes.values())), sum(map(math.prod, small_shapes().values())),
        ),
        "tensors.total": (len(shapes), len(small_shapes())),
        "tensors.model.visual": (0, 3),
        "tensors.mtp": (0, 15),
        "layout.mtp": ("absent", "dense"),
    }  # fmt: skip
    marks = {one["field"]: one["mark"] for one in ended.json["record"]["differences"]}
    assert (marks["class"], marks["tensors.mtp"]) == ("verified", "tested")
    people = here(capsys, "inspect", folder).out
    assert "  record      Org/Small-1B: 8 differences\n" in people
    assert "    tensors.mtp: found 0, recorded 15 (tested)\n" in people
    assert "    vision_config: found none, recorded a section (verified)\n" in people


def test_config_tokens_and_generation_config_are_compared(
    small_record: Skus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sparse_checkpoint(tmp_path / "m", small_config(), small_shapes())
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    added = {"9": {"content": "<end>"}, "x": {}, "10": None}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    edit_json(folder / "config.json", lambda c: c["vision_config"].update(depth=2))
    edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=1))
    assert differing(inspected(capsys, folder)) == {
        "config.vision_config.depth": (2, 1),
        "config.tie_word_embeddings": (1, True),
        "generation_config.eos_token_id": (7, [7, 8]),
        "token <end>": (9, 7),
    }
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert "generation_config.eos_token_id" not in differing(inspected(capsys, folder))


@pytest.mark.parametrize(("revision", "differs"), [("abc", False), ("def", True), (None, False)])
def test_a_revision_is_compared_where_it_is_known(
    small_record: Skus, tmp_path: Path, revision: str | None, differs: bool
) -> None:
    from qcore.checkpoint.checkpoint import Checkpoint
    from qcore.plugins.resolve_model import identify
    from qcore.skus.compare import compare

    folder = write_sparse_checkpoint(tmp_path / "m", small_config(), small_shapes())
    checkpoint = Checkpoint.open(folder, source="Org/Small-1B@main", revision=revision)
    layout = identify(str(folder)).layout
    beside = compare(checkpoint, "qwen3_5", "3.5", layout, small_record)
    told = [(one.field, one.found, one.recorded) for one in beside.differences]
    assert told == ([("revision", "def", ("abc",))] if differs else [])


def test_of_two_records_that_fit_the_one_that_differs_least(
    small_record: Skus, tmp_path: Path
) -> None:
    from dataclasses import replace

    from qcore.plugins.resolve_model import identify
    from qcore.skus.compare import compare

    small = small_record.get("small-1b")
    values = {**small.facts["values"], "class": replace(small.facts["values"]["class"], value="x")}
    twin = replace(small, id="Org/Twin-1B", facts={**small.facts, "values": values})
    found = identify(str(write_sparse_checkpoint(tmp_path / "m", small_config(), small_shapes())))
    for skus in (Skus(entries=(small, twin)), Skus(entries=(twin, small))):
        beside = compare(found.checkpoint, "qwen3_5", "3.5", found.layout, skus)
        assert beside.sku is not None
        assert beside.sku.id == "Org/Small-1B"
        assert beside.note == "Org/Twin-1B has the same sizes; Org/Small-1B differs least"
    other = compare(found.checkpoint, "qwen3_5", "3.6", found.layout, small_record)
    assert (other.sku, other.note) == (None, "none of generation 3.6 has these sizes")


def test_no_record_fits(
    small_record: Skus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, with the nearest where it is near; no failure."""
    config = small_config(num_hidden_layers=3, layer_types=["linear_attention"] * 3)
    shapes = {n: s for n, s in small_shapes().items() if "layers.3." not in n}
    folder = write_sparse_checkpoint(tmp_path / "m", config, shapes)
    record = inspected(capsys, folder).json["record"]
    assert (record["id"], record["differences"]) == (None, [])
    assert record["note"] == (
        "none of generation 3.5 has these sizes; nearest is Org/Small-1B: "
        "config.num_hidden_layers: found 3, recorded 4"
    )
    people = here(capsys, "inspect", folder).out
    assert f"  record      {record['note']}\n" in people


def test_a_broken_record_file_does_not_stop_inspect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcore.config.registry import BrokenFile

    bad = BrokenFile(origin="plug", file=tmp_path / "a.yaml", reason="breaks the contract")
    unread = Skus(entries=(), broken=(bad,))
    use_records(monkeypatch, unread)
    folder = write_sparse_checkpoint(tmp_path / "m", small_config(), small_shapes())
    assert inspected(capsys, folder).json["record"]["unread"] == ["plug: breaks the contract"]
    assert (
        "  record      those of plug: breaks the contract\n" in here(capsys, "inspect", folder).out
    )
    listed = here(capsys, "skus", "list")
    assert listed.code == 0
    assert "broken: plug" in listed.err


# -- variants of real ones


def test_a_patched_template_and_another_base_are_told(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sku(shared, tmp_path / "m", "Qwen3.5-4B", shapes_of(shared, "Qwen3.5-4B"))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{# patched #}")
    found = differing(inspected(capsys, folder))
    assert list(found) == ["template_sha256"]
    assert found["template_sha256"][0] != found["template_sha256"][1][0]
    template.unlink()
    assert differing(inspected(capsys, folder))["template_sha256"][0] is None


def test_yarn_is_told(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sku(shared, tmp_path / "m", "Qwen3.5-4B", shapes_of(shared, "Qwen3.5-4B"))
    change = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    edit_json(folder / "config.json", lambda c: c["text_config"]["rope_parameters"].update(change))
    assert differing(inspected(capsys, folder)) == {
        "config.rope_parameters.rope_type": ("yarn", "default")
    }


def test_per_expert_where_the_record_says_fused(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sku = "Qwen3.5-35B-A3B"
    needs(sku)
    config = json.loads((folder_of(shared, sku) / "config.json").read_text())
    shapes = derived(config, mtp_fused=True, fused=False)
    folder = write_sku(shared, tmp_path / "m", sku, shapes)
    ended = inspected(capsys, folder)
    assert ended.json["layouts"] == {
        "text": "per expert", "mtp": "fused", "vision": "dense",
    }  # fmt: skip
    assert differing(ended) == {
        "tensors.total": (len(shapes), 1811),
        "tensors.mtp": (19, 785),
        "layout.text": ("per expert", "fused"),
        "layout.mtp": ("fused", "per expert"),
    }

"""The rows of the tower against the key lists of every SKU, and the guards of its config."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.model_kit import key_list
from support.sku_kit import config_of, derived, shapes_of, write_sku
from transformers import Qwen3_5Config

from qcore.api.parameters import LINEAR, Aim, Store, Table
from qcore.api.records import Severity
from qcore.errors import InputError, QcoreError
from qcore.plugins.resolve_model import identify
from qcore.preflight.modality import unread
from qcore_multimodal.guards import config_findings, findings
from qcore_multimodal.table import GROUPS, parts

SKUS = (
    "Qwen3.5-0.8B", "Qwen3.5-2B", "Qwen3.5-4B", "Qwen3.5-9B", "Qwen3.5-27B", "Qwen3.5-35B-A3B",
    "Qwen3.6-27B", "Qwen3.6-35B-A3B",
)  # fmt: skip
COUNTS = {"Qwen3.5-0.8B": 153, "Qwen3.5-2B": 297, "Qwen3.5-4B": 297}  # the others: 333
ROOT = "model.visual."


def tower_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in Table(list(parts(config)))}


@pytest.mark.parametrize("sku", SKUS)
def test_every_name_and_shape(shared: Path, sku: str) -> None:
    listed = {k: v for k, v in shapes_of(shared, sku).items() if k.startswith(ROOT)}
    assert len(listed) == COUNTS.get(sku, 333)
    assert tower_of(config_of(shared, sku)) == listed


def test_every_key_list_is_met(shared: Path) -> None:
    """A folder that is added to the reference files is looked at too."""
    found = sorted((shared / "skus").glob("*/*/weight_keys.txt"))
    assert len(found) >= len(SKUS)
    for path in found:
        config = json.loads((path.parent / "config.json").read_text())
        listed = {k: v for k, v in key_list(path).items() if k.startswith(ROOT)}
        assert tower_of(config) == listed, path


@pytest.mark.parametrize("sku", ["Qwen3.5-122B-A10B", "Qwen3.5-397B-A17B"])
def test_derived_skus(shared: Path, sku: str) -> None:
    config = config_of(shared, sku)
    shapes = derived(config, mtp_fused=False)
    assert tower_of(config) == {k: v for k, v in shapes.items() if k.startswith(ROOT)}


@pytest.mark.parametrize("sku", ["Qwen3.5-0.8B", "Qwen3.6-35B-A3B"])
def test_a_checkpoint_is_explained(shared: Path, tmp_path: Path, sku: str) -> None:
    found = identify(str(write_sku(shared, tmp_path, sku, shapes_of(shared, sku))))
    assert not found.layout.carried
    assert not found.layout.absent
    assert found.modality is not None
    part = found.layout.table.part("vision")
    assert part.owner == "qcore-multimodal", "core fills it in"
    assert not found.layout.loads(part)
    assert found.using(found.modality).layout.loads(part)


@pytest.mark.parametrize(
    "missing",
    ["patch_embed.proj.bias", "pos_embed.weight", "blocks.7.attn.qkv.bias", "merger.norm.weight"],
)
def test_a_missing_tensor_is_refused(shared: Path, tmp_path: Path, missing: str) -> None:
    shapes = dict(shapes_of(shared, "Qwen3.5-0.8B"))
    del shapes[ROOT + missing]
    write_sku(shared, tmp_path, "Qwen3.5-0.8B", shapes)
    with pytest.raises(QcoreError, match=missing.replace(".", r"\.")):
        identify(str(tmp_path))


def test_a_shape_of_another_size_is_refused(shared: Path, tmp_path: Path) -> None:
    name = f"{ROOT}merger.linear_fc2.weight"
    shapes = dict(shapes_of(shared, "Qwen3.5-0.8B")) | {name: (1024, 3071)}
    write_sku(shared, tmp_path, "Qwen3.5-0.8B", shapes)
    with pytest.raises(QcoreError, match="linear_fc2"):
        identify(str(tmp_path))


def test_a_checkpoint_without_any_tower_tensor_is_text(shared: Path, tmp_path: Path) -> None:
    shapes = {k: v for k, v in shapes_of(shared, "Qwen3.5-0.8B").items() if ROOT not in k}
    write_sku(shared, tmp_path, "Qwen3.5-0.8B", shapes)
    found = identify(str(tmp_path))
    assert found.layout.absent == ("vision",)
    assert found.modality is None


def test_sections_that_contradict_each_other(shared: Path, tmp_path: Path) -> None:
    write_sku(shared, tmp_path, "Qwen3.5-0.8B", shapes_of(shared, "Qwen3.5-0.8B"))
    config = config_of(shared, "Qwen3.5-0.8B")
    config["vision_config"]["out_hidden_size"] = 2048
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="dimension 'hidden' has two values") as caught:
        identify(str(tmp_path))
    assert caught.value.code == "QC-TABLE-001"


def test_groups_and_storage(shared: Path) -> None:
    (part,) = parts(config_of(shared, "Qwen3.5-9B"))
    assert part.groups == GROUPS == {"vision": Aim.ASKED, "merger": Aim.ASKED}
    assert part.optional
    assert part.loaded
    mapped = [row for row in part.rows if row.kind is not None]
    assert {row.kind for row in mapped} == {LINEAR}
    assert [(row.name.removeprefix(ROOT), row.group) for row in mapped] == [
        ("blocks.{block}.attn.qkv.weight", "vision"),
        ("blocks.{block}.attn.proj.weight", "vision"),
        ("blocks.{block}.mlp.linear_fc1.weight", "vision"),
        ("blocks.{block}.mlp.linear_fc2.weight", "vision"),
        ("merger.linear_fc1.weight", "merger"),
        ("merger.linear_fc2.weight", "merger"),
    ]
    assert {row.store for row in part.rows} == {Store.BASE}
    assert not {row.group for row in part.rows} & {"embed", "head", "norm"}  # the text's


SIZES = (
    "depth", "hidden_size", "intermediate_size", "out_hidden_size", "num_position_embeddings",
    "in_channels", "patch_size", "temporal_patch_size", "spatial_merge_size",
)  # fmt: skip
NOT_SIZES = [None, 0, -1, True, "16", 2.0, [16, 16]]


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", NOT_SIZES, ids=repr)
def test_a_size_that_is_none(shared: Path, key: str, value: object) -> None:
    config = config_of(shared, "Qwen3.5-0.8B")
    config["vision_config"][key] = value
    with pytest.raises(InputError) as caught:
        list(parts(config))
    assert caught.value.code == "QC-VISION-001"
    assert caught.value.message.startswith(f"config.json: vision_config.{key}: ")
    assert repr(value) in caught.value.message
    assert "\n" not in caught.value.message
    del config["vision_config"][key]
    with pytest.raises(InputError, match="found None"):
        list(parts(config))


def test_more_blocks_than_there_can_be(shared: Path) -> None:
    config = config_of(shared, "Qwen3.5-0.8B")
    config["vision_config"]["depth"] = 1000
    assert len(tower_of(config)) == 12 * 1000 + 9
    config["vision_config"]["depth"] = 1001
    with pytest.raises(InputError, match="from 1 to 1000"):
        list(parts(config))


@pytest.mark.parametrize("section", [[], "vision", 3])
def test_a_section_that_is_no_mapping(section: object) -> None:
    with pytest.raises(InputError, match="expected a mapping"):
        list(parts({"vision_config": section}))


@pytest.mark.parametrize("sku", SKUS)
def test_published_configs_pass_the_guards(shared: Path, sku: str) -> None:
    assert not list(config_findings(config_of(shared, sku)["vision_config"]))


def test_a_config_that_transformers_saved_passes(shared: Path) -> None:
    saved = Qwen3_5Config(**config_of(shared, "Qwen3.5-0.8B")).to_dict()["vision_config"]
    assert saved["model_type"] == "qwen3_5_vision"
    assert saved["rope_parameters"]["rope_type"] == "axial"
    assert not list(config_findings(saved))


WRONG: list[tuple[str, object, str, str]] = [
    ("hidden_act", "gelu", "QC-VISION-010", "hidden_act"),
    ("hidden_act", "silu", "QC-VISION-010", "hidden_act"),
    ("rope_parameters", [10000], "QC-VISION-011", "rope_parameters"),
    ("rope_parameters", {"rope_type": "default"}, "QC-VISION-011", "rope_parameters.rope_type"),
    ("rope_parameters", {"type": "yarn"}, "QC-VISION-011", "rope_parameters.rope_type"),
    ("rope_parameters", {"rope_theta": 0}, "QC-VISION-011", "rope_parameters.rope_theta"),
    ("rope_parameters", {"rope_theta": None}, "QC-VISION-011", "rope_parameters.rope_theta"),
    ("rope_parameters", {"factor": 4.0}, "QC-VISION-011", "rope_parameters.factor"),
    ("num_heads", 7, "QC-VISION-012", "num_heads"),
    ("num_heads", 0, "QC-VISION-012", "num_heads"),
    ("num_heads", None, "QC-VISION-012", "num_heads"),
    ("num_heads", 128, "QC-VISION-012", "num_heads"),  # heads of 6: no pair for each axis
    ("head_dim", 32, "QC-VISION-012", "head_dim"),
    ("num_position_embeddings", 2303, "QC-VISION-012", "num_position_embeddings"),
]


@pytest.mark.parametrize(("key", "value", "code", "field"), WRONG, ids=lambda x: str(x))
def test_what_the_blocks_do_not_compute(
    shared: Path, key: str, value: object, code: str, field: str
) -> None:
    vision = copy.deepcopy(config_of(shared, "Qwen3.5-0.8B")["vision_config"]) | {key: value}
    (finding,) = config_findings(vision)
    assert (finding.code, finding.field) == (code, f"vision_config.{field}")


@pytest.mark.parametrize(
    ("key", "value"), [("deepstack_visual_indexes", [5, 11]), ("model_type", "qwen3_vl")]
)
def test_a_tower_of_another_kind_is_nobodys(
    shared: Path, tmp_path: Path, key: str, value: object
) -> None:
    """Text trains as without the plugin, its tensors are carried, and why is said."""
    shapes = shapes_of(shared, "Qwen3.5-0.8B")
    shapes["model.visual.deepstack_merger_list.0.norm.weight"] = (3072,)
    write_sku(shared, tmp_path, "Qwen3.5-0.8B", shapes)
    config = config_of(shared, "Qwen3.5-0.8B")
    with pytest.raises(InputError, match=r"model\.visual\.deepstack_merger_list\.0\.norm"):
        identify(str(tmp_path))  # nothing in config.json tells of it
    config["vision_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = identify(str(tmp_path))
    assert found.modality is None
    assert found.layout.carried_roots() == {
        "model.visual": len(tower_of(config_of(shared, "Qwen3.5-0.8B"))) + 1
    }
    assert unread(found) == "no installed plugin reads what vision_config describes"
    request = SimpleNamespace(layout=found.layout, checkpoint=found.checkpoint, token_ids={})
    (finding,) = findings(request)  # type: ignore[arg-type]
    assert (finding.code, finding.field) == ("QC-VISION-010", f"vision_config.{key}")
    assert finding.severity is Severity.WARNING
    assert "media cannot be read" in finding.what


def test_guards_are_of_runs_that_load_the_tower(shared: Path, tmp_path: Path) -> None:
    write_sku(shared, tmp_path, "Qwen3.5-0.8B", shapes_of(shared, "Qwen3.5-0.8B"))
    config = config_of(shared, "Qwen3.5-0.8B")
    config["vision_config"]["hidden_act"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = identify(str(tmp_path))
    assert found.modality is not None
    request = SimpleNamespace(layout=found.layout, checkpoint=found.checkpoint, token_ids={})
    assert not list(findings(request))  # type: ignore[arg-type]
    request.layout = found.using(found.modality).layout
    assert [one.code for one in findings(request)] == ["QC-VISION-010"]  # type: ignore[arg-type]

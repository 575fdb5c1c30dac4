"""The table met with headers: total both ways, on the real key lists and on small ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.model_kit import as_text_class, key_list, small_config, small_shapes

from qcore.api.parameters import Namespace, Part, Row, Table, cat, stack
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.layout import Layout, locate, survey
from qcore.checkpoint.layout_faults import faults
from qcore.errors import InputError, PreflightError
from qcore.nn.load import read_tensor
from qcore.testing import write_sparse_checkpoint
from qcore_qwen35.table import parts

ROOT = "model.language_model"

#: Parameters as the hub's API reports them, and tensors in all, of the tower, of mtp.
DENSE = {
    "qwen3.5/Qwen3.5-0.8B": (873_438_784, 488, 153, 15),
    "qwen3.5/Qwen3.5-2B": (2_274_069_824, 632, 297, 15),
    "qwen3.5/Qwen3.5-4B": (4_659_865_088, 738, 297, 15),
    "qwen3.5/Qwen3.5-9B": (9_653_104_368, 775, 333, 15),
    "qwen3.5/Qwen3.5-27B": (27_781_427_952, 1199, 333, 15),
    "qwen3.6/Qwen3.6-27B": (27_781_427_952, 1199, 333, 15),
}


def look(folder: Path) -> tuple[Layout, list[str], list[Any]]:
    checkpoint = Checkpoint.open(folder)
    layout, problems = survey(Table(list(parts(checkpoint.config))), checkpoint)
    return layout, [problem.code for problem in problems], problems


def real(shared: Path, sku: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    folder = shared / "skus" / sku
    return json.loads((folder / "config.json").read_text()), key_list(folder / "weight_keys.txt")


# -- the real key lists


@pytest.mark.parametrize("sku", DENSE)
def test_every_tensor_of_a_real_checkpoint_is_explained(shared: Path, tmp_path: Path, sku: str):
    total, tensors, visual, mtp = DENSE[sku]
    config, shapes = real(shared, sku)
    layout, codes, _ = look(write_sparse_checkpoint(tmp_path, config, shapes, shards=3))
    assert codes == []
    assert layout.parameters == total
    assert layout.carried_roots() == {"model.visual": visual}
    assert layout.absent == ()
    assert len(layout.by_disk) + visual == tensors == len(shapes)
    assert sum(name.startswith("mtp.") for name in layout.by_disk) == mtp
    assert layout.namespaces["text"].name == "vl"
    assert layout.by_disk.keys() | {header.name for header in layout.carried} == shapes.keys()


@pytest.mark.parametrize("sku", DENSE)
def test_a_text_class_save_of_a_real_checkpoint(shared: Path, tmp_path: Path, sku: str):
    config, shapes = real(shared, sku)
    text = as_text_class(shapes)
    flat = config["text_config"] | {"architectures": ["Qwen3_5ForCausalLM"]}
    layout, codes, _ = look(write_sparse_checkpoint(tmp_path, flat, text))
    assert codes == []
    assert layout.namespaces["text"].name == "text"
    assert layout.absent == ("mtp",)
    assert not layout.carried
    assert layout.by_disk.keys() == text.keys()
    dropped = sum(
        torch.Size(shape).numel() for name, shape in shapes.items() if ".visual." in name
        or name.startswith("mtp.")
    )  # fmt: skip
    assert layout.parameters == DENSE[sku][0] - dropped


@pytest.mark.parametrize("sku", DENSE)
def test_names_go_to_canonical_and_back(shared: Path, tmp_path: Path, sku: str):
    config, shapes = real(shared, sku)
    for folder, names, namespace in (
        ("hub", shapes, "vl"),
        ("text", as_text_class(shapes), "text"),
    ):
        layout, _, _ = look(write_sparse_checkpoint(tmp_path / folder, config, names))
        spell = layout.namespaces["text"].spell
        assert layout.namespaces["text"].name == namespace
        for name, (tensor, region) in layout.by_disk.items():
            assert tensor.name in shapes  # canonical is what the hub calls it
            # mtp has one spelling in both.
            assert (tensor.name if tensor.part.name == "mtp" else spell(tensor.name)) == name
            assert region == tuple(slice(0, size) for size in shapes[tensor.name])
            assert tensor.shape == shapes[tensor.name]


# -- small ones


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return write_sparse_checkpoint(tmp_path / "hub", small_config(), small_shapes())


def test_a_small_checkpoint_is_explained(hub: Path):
    shapes = small_shapes()
    layout, codes, _ = look(hub)
    assert codes == []
    assert layout.parameters == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert layout.carried_roots() == {"model.visual": 3}
    assert layout.located["lm_head.weight"].tied == f"{ROOT}.embed_tokens.weight"
    assert layout.located["lm_head.weight"].places == ()
    assert layout.ties == {}
    assert all(e.numel == p.header.numel for e in layout.table
               for p in layout.located[e.name].places)  # fmt: skip


def test_groups_count_what_is_on_disk_once(hub: Path):
    layout, _, _ = look(hub)
    groups = layout.groups()
    assert "head" not in groups  # tied: its parameters are the embedding's
    assert groups["embed"] == (1, 96 * 24)
    assert groups["attn"] == (4, 128 * 24 + 2 * 32 * 24 + 24 * 64)
    assert groups["mlp"] == (12, 4 * 3 * 40 * 24)
    assert groups["gdn_gates"] == (6, 6 * 4 * 24)
    assert sum(tensors for tensors, _ in groups.values()) == len(layout.by_disk)


@pytest.mark.parametrize("vision_section", [False, True])
def test_a_text_class_save(tmp_path: Path, vision_section: bool):
    config = small_config(vision=vision_section)
    layout, codes, _ = look(
        write_sparse_checkpoint(tmp_path, config, as_text_class(small_shapes()))
    )
    assert codes == []
    assert layout.absent == ("mtp",)
    assert layout.namespaces["text"].name == "text"


def test_a_text_save_that_keeps_the_hubs_names(tmp_path: Path):
    shapes = {n: s for n, s in small_shapes().items() if ".visual." not in n and "mtp." not in n}
    layout, codes, _ = look(write_sparse_checkpoint(tmp_path, small_config(vision=False), shapes))
    assert codes == []
    assert layout.namespaces["text"].name == "vl"
    assert (layout.absent, layout.carried) == (("mtp",), {})


def test_mtp_that_the_config_does_not_claim_is_refused(tmp_path: Path):
    config = small_config(mtp_num_hidden_layers=0)
    tower = {f"model.visual.blocks.{n}.norm1.weight": (8,) for n in range(20)}
    _, codes, problems = look(write_sparse_checkpoint(tmp_path, config, small_shapes() | tower))
    # The larger subtree has the one section, as in every real checkpoint; mtp.* has none.
    assert set(codes) == {"QC-KEY-002"}
    assert all(problem.field.startswith("mtp.") for problem in problems)


def test_mtp_partly_there(tmp_path: Path):
    shapes = small_shapes()
    del shapes["mtp.norm.weight"]
    _, codes, (problem,) = look(write_sparse_checkpoint(tmp_path, small_config(), shapes))
    assert codes == ["QC-KEY-005"]
    assert problem.field == "mtp.norm.weight"
    assert "14 of 15" in problem.message
    assert problem.exit_code == 65


# -- strays


@pytest.mark.parametrize(
    ("stray", "vision"),
    [
        ("model.foo.weight", False),
        ("model.foo.weight", True),
        ("foo", True),
        ("foo.bar", False),
        ("model.language_model.foo.weight", True),
        ("model.language_model.layers.0.linear_attn.foo", False),
        ("model.language_model.layers.9.mlp.up_proj.weight", True),
        ("mtp.layers.1.mlp.up_proj.weight", True),
        ("lm_head.bias", True),
        ("lm_head.weight.extra", True),
        ("model.language_model.layers.0.linear_attn.in_proj_qkv.weight_scale_inv", True),
    ],
)
def test_a_stray_tensor_is_refused(tmp_path: Path, stray: str, vision: bool):
    shapes = small_shapes(vision=vision) | {stray: (3,)}
    layout, codes, problems = look(
        write_sparse_checkpoint(tmp_path, small_config(vision=vision), shapes)
    )
    assert codes == ["QC-KEY-002"]
    assert problems[0].field == stray
    assert problems[0].file.endswith("model.safetensors")
    assert layout.carried_roots() == ({"model.visual": 3} if vision else {})


def test_a_stray_is_refused_even_where_a_section_is_free(tmp_path: Path):
    # The tower is gone, its section is still in config.json: one subtree may be carried, and
    # a single tensor in a subtree of its own is what the rule lets through; two are not.
    shapes = small_shapes(vision=False) | {"model.foo.weight": (3,), "model.bar.weight": (3,)}
    layout, codes, _ = look(write_sparse_checkpoint(tmp_path, small_config(), shapes))
    assert codes == ["QC-KEY-002"]
    assert len(layout.carried) == 1


def test_a_subtree_that_no_section_claims_is_refused_whole(tmp_path: Path):
    config = small_config(vision=False)
    layout, codes, problems = look(write_sparse_checkpoint(tmp_path, config, small_shapes()))
    assert codes == ["QC-KEY-002"] * 3
    (fault,) = faults(problems)
    assert "belongs to no part of the model (one of 3)" in fault.message
    assert not layout.carried


def test_a_section_of_another_kind_claims_nothing(tmp_path: Path):
    config = small_config(vision=False) | {
        "quantization_config": {"quant_method": "x"},
        "audio_config": None,
        "note_config": "text",
    }
    _, codes, _ = look(write_sparse_checkpoint(tmp_path, config, small_shapes()))
    assert codes == ["QC-KEY-002"] * 3


def test_two_sections_carry_two_subtrees(tmp_path: Path):
    shapes = small_shapes() | {"model.audio.a.weight": (3,), "model.audio.b.weight": (3,)}
    config = small_config() | {"audio_config": {"depth": 1}}
    layout, codes, _ = look(write_sparse_checkpoint(tmp_path, config, shapes))
    assert codes == []
    assert layout.carried_roots() == {"model.visual": 3, "model.audio": 2}


def test_a_misspelt_name_is_both_missing_and_extra_with_the_nearest(tmp_path: Path):
    name = f"{ROOT}.layers.1.mlp.up_proj.weight"
    wrong = f"{ROOT}.layers.1.mlp.upp_proj.weight"
    shapes = {wrong if n == name else n: s for n, s in small_shapes().items()}
    _, codes, problems = look(write_sparse_checkpoint(tmp_path, small_config(), shapes))
    assert codes == ["QC-KEY-001", "QC-KEY-002"]
    missing, extra = problems
    assert missing.field == name
    assert f"nearest is {wrong}" in missing.message
    assert extra.field == wrong
    assert f"nearest expected name is {name}" in extra.message
    (fault,) = faults(problems)
    assert fault.code == "QC-KEY-001"
    assert name in fault.message
    assert wrong in fault.message


def test_a_missing_tensor(tmp_path: Path):
    name = f"{ROOT}.layers.2.linear_attn.A_log"
    shapes = {n: s for n, s in small_shapes().items() if n != name}
    folder = write_sparse_checkpoint(tmp_path, small_config(), shapes)
    _, codes, (problem,) = look(folder)
    assert codes == ["QC-KEY-001"]
    assert problem.field == name
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InputError, match="is missing") as caught:
        locate(Table(list(parts(checkpoint.config))), checkpoint)
    assert not isinstance(caught.value, PreflightError)


def test_many_missing_tensors_are_one_line(tmp_path: Path):
    config = small_config(num_hidden_layers=40, layer_types=["linear_attention"] * 40)
    layout, codes, problems = look(write_sparse_checkpoint(tmp_path, config, small_shapes()))
    assert codes.count("QC-KEY-001") == 37 * 9 + 36 * 5  # layer 3 has its norms and its mlp
    assert layout.namespaces["text"].name == "vl"
    (fault,) = faults(problems)
    assert "is missing (one of 513)" in fault.message
    assert "6 that belong to no part, first" in fault.message
    assert "\n" not in fault.message


def test_a_wrong_shape_names_both_shapes(tmp_path: Path):
    name = f"{ROOT}.layers.3.self_attn.q_proj.weight"
    _, codes, (problem,) = look(
        write_sparse_checkpoint(tmp_path, small_config(), small_shapes() | {name: (64, 24)})
    )
    assert codes == ["QC-KEY-003"]
    assert problem.field == name
    assert "found [64, 24], expected [128, 24]" in problem.message


def test_swapped_layer_types_name_the_two_layers(tmp_path: Path):
    config = small_config(layer_types=["linear_attention"] * 2 + ["full_attention"] + [
        "linear_attention"])  # fmt: skip
    _, codes, problems = look(write_sparse_checkpoint(tmp_path, config, small_shapes()))
    assert set(codes) == {"QC-KEY-001", "QC-KEY-002"}
    assert {problem.field.split(".")[3] for problem in problems} == {"2", "3"}
    (fault,) = faults(problems)
    assert "is missing (one of 15)" in fault.message
    assert "15 that belong to no part" in fault.message


def test_a_tied_head_on_disk_is_kept_to_be_compared(tmp_path: Path):
    shapes = small_shapes() | {"lm_head.weight": (96, 24)}
    layout, codes, _ = look(write_sparse_checkpoint(tmp_path, small_config(), shapes))
    assert codes == []
    assert layout.ties == {"lm_head.weight": f"{ROOT}.embed_tokens.weight"}
    assert layout.located["lm_head.weight"].tied is None


def test_an_untied_head_must_be_there(tmp_path: Path):
    _, codes, (problem,) = look(
        write_sparse_checkpoint(tmp_path, small_config(tied=False), small_shapes())
    )
    assert codes == ["QC-KEY-001"]
    assert problem.field == "lm_head.weight"
    layout, codes, _ = look(
        write_sparse_checkpoint(tmp_path / "b", small_config(tied=False), small_shapes(tied=False))
    )
    assert codes == []
    assert layout.located["lm_head.weight"].places[0].header.shape == (96, 24)


def test_a_name_in_both_namespaces_is_extra(tmp_path: Path):
    shapes = small_shapes() | {"model.norm.weight": (24,)}
    _, codes, problems = look(write_sparse_checkpoint(tmp_path, small_config(), shapes))
    assert codes == ["QC-KEY-002"]
    assert problems[0].field == "model.norm.weight"


# -- stacks in a synthetic table


def experts(count: int = 3) -> Table:
    name = "m.{layer}.experts.gate_up"
    apart = stack("expert", cat("m.{layer}.e.{expert}.gate", "m.{layer}.e.{expert}.up"))
    return Table([
        Part(
            name="text", owner="d",
            rows=(Row(name, "experts 2*ffn hidden", "experts", also=apart),
                  Row("m.norm", "hidden", "norm")),
            dims={"experts": count, "ffn": 2, "hidden": 4},
            axes={"layer": (0, 1), "expert": tuple(range(count))},
            namespaces=(Namespace(name="hub"), Namespace(name="text", prefixes=(("m.", "n."),))),
        )
    ])  # fmt: skip


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "x"}')
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def mixed(root: str = "m") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Layer 0 fused, layer 1 per expert; returns also what layer 1 is when stacked."""
    gates, ups = torch.randn(3, 2, 4).bfloat16(), torch.randn(3, 2, 4).bfloat16()
    tensors = {f"{root}.norm": torch.zeros(4), f"{root}.0.experts.gate_up": torch.zeros(3, 4, 4)}
    for e in range(3):
        tensors[f"{root}.1.e.{e}.gate"] = gates[e].contiguous()
        tensors[f"{root}.1.e.{e}.up"] = ups[e].contiguous()
    return tensors, torch.cat([gates, ups], 1)


@pytest.mark.parametrize("root", ["m", "n"])
def test_each_tensor_picks_its_own_spelling_and_reads_bit_exact(tmp_path: Path, root: str):
    tensors, stacked = mixed(root)
    checkpoint = written(tmp_path, tensors)
    layout = locate(experts(), checkpoint)
    assert layout.namespaces["text"].name == {"m": "hub", "n": "text"}[root]
    assert len(layout.located["m.0.experts.gate_up"].places) == 1
    item = layout.located["m.1.experts.gate_up"]
    assert len(item.places) == 6
    value = read_tensor(checkpoint, item)
    assert torch.equal(value, stacked)
    # The digest is that of the canonical bytes, however they lie on disk.
    whole = written(tmp_path / "fused", {
        f"{root}.norm": torch.zeros(4), f"{root}.0.experts.gate_up": torch.zeros(3, 4, 4),
        f"{root}.1.experts.gate_up": stacked})  # fmt: skip
    again = locate(experts(), whole).located["m.1.experts.gate_up"]
    assert torch.equal(read_tensor(whole, again), value)
    for name, (tensor, region) in layout.by_disk.items():
        if tensor.name == item.tensor.name:
            assert torch.equal(value[region].view(2, 4), tensors[name])


def test_one_expert_missing_is_one_line(tmp_path: Path):
    tensors, _ = mixed()
    del tensors["m.1.e.2.up"]
    _, problems = survey(experts(), written(tmp_path, tensors))
    (problem,) = problems
    assert (problem.code, problem.field) == ("QC-KEY-004", "m.1.e.2.up")
    assert "1 of 6 pieces are missing" in problem.message


def test_unknown_tensors_beside_absent_pieces_or_parts_are_one_fault(tmp_path: Path):
    tensors, _ = mixed()
    tensors["m.1.e.2.w3"] = tensors.pop("m.1.e.2.up")
    (error,) = faults(survey(experts(), written(tmp_path / "a", tensors))[1])
    assert error.code == "QC-KEY-004"
    assert "1 that belong to no part, first m.1.e.2.w3" in error.message
    shapes = small_shapes()
    shapes["mtp.norms.weight"] = shapes.pop("mtp.norm.weight")
    _, _, problems = look(write_sparse_checkpoint(tmp_path / "b", small_config(), shapes))
    (error,) = faults(problems)
    assert (error.code, error.field) == ("QC-KEY-005", "mtp.norm.weight")
    assert "14 of 15 tensors; 1 that belong to no part, first mtp.norms.weight" in error.message
    assert error.expected == "all of them, or none"


def test_config_says_more_experts_than_the_files_have(tmp_path: Path):
    tensors, _ = mixed()
    _, problems = survey(experts(4), written(tmp_path, tensors))
    assert [problem.code for problem in problems] == ["QC-KEY-003", "QC-KEY-004"]
    assert "2 of 8 pieces are missing" in problems[1].message


def test_pieces_of_unlike_dtype(tmp_path: Path):
    tensors, _ = mixed()
    tensors["m.1.e.1.gate"] = tensors["m.1.e.1.gate"].float()
    _, problems = survey(experts(), written(tmp_path, tensors))
    assert [(problem.code, problem.field) for problem in problems] == [
        ("QC-KEY-006", "m.1.e.1.gate")
    ]


def test_both_spellings_at_once_is_an_extra(tmp_path: Path):
    tensors, stacked = mixed()
    tensors["m.1.experts.gate_up"] = stacked
    _, problems = survey(experts(), written(tmp_path, tensors))
    assert {problem.code for problem in problems} == {"QC-KEY-002"}
    assert len(problems) == 6


def test_fused_beside_a_leftover_of_the_other_spelling(tmp_path: Path):
    tensors, stacked = mixed()
    for e in range(3):
        for kind in ("gate", "up"):
            if (e, kind) != (0, "up"):
                del tensors[f"m.1.e.{e}.{kind}"]
    tensors["m.1.experts.gate_up"] = stacked
    _, problems = survey(experts(), written(tmp_path, tensors))
    assert [(p.code, p.field) for p in problems] == [("QC-KEY-002", "m.1.e.0.up")]

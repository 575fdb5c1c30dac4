"""Rows of the embedding that are trained, against stock PEFT's ``trainable_token_indices``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.change_kit import assert_merged
from support.e2e_kit import documents, loaded_adapter, ours, stock, wanted, wrapped, write_stock
from support.run_kit import SHORT, start, stop_at
from torch import Tensor, nn

from qcore.api.blocks import Packed
from qcore.config.convert import settings_of
from qcore.config.resolve import parse_sets
from qcore.config.settings import Settings
from qcore.config.yaml import parse
from qcore.errors import Interrupted, QcoreError, UsageError
from qcore.merging.merge import merge
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.nn.token_rows import TrainedRows
from qcore.plugins.resolve_model import identify

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (1, 63, 17)
RUN = SHORT | {"max_steps": 3, "target_groups": ("attn",), "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def bases(once: Callable[..., Path]) -> Mapping[bool, Path]:
    """By whether the head is tied to the embedding."""
    return {
        tied: once(f"rows-{tied}", lambda folder, tied=tied: write_stock(folder / "b", tied=tied))
        for tied in (True, False)
    }


def trained(
    base: Path, ids: list[int], dtype: torch.dtype = torch.float32, head: tuple[int, ...] = ()
) -> Model:
    """Our model with LoRA on attention, and rows that have moved."""
    model = ours(base / "b", lora=Lora(r=2, lora_alpha=2), groups=("attn",), dtype=dtype)
    tied = model.head_name == model.embed_name
    model.trained_rows = TrainedRows(ids, head, 48, tied=tied)
    generator = torch.Generator().manual_seed(1)
    for part, weight in (
        (model.trained_rows.embed, model.get_parameter(model.embed_name)),
        (model.trained_rows.head, model.head),
    ):
        if part is not None:
            rows = weight[list(part.ids)].float()
            part.reset(rows + 0.1 * torch.randn(rows.shape, generator=generator))
    return model.train()


def rows_of(model: Model) -> list[nn.Parameter]:
    """The trained rows, those of the embedding first."""
    return model.beside_adapters()


def pefts(base: Path, model: Model) -> tuple[Any, list[Tensor]]:
    """Stock PEFT with our A, B and rows; its own rows."""
    trained = model.trained_rows
    assert trained is not None
    assert trained.embed is not None
    ids: Any = list(trained.embed.ids)
    if trained.head is not None:
        ids = {"embed_tokens": ids, "lm_head": list(trained.head.ids)}
    named = [name.removesuffix(".weight") for name, _ in model.adapters()]
    peer = wrapped(
        stock(base / "b", "vl"), target_modules=named, r=2, lora_alpha=2,
        trainable_token_indices=ids,
    )  # fmt: skip
    theirs = dict(peer.named_parameters())
    with torch.no_grad():
        for name, module in model.adapters():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            theirs[f"{stem}.lora_A.default.weight"].copy_(module.lora_A)
        found = [value for name, value in theirs.items() if "trainable_tokens_delta" in name]
        for own, mine in zip(found, rows_of(model), strict=True):
            own.copy_(mine)
    return peer, found


def pefts_loss(
    base: Path, model: Model, docs: list[Tensor], targets: list[Tensor],
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Any, list[Tensor]]:  # fmt: skip
    """Sum of the loss over documents that go through one by one; the model, its rows."""
    peer, rows = pefts(base, model)
    peer.to(dtype)
    total = torch.zeros(())
    for document, target in zip(docs, targets, strict=True):
        logits = peer(input_ids=document[None], use_cache=False).logits[0].float()
        total = total + F.cross_entropy(logits, target, reduction="sum", ignore_index=-100)
    return total, peer, rows


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("case", ["tied", "untied", "both"])
@pytest.mark.parametrize("chunk", [0, 7])
def test_gradients_of_a_pack_are_pefts(
    bases: Mapping[bool, Path], case: str, policy: str, chunk: int
) -> None:
    tied = case == "tied"
    docs, targets = documents(LENGTHS), wanted(documents(LENGTHS))
    ids = [int(docs[1][5]), 9, int(docs[2][3]), int(docs[1][0])]  # 9 may be in no document
    model = trained(bases[tied], ids, head=(9, int(targets[1].max())) if case == "both" else ())
    loss = model.loss(Packed.of(docs, targets), recompute=policy, chunk=chunk)
    (loss / 3).backward()
    total, peer, rows = pefts_loss(bases[tied], model, docs, targets)
    (total / 3).backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    assert len(rows) == 1 + (case == "both")
    for own, mine in zip(rows, rows_of(model), strict=True):
        assert own.grad is not None
        assert mine.grad is not None
        assert float((mine.grad - own.grad).norm()) <= 1e-5 * float(own.grad.norm())
    for name, module in model.adapters():
        theirs = peer.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        expected = theirs.lora_B["default"].weight.grad
        assert module.lora_B is not None
        assert module.lora_B.grad is not None
        assert float((module.lora_B.grad - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_in_bf16_they_err_as_pefts_do(bases: Mapping[bool, Path], tied: bool) -> None:
    """Embeddings as small as these make every error large, PEFT's too."""
    docs, targets = documents(LENGTHS), wanted(documents(LENGTHS))
    model = trained(bases[tied], [int(docs[1][5]), int(docs[2][3])], torch.bfloat16)
    model.loss(Packed.of(docs, targets)).backward()
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        loss, _, (rows,) = pefts_loss(bases[tied], model, docs, targets, dtype)
        loss.backward()
        assert rows.grad is not None
        gradients.append(rows.grad.float())
    (own,) = rows_of(model)
    found = own.grad
    assert found is not None
    assert found.dtype == torch.float32
    errors = [float((one - gradients[0]).norm()) for one in (found, gradients[1])]
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_run_is_pefts_adapter_and_merges(
    bases: Mapping[bool, Path], rows: Path, tmp_path: Path, tied: bool
) -> None:
    base, out = bases[tied] / "b", tmp_path / "out"
    options = {"trainable_token_indices": (9, 5, 300), "quantization": "none"}
    report = start(base, rows, out, RUN | options)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == [9, 5, 300]
    line = next(line for line in report.coverage if line.group == "embed")
    assert line.trained == 3 * 48
    peer = loaded_adapter(stock(base, "vl"), out)
    values = load_file(out / "adapter_model.safetensors")
    (name,) = (name for name in values if "trainable_tokens" in name)
    before = load_file(base / "model.safetensors")["model.language_model.embed_tokens.weight"]
    moved = (values[name] - before[[9, 5, 300]]).abs().amax(1)
    assert tied == bool((moved > 0).all())  # a tied head reaches all rows
    held = dict(peer.named_parameters())
    (theirs,) = (value for key, value in held.items() if "trainable_tokens_delta" in key)
    assert torch.equal(theirs, values[name])
    merge(str(base), out, tmp_path / "merged")
    changed = assert_merged(peer, base, tmp_path / "merged")
    assert ("model.language_model.embed_tokens.weight" in changed) == bool(moved.any())


@pytest.mark.slow
def test_a_run_is_resumed_and_continued(
    bases: Mapping[bool, Path], rows: Path, tmp_path: Path
) -> None:
    base, more = bases[True] / "b", {"trainable_token_indices": (9, 5), "save_steps": 1}
    start(base, rows, tmp_path / "whole", RUN | more)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            start(base, rows, tmp_path / "again", RUN | more)
    start(base, rows, tmp_path / "again", RUN | more, resume=True)
    one, two = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "again")
    )
    assert one == two
    options = {key: value for key, value in RUN.items() if key not in ("r", "lora_alpha")}
    start(
        base, rows, tmp_path / "next", options | {"max_steps": 1}, init_adapter=tmp_path / "whole"
    )
    first, now = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "next")
    )
    assert first.keys() == now.keys()
    moved = {name: float((now[name] - first[name]).abs().max()) for name in first}
    assert all(0 < value < 1.01 * 5e-3 for value in moved.values())


def test_a_head_of_its_own_has_rows_too(
    bases: Mapping[bool, Path], rows: Path, tmp_path: Path
) -> None:
    base, out = bases[False] / "b", tmp_path / "out"
    more = {"trainable_token_indices": (5,), "trainable_head_token_indices": (7, 3)}
    report = start(base, rows, out, RUN | more | {"quantization": "none"})
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"embed_tokens": [5], "lm_head": [7, 3]}
    assert {x.group: x.trained for x in report.coverage if x.group in ("embed", "head")} == {
        "embed": 48, "head": 96,
    }  # fmt: skip
    held = dict(loaded_adapter(stock(base, "vl"), out).named_parameters())
    values = load_file(out / "adapter_model.safetensors")
    names = [name for name in values if "trainable_tokens" in name]
    assert len(names) == 2
    for name in names:
        assert torch.equal(held[f"{name}.default"], values[name])
    merge(str(base), out, tmp_path / "merged")
    changed = assert_merged(loaded_adapter(stock(base, "vl"), out), base, tmp_path / "merged")
    assert "lm_head.weight" in changed
    with pytest.raises(QcoreError) as error:
        start(bases[True] / "b", rows, tmp_path / "no", RUN | more)
    assert (error.value.code, error.value.field) == (
        "QC-LORA-006", "trainable_head_token_indices",
    )  # fmt: skip


def test_ids_without_a_row_are_refused(
    bases: Mapping[bool, Path], rows: Path, tmp_path: Path
) -> None:
    base = bases[True] / "b"
    beyond = identify(str(base)).layout.table["model.language_model.embed_tokens.weight"].shape[0]
    with pytest.raises(QcoreError) as error:
        start(base, rows, tmp_path / "out", RUN | {"trainable_token_indices": (5, beyond)})
    assert (error.value.code, error.value.field) == ("QC-LORA-006", "trainable_token_indices")


@pytest.mark.parametrize("text", ["[9, 5]", "9,5"])
def test_ids_are_whole_numbers(text: str) -> None:
    assert parse_sets([f"trainable_token_indices={text}"]) == {"trainable_token_indices": (9, 5)}
    if text[0] == "[":
        node = parse(f"trainable_token_indices: {text}", "file")
        assert settings_of(node, "file") == {"trainable_token_indices": (9, 5)}
    kept = Settings(trainable_token_indices=(9, 5)).to_dict()
    assert Settings.from_dict(json.loads(json.dumps(kept))).trainable_token_indices == (9, 5)


@pytest.mark.parametrize("text", ["[a]", "9,9", "-1", "2147483648", "[1.5]", "[true]", '["9"]'])
def test_other_ids_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_sets([f"trainable_token_indices={text}"])
    assert error.value.code in ("QC-CONFIG-002", "QC-CONFIG-005")

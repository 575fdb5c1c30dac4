"""Adapters of a model whose vocabulary was resized: merged with their tokenizer, as PEFT does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.change_kit import assert_merged, written
from support.e2e_kit import (
    LENGTHS,
    documents,
    our_logits,
    stock,
    stock_logits,
    tiny_folder,
    vocabulary,
    write_stock,
)
from support.fp8_kit import write_fp8
from support.model_kit import edit_json
from tokenizers import AddedToken, Tokenizer

from qcore.errors import QcoreError
from qcore.inference.generate import Generator
from qcore.io.artifact import verify
from qcore.merging.merge import MergeReport, merge
from qcore.plugins.resolve_model import identify

pytestmark = pytest.mark.usefixtures("one_thread")
Q = {"target_modules": ["q_proj"]}
EMBED, HEAD, ROWS = "embed_tokens", "lm_head", "trainable_token_indices"
V = vocabulary()
NEW = [V, V + 1]
RECIPES: dict[str, dict[str, Any]] = {
    "saved embedding and head": {**Q, "modules_to_save": [EMBED, HEAD]},
    "rows of both": {**Q, ROWS: {EMBED: [3, *NEW], HEAD: [*NEW, 7]}},
    "LoRA and saved embeddings": Q,
    "LoRA on embedding and head": {"target_modules": ["q_proj", EMBED, HEAD]},
    "rows": {**Q, ROWS: [3, *NEW]},
}
#: PEFT saves whole embeddings of a resized model beside these.
WITH_EMBEDDINGS = ("LoRA and saved embeddings", "LoRA on embedding and head", "rows")
#: Recipes that leave a tied base tied.
TIED = ("LoRA and saved embeddings", "rows")
FAST = (
    ("saved embedding and head", "vl", True), ("LoRA on embedding and head", "vl", False),
    ("rows of both", "vl", False), ("rows", "text", True),
)  # fmt: skip
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in ((name, kind, tied) for name in RECIPES for kind in ("vl", "text")
                 for tied in (False, True))
]  # fmt: skip
Bases = dict[tuple[str, bool], Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A bf16 base by class, and by whether its head is tied."""
    return {
        (kind, tied): write_stock(
            tmp_path_factory.mktemp("base"), kind, tied=tied, dtype=torch.bfloat16
        )
        for kind in ("vl", "text")
        for tied in (False, True)
    }


def with_tokens(folder: Path, count: int = V + 2) -> None:
    """Write a tokenizer of so many tokens, the last of them added."""
    tokenizer = Tokenizer.from_file(str(tiny_folder() / "tokenizer.json"))
    names = [f"<new_{number}>" for number in range(tokenizer.get_vocab_size(), count)]
    tokenizer.add_tokens([AddedToken(name, special=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))


def resized(base: Path, folder: Path, recipe: str, kind: str = "vl", rows: int = V + 2) -> Any:
    save = {"save_embedding_layers": recipe in WITH_EMBEDDINGS}
    peer = written(base, folder, RECIPES[recipe], kind=kind, save=save, rows=rows)
    with_tokens(folder, rows)
    return peer


def merged(base: Path, adapter: Path, out: Path, *, take: bool = True) -> MergeReport:
    return merge(str(base), adapter, out, trust_base=True, take_tokenizer=take)


@pytest.mark.parametrize(("recipe", "kind", "tied"), CASES)
def test_the_merge_has_the_larger_vocabulary(
    bases: Bases, tmp_path: Path, recipe: str, kind: str, tied: bool
) -> None:
    base = bases[kind, tied]
    peer = resized(base, tmp_path / "a", recipe, kind)
    report = merged(base, tmp_path / "a", tmp_path / "out")
    untied = tied and recipe not in TIED
    changed = assert_merged(peer, base, tmp_path / "out", kind=kind, untied=untied)
    assert len(changed) == report.changed
    assert report.proof is not None
    assert verify(tmp_path / "out").ok
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    section = config.get("text_config", config)
    assert section["vocab_size"] == V + 2
    assert section["tie_word_embeddings"] is (tied and not untied)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode(f"<new_{V + 1}>").ids == [V + 1]
    assert any(f"vocab_size is {V + 2}" in line for line in report.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_stock_loads_the_merge(tmp_path: Path, tied: bool) -> None:
    """A float32 base in several files, so that logits show no rounding."""
    base = write_stock(tmp_path / "base", tied=tied, shard="100KB")
    peer = resized(base, tmp_path / "a", "saved embedding and head")
    merged(base, tmp_path / "a", tmp_path / "out")
    docs = [torch.cat([doc, torch.tensor(NEW)]) for doc in documents(LENGTHS)]
    again = stock_logits(stock(tmp_path / "out", "vl").eval(), docs)
    assert again.shape[-1] == V + 2
    assert float((again - stock_logits(peer, docs)).abs().max()) <= 1e-5


def test_the_fingerprint_is_that_of_the_base(bases: Bases, tmp_path: Path) -> None:
    """An adapter of qcore would be bound to it: the added rows are not the base's."""
    from qcore.checkpoint.fingerprint import fingerprints
    from qcore.io.artifact import read_manifest
    from qcore.nn.load import read_ahead

    base = bases["vl", True]
    resized(base, tmp_path / "a", "rows", "vl")
    merged(base, tmp_path / "a", tmp_path / "out")
    found = identify(str(base))
    items = [item for item in found.layout.located.values() if item.tied is None]
    digests = {
        slab.item.tensor.name: slab.digest
        for slab in read_ahead(found.checkpoint, items)
        if slab.digest is not None
    }
    recorded = read_manifest(tmp_path / "out").meta["base_fingerprints"]
    assert recorded["text"] == fingerprints(found.layout, digests)["text"]


# -- what is refused


def refusal(base: Path, adapter: Path, out: Path, *, take: bool = True) -> QcoreError:
    with pytest.raises(QcoreError) as caught:
        merged(base, adapter, out, take=take)
    assert not out.exists()
    return caught.value


def test_without_the_option_the_way_is_named(bases: Bases, tmp_path: Path) -> None:
    resized(bases["vl", True], tmp_path / "a", "saved embedding and head")
    error = refusal(bases["vl", True], tmp_path / "a", tmp_path / "out", take=False)
    assert error.code == "QC-ADAPTER-005"
    assert "2 rows that" in error.message
    assert "--take-tokenizer" in str(error.fix)


def test_rows_without_the_option(bases: Bases, tmp_path: Path) -> None:
    resized(bases["vl", False], tmp_path / "a", "rows of both")
    error = refusal(bases["vl", False], tmp_path / "a", tmp_path / "out", take=False)
    assert error.code == "QC-ADAPTER-004"
    assert "--take-tokenizer" in str(error.fix)


@pytest.mark.parametrize(
    ("recipe", "weight"),
    [
        ({**Q, "modules_to_save": [EMBED]}, HEAD),
        ({"target_modules": ["q_proj", HEAD]}, EMBED),
        ({**Q, ROWS: [V + 1]}, EMBED),
    ],
)
def test_an_added_row_without_values(
    bases: Bases, tmp_path: Path, recipe: dict[str, Any], weight: str
) -> None:
    """PEFT would load it into a base that transformers resizes with other random rows."""
    written(bases["vl", False], tmp_path / "a", recipe, rows=V + 2)
    with_tokens(tmp_path / "a")
    error = refusal(bases["vl", False], tmp_path / "a", tmp_path / "out")
    assert error.code == "QC-ADAPTER-006"
    assert weight in str(error.field)
    assert f"token {V}" in error.message
    assert f"{weight} in modules_to_save" in str(error.fix)


@pytest.mark.parametrize("row", [10**12, 10**30])
def test_an_absurd_row_is_refused_at_once(bases: Bases, tmp_path: Path, row: int) -> None:
    """The number comes from the adapter's config: no work may depend on it."""
    written(bases["vl", False], tmp_path / "a", {**Q, ROWS: [3, V]}, rows=V + 1)
    with_tokens(tmp_path / "a")
    edit_json(tmp_path / "a" / "adapter_config.json", lambda c: c.update({ROWS: [3, row]}))
    error = refusal(bases["vl", False], tmp_path / "a", tmp_path / "out")
    assert error.code == "QC-ADAPTER-006"
    assert f"has no values for {row - V} of the {row + 1 - V} rows" in error.message
    assert f"token {V}" in error.message


def test_a_tokenizer_with_more_tokens_than_the_adapter_has_rows(
    bases: Bases, tmp_path: Path
) -> None:
    resized(bases["vl", True], tmp_path / "a", "saved embedding and head")
    with_tokens(tmp_path / "a", V + 5)
    error = refusal(bases["vl", True], tmp_path / "a", tmp_path / "out")
    assert error.code == "QC-PRE-002"
    assert "resized" in str(error.fix)


# -- fewer rows: resize_token_embeddings(len(tokenizer)) cuts the padding of the base


@pytest.mark.parametrize("tied", [False, True])
def test_fewer_rows_leave_the_last_ones_of_the_base(
    bases: Bases, tmp_path: Path, tied: bool
) -> None:
    base, rows = bases["vl", tied], V - 8
    resized(base, tmp_path / "a", "saved embedding and head", rows=rows)
    report = merged(base, tmp_path / "a", tmp_path / "out", take=False)
    assert any("the last rows of the base stay" in line for line in report.warnings)
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    out, before = (load_file(d / "model.safetensors") for d in (tmp_path / "out", base))
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        whole = out[name]
        assert torch.equal(whole[:rows], saved[f"base_model.model.{name}"].bfloat16())
        origin = name if name in before else "model.language_model.embed_tokens.weight"
        assert torch.equal(whole[rows:], before[origin][rows:])


# -- generate


@pytest.mark.parametrize("tied", [False, True])
def test_generate_computes_what_peft_computes(bases: Bases, tmp_path: Path, tied: bool) -> None:
    base = bases["vl", tied]
    peer = resized(base, tmp_path / "a", "saved embedding and head")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, tmp_path / "a" / name)
    generator = Generator(
        str(base), adapter=tmp_path / "a", trust_base=True, take_tokenizer=True, device="cpu",
        dtype="fp32",
    )  # fmt: skip
    docs = [torch.cat([doc, torch.tensor(NEW)]) for doc in documents(LENGTHS)]
    gap = (our_logits(generator.model, docs) - stock_logits(peer, docs)).abs().max()
    assert float(gap) <= 1e-4
    assert generator.tokenizer.encode(f"<new_{V}>").ids == [V]
    answer = generator.prompt(f"<new_{V}>", max_new_tokens=2)
    assert f"<new_{V}>" in answer.prompt


def test_generate_without_the_option(bases: Bases, tmp_path: Path) -> None:
    resized(bases["vl", True], tmp_path / "a", "saved embedding and head")
    with pytest.raises(QcoreError, match="2 rows that") as caught:
        Generator(str(bases["vl", True]), adapter=tmp_path / "a", trust_base=True, device="cpu")
    assert "--take-tokenizer" in str(caught.value.fix)


def test_a_quantized_embedding_gets_no_rows(bases: Bases, tmp_path: Path) -> None:
    """The way that the error names works: the same adapter and the 16-bit checkpoint."""
    plain = bases["vl", False]
    resized(plain, tmp_path / "a", "saved embedding and head")
    base = write_fp8(plain, tmp_path / "fp8", block=(16, 16), also=(EMBED,))
    error = refusal(base, tmp_path / "a", tmp_path / "out")
    assert error.code == "QC-KEY-009"
    assert str(error.field).endswith(f"{EMBED}.weight")
    assert "16 bits" in str(error.fix)

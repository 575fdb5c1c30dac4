"""The folder that training publishes, under stock PEFT: it applies, or it raises."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.e2e_kit import LENGTHS, documents, stock, stock_logits, write_stock

from qcore.adapter.model_card import Card, model_card
from qcore.checkpoint.hub import public_source
from qcore.config.settings import Settings
from qcore.io.artifact import read_manifest
from qcore.training.train import train

SETTINGS: dict[str, Any] = {
    "max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "r": 4,
    "lora_alpha": 12, "quantization": "none", "dtype": "fp32", "save_steps": 0,
    "gradient_checkpointing": False,
}  # fmt: skip
AUTO = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)


def made(base: Path, rows: Path, out: Path, **settings: Any) -> Path:
    """An adapter that one step trained, with an effect that no rounding hides."""
    train(str(base), rows, out, Settings(**(SETTINGS | settings)), device="cpu")
    tensors = load_file(out / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name, value in tensors.items():
        if "lora_B" in name:
            tensors[name] = 0.1 * torch.randn(value.shape, generator=generator)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


def loaders(base: Path, folder: Path) -> dict[str, Callable[[], Any]]:
    """The calls of people who get the folder."""

    def load(auto: Any, source: Path = folder) -> Any:
        return auto.from_pretrained(str(source), dtype=torch.float32)

    def on_base(auto: Any) -> Any:
        return peft.PeftModel.from_pretrained(load(auto, base), str(folder))

    return {
        "AutoPeftModelForCausalLM": lambda: load(peft.AutoPeftModelForCausalLM),
        "AutoPeftModel": lambda: load(peft.AutoPeftModel),
        **{f"{auto.__name__} + PeftModel": partial(on_base, auto) for auto in AUTO},
        **{f"{auto.__name__} of the adapter": partial(load, auto) for auto in AUTO},
    }


def outcome(load: Callable[[], Any], expected: torch.Tensor) -> str:
    """``applied`` where the logits are those of base + adapter, ``raised``, or what else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = load().eval()
        except ValueError as error:
            loud = re.search("Target modules|target_parameters", str(error))
            return "raised" if loud else str(error)
    gap = float((stock_logits(model, documents(LENGTHS)) - expected).abs().max())
    return "applied" if gap <= 1e-5 else f"differs by {gap:.1e}"


#: Outcome of each call by the class that the adapter is written for.
APPLIED = {
    "vl": {
        "AutoPeftModelForCausalLM": "applied",
        "AutoPeftModel": "applied",
        "AutoModelForImageTextToText + PeftModel": "applied",
        "AutoModelForCausalLM + PeftModel": "raised",
        "AutoModelForImageTextToText of the adapter": "applied",
        "AutoModelForCausalLM of the adapter": "raised",
    },
    "text": {
        "AutoPeftModelForCausalLM": "applied",
        "AutoPeftModel": "applied",
        "AutoModelForImageTextToText + PeftModel": "raised",
        "AutoModelForCausalLM + PeftModel": "applied",
        "AutoModelForImageTextToText of the adapter": "raised",
        "AutoModelForCausalLM of the adapter": "applied",
    },
}
CASES = [
    pytest.param("vl", False, (), id="vl"),
    pytest.param("text", False, (), id="text", marks=pytest.mark.slow),
    pytest.param("vl", False, ("attn",), id="vl-attention", marks=pytest.mark.slow),
    pytest.param("vl", True, (), id="vl-experts", marks=pytest.mark.slow),
    pytest.param("vl", True, ("experts",), id="vl-experts alone", marks=pytest.mark.slow),
    pytest.param("text", True, ("experts",), id="text-experts alone", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "moe", "groups"), CASES)
def test_it_applies_or_raises(
    tmp_path: Path, rows: Path, kind: str, moe: bool, groups: tuple[str, ...]
) -> None:
    base = write_stock(tmp_path / "base", "vl", moe=moe)
    folder = made(base, rows, tmp_path / "adapter", adapter_class=kind, target_groups=groups)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        right = peft.PeftModel.from_pretrained(stock(base, kind, moe=moe), str(folder)).eval()
    expected = stock_logits(right, documents(LENGTHS))
    plain = stock_logits(stock(base, kind, moe=moe), documents(LENGTHS))
    assert float((expected - plain).abs().max()) > 0.01
    table = {name: outcome(load, expected) for name, load in loaders(base, folder).items()}
    assert table == APPLIED[kind]


# -- what lies beside the two files


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> tuple[Path, Path]:
    """(base, adapter) of one step; the base is named by a relative path."""
    home = tmp_path_factory.mktemp("published")
    write_stock(home / "base", "vl")
    before = Path.cwd()
    os.chdir(home)
    try:
        train("base", rows, home / "adapter", Settings(**SETTINGS), device="cpu")
    finally:
        os.chdir(before)
    return home / "base", home / "adapter"


def test_the_base_is_named_by_an_absolute_path(published: tuple[Path, Path]) -> None:
    base, folder = published
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["revision"] is None


def test_the_tokenizer_and_the_template_lie_beside_it(published: tuple[Path, Path]) -> None:
    base, folder = published
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
        assert name in read_manifest(folder).files
    assert not (folder / "config.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    turn = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)
    assert ids == transformers.AutoTokenizer.from_pretrained(str(base)).apply_chat_template(
        turn, add_generation_prompt=True
    )


def blocks(card: str, language: str) -> list[str]:
    """The code blocks of a card."""
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def test_the_lines_of_the_card_load_it(published: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = published
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"`{base}`" in card
    assert "base_model:" not in card, "the hub refuses a card whose base is a path"
    python = blocks(card, "python")
    assert len(python) == 2
    docs = documents(LENGTHS)
    results = []
    for block in python:
        names: dict[str, Any] = {}
        exec(block.replace("FOLDER", str(folder)), names)
        results.append(stock_logits(names["model"].eval(), docs))
    assert torch.equal(*results)
    assert not torch.equal(results[0], stock_logits(stock(base, "vl"), docs))
    shell = "\n".join(blocks(card, "sh"))
    assert f"vllm serve {base} --enable-lora --max-lora-rank 8 " in shell
    assert f"qcore merge --model {base} --adapter FOLDER --output merged" in shell


CARD = Card(
    base="org/base", revision="abc", class_name="SomeForCausalLM", ranks=frozenset((4, 33)),
    groups={"attn": 2, "mlp": 3}, variables={"enable_thinking": False}, tokenizer=True,
)  # fmt: skip


def test_the_card_of_a_base_on_the_hub() -> None:
    card = model_card(CARD)
    assert card.startswith("---\nbase_model: org/base\nlibrary_name: peft\n")
    assert "5 pairs of ranks 4 to 33 (2 in `attn`, 3 in `mlp`)" in card
    assert '{"enable_thinking": false}' in card
    assert "vllm serve org/base --revision abc --enable-lora --max-lora-rank 64 " in card
    assert "qcore merge --model org/base@abc --adapter FOLDER" in card
    assert '"org/base", revision="abc", dtype="auto"' in card


def test_the_base_of_a_folder_in_the_hubs_cache_is_its_id(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--org--my--base" / "snapshots" / commit
    folder.mkdir(parents=True)
    assert public_source(str(folder), folder, None) == ("org/my--base", commit)
    assert public_source("org/base@v1", folder, commit) == ("org/base", commit)
    other = tmp_path / "data--org--my" / "snapshots" / commit
    assert public_source(str(other), other, None) == (str(other), None)


def test_the_names_of_the_class_decide_what_is_declared(published: tuple[Path, Path]) -> None:
    config = json.loads((published[1] / "adapter_config.json").read_text())
    modules = config["target_modules"]
    names = load_file(published[1] / "adapter_model.safetensors")
    stems = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}
    assert set(modules) == stems
    assert config["task_type"] is None
    assert config["auto_mapping"] == {
        "base_model_class": "Qwen3_5ForConditionalGeneration", "parent_library": "transformers",
    }  # fmt: skip


def test_a_copy_without_its_manifest_still_loads(
    published: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(published[1] / name, folder / name)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(folder))
    assert type(model.get_base_model()).__name__ == "Qwen3_5ForConditionalGeneration"

"""The base that adapter_config.json names: its generation, by record and by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcore.adapter.named_base import Base, base_name, check_consent, check_generation, generation_of
from qcore.errors import TrustError
from qcore.skus.registry import Skus, load_skus


@pytest.fixture(scope="module")
def skus() -> Skus:
    return load_skus()


NAMES: dict[str, str | None] = {
    "Qwen/Qwen3.5-35B-A3B": "3.5",
    "Qwen/Qwen3.6-27B": "3.6",
    "qwen3.6-27b": "3.6",
    "Qwen/Qwen3.5-35B-A3B@0123abcd": "3.5",
    # mirrors, quantized copies and fine-tunes, of which there are no records
    "unsloth/Qwen3.5-35B-A3B-bnb-4bit": "3.5",
    "Qwen/Qwen3.5-9B-Base": "3.5",
    "org/my-Qwen3.6-27B-sft": "3.6",
    "org/qwen3_5_27b": "3.5",
    "org/Qwen-3.6-27B": "3.6",
    # sizes and generations that no record has
    "Qwen/Qwen3.6-2B": "3.6",
    "Qwen/Qwen3-30B-A3B": "3",
    "Qwen/Qwen2.5-7B": "2.5",
    "Qwen/Qwen3.8-27B": "3.8",
    "org/qwen3.55-27b": "3.55",
    # paths
    "/data/models/Qwen3.5-27B": "3.5",
    "/data/models/Qwen3.5-27B/": "3.5",
    "C:\\models\\Qwen3.6-27B": "3.6",
    "/home/ann@lab/models/Qwen3.6-27B": "3.6",
    "/home/ann@lab/models/Qwen3.6-27B@main": "3.6",
    # without the dot, if a record's generation is spelled so
    "/models/qwen35-27b": "3.5",
    "qwen36_35b_a3b": "3.6",
    "~/.cache/huggingface/hub/models--Qwen--Qwen3.5-27B/snapshots/0a1b2c3d": "3.5",
    # names that say nothing
    "/data/qwen3.5/run-7/base": None,
    "./base": None,
    "org/assistant-v3.5": None,
    "org/qwen3.5-and-qwen3.6-merged": None,
    "org/qwen3.5b": None,
    "meta-llama/Llama-3.6-8B": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_generation_of_a_name(skus: Skus, name: str):
    assert generation_of(name, skus, "3.5") == NAMES[name]
    assert generation_of(name, skus, "3.6") == NAMES[name]


def test_a_version_says_nothing_of_a_generation_that_is_not_named_so(skus: Skus):
    assert generation_of("org/my-Qwen3.6-27B-sft", skus, "aurora") is None


@pytest.mark.parametrize("value", [None, "", "  ", "N/A", 7, ["Qwen/Qwen3.5-27B"]])
def test_no_name(value: Any):
    assert base_name({"base_model_name_or_path": value}) == ""
    assert check_generation(Path("adapter"), {"base_model_name_or_path": value}, BASE, False) == []


BASE = Base(generation="3.6", source="moe36")


def named(name: str) -> dict[str, Any]:
    return {"base_model_name_or_path": name}


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3.5-35B-A3B", "unsloth/Qwen3.5-35B-A3B", "/m/qwen3.5-35b", "Qwen/Qwen3-4B"]
)
def test_another_generation_needs_consent(name: str):
    with pytest.raises(TrustError) as caught:
        check_generation(Path("adapter"), named(name), BASE, False)
    error = caught.value
    assert (error.code, error.exit_code) == ("QC-ADAPTER-015", 77)
    assert name in error.message
    assert "3.6" in error.message
    assert "moe36" in error.message
    assert "--trust-generation" in str(error.fix)
    (line,) = check_generation(Path("adapter"), named(name), BASE, True)
    assert line.startswith("warning: ")
    assert name in line


def test_an_adapter_of_3_6_on_3_5():
    base = Base(generation="3.5", source="Qwen/Qwen3.5-27B")
    with pytest.raises(TrustError):
        check_generation(Path("adapter"), named("Qwen/Qwen3.6-27B"), base, False)


@pytest.mark.parametrize("name", ["Qwen/Qwen3.6-35B-A3B", "org/my-qwen3.6-sft", "./checkpoints"])
def test_the_same_generation_is_one_line(name: str):
    (line,) = check_generation(Path("adapter"), named(name), BASE, False)
    assert name in line
    assert not line.startswith("warning")


def test_another_model_of_the_same_generation_is_a_warning():
    base = Base(generation="3.5", source="Qwen/Qwen3.5-9B")
    (line,) = check_generation(Path("adapter"), named("Qwen/Qwen3.5-4B"), base, False)
    assert line.startswith("warning: ")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Qwen/Qwen3.6-35B-A3B", "base_model_name_or_path Qwen/Qwen3.6-35B-A3B"),
        ("Qwen/Qwen3.5-35B-A3B", "of generation 3.5; this base is of generation 3.6"),
        ("", "no base_model_name_or_path"),
    ],
)
def test_the_error_without_consent_names_the_base(name: str, says: str):
    check_consent(Path("adapter"), named(name), BASE, True)
    with pytest.raises(TrustError) as caught:
        check_consent(Path("adapter"), named(name), BASE, False)
    assert caught.value.code == "QC-ADAPTER-009"
    assert says in caught.value.message

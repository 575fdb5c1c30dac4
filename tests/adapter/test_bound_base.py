"""An adapter is bound to config.json of its base, as far as the computation reads it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.e2e_kit import tiny_folder
from support.run_kit import SHORT, start

from qcore.adapter.bound_base import refuse_other_config
from qcore.errors import InputError
from qcore.inference.generate import Generator
from qcore.io.artifact import read_manifest
from qcore.merging.merge import merge
from qcore.plugins.resolve_model import Identified, identify

Config = dict[str, Any]


@pytest.fixture(scope="module")
def base() -> Identified:
    return identify(str(tiny_folder()))


def recorded(config: Config | None) -> Any:
    return SimpleNamespace(base_config=config, parts=frozenset(("text",)))


def changed(base: Identified, edit: Callable[[Config], object]) -> Config:
    config = copy.deepcopy(dict(base.checkpoint.config))
    edit(config)
    return config


OTHER: dict[str, tuple[Callable[[Config], object], str]] = {
    "epsilon": (lambda c: c["text_config"].update(rms_norm_eps=1e-5), "text_config.rms_norm_eps"),
    "rotary base": (
        lambda c: c["text_config"]["rope_parameters"].update(rope_theta=5e5),
        "text_config.rope_parameters.rope_theta",
    ),
    "heads": (
        lambda c: c["text_config"].update(num_attention_heads=1),
        "text_config.num_attention_heads",
    ),
    "a layer less": (lambda c: c["text_config"].update(num_hidden_layers=2), ""),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_the_computation_reads_is_refused(base: Identified, name: str) -> None:
    edit, field = OTHER[name]
    with pytest.raises(InputError) as error:
        refuse_other_config(base, recorded(changed(base, edit)))
    assert error.value.code == "QC-ADAPTER-024"
    assert field in (error.value.field or "")


def move_factor(config: Config) -> None:
    text = config["text_config"]
    text["partial_rotary_factor"] = text["rope_parameters"].pop("partial_rotary_factor")


def text_alone(config: Config) -> None:
    text = config.pop("text_config")
    config.pop("vision_config", None)
    config.update(text)


ALIKE: dict[str, Callable[[Config], object]] = {
    "nothing": lambda c: None,
    "who saved it": lambda c: c.update(transformers_version="9", _name_or_path="x"),
    "dtype and cache": lambda c: c.update(dtype="float16", use_cache=False),
    "a default that is written out": lambda c: c["text_config"].update(attention_dropout=0.0),
    "a key that moved": move_factor,
    "the text class": text_alone,
    "a longer context": lambda c: c["text_config"].update(max_position_embeddings=1 << 20),
}


@pytest.mark.parametrize("name", ALIKE)
def test_another_spelling_is_accepted(base: Identified, name: str) -> None:
    refuse_other_config(base, recorded(changed(base, ALIKE[name])))


def test_a_config_that_transformers_saved_again_is_accepted(
    base: Identified, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.AutoConfig.from_pretrained(tiny_folder()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved != base.checkpoint.config
    refuse_other_config(base, recorded(saved))


def test_an_adapter_of_an_earlier_build_is_not_compared(base: Identified) -> None:
    refuse_other_config(base, recorded(None))


@pytest.fixture(scope="module")
def trained(rows: Path, once: Callable[..., Path]) -> Path:
    """An adapter of two steps."""
    options = SHORT | {"max_steps": 2, "learning_rate": 5e-3}
    return once("bound-base", lambda home: start(tiny_folder(), rows, home / "out", options))


@pytest.mark.parametrize("verb", ["merge", "generate", "train"])
def test_every_verb_refuses_another_config(
    rows: Path, trained: Path, tmp_path: Path, verb: str
) -> None:
    """The weights have the same bytes, so that no fingerprint shows it."""
    adapter, other = trained / "out", tmp_path / "base"
    assert read_manifest(adapter).meta["identity"]["config"]["text_config"]
    shutil.copytree(tiny_folder(), other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (other / "config.json").write_text(json.dumps(config))
    verbs: dict[str, Callable[[], object]] = {
        "merge": lambda: merge(str(other), adapter, tmp_path / "merged"),
        "generate": lambda: Generator(str(other), adapter=adapter, device="cpu"),
        "train": lambda: start(
            other, rows, tmp_path / "more", {"max_steps": 1}, init_adapter=adapter
        ),
    }
    with pytest.raises(InputError) as error:
        verbs[verb]()
    assert (error.value.code, error.value.field) == ("QC-ADAPTER-024", "text_config.rms_norm_eps")
    assert (error.value.found, error.value.expected) == ("1e-05", "1e-06")

"""The fields of an identity: every binding lists them, and a changed one is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.e2e_kit import tiny_folder

from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.identity import (
    ADAPTER,
    RUN,
    TOKENS,
    Identity,
    bind,
    code_of,
    config_of,
    flat,
    ordered,
    run_files,
    token_files,
    versions_of,
)


def test_an_identity_names_what_differs() -> None:
    one = Identity({"max_length": 5, "policies.turns": "all", "a": True})
    assert one.differing(one.values) == ()
    other = {"max_length": 6, "policies.turns": "all", "b": None}
    assert one.differing(other) == ("max_length", "a")
    # In a chat template True is not 1.
    assert one.differing({**one.values, "a": 1}) == ("a",)
    assert one.name != Identity({**one.values, "a": 1}).name


def test_causes_are_named_before_effects() -> None:
    before = bind(RUN, {"samples": "1", "settings": {"r": 4, "seed": 0}, "qcore": "0.1"})
    now = bind(RUN, {"samples": "2", "settings": {"r": 4, "seed": 1}, "qcore": "0.2"})
    assert now.differing(before.values) == ("qcore", "settings.seed", "samples")


@pytest.mark.parametrize("binding", [RUN, TOKENS, ADAPTER], ids=["run", "tokens", "adapter"])
def test_a_field_that_is_not_listed_is_an_error(binding: dict[str, str]) -> None:
    fields = dict.fromkeys(binding, 1)
    assert [*ordered(binding, dict(reversed(fields.items())))] == [*binding]
    with pytest.raises(ValueError, match="moods is not a field"):
        bind(binding, fields | {"moods": 1})


def test_values_are_those_of_json() -> None:
    tree = {"sizes": (1, 2), "sources": [{"path": "a"}, {"path": "b"}], "none": {}, "x": {"y": 1.5}}
    assert flat(tree) == {
        "sizes": [1, 2], "sources.1.path": "a", "sources.2.path": "b", "x.y": 1.5,
    }  # fmt: skip


def test_who_saved_the_config_is_not_bound() -> None:
    config = {"transformers_version": "5", "text_config": {"_name_or_path": "x", "eps": 1e-6}}
    assert config_of(config) == {"text_config": {"eps": 1e-6}}


def test_files_of_a_model_folder() -> None:
    checkpoint = Checkpoint.open(tiny_folder())
    names = {*run_files(checkpoint)}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    assert not names & {"config.json", "generation_config.json", "chat_template.jinja"}
    assert {*token_files(checkpoint)} >= names | {"config.json", "chat_template.jinja"}


def test_code_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_blocks").mkdir()
    (tmp_path / "some_blocks" / "__init__.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    digests = code_of(["some_blocks.plugin", "some_blocks:hook", "no_such_package"])
    assert [*digests] == ["no_such_package", "some_blocks"]
    assert digests["no_such_package"] is None
    assert len(digests["some_blocks"] or "") == 64
    assert versions_of(["no-such-distribution"]) == {"no-such-distribution": None}


@pytest.mark.parametrize("binding", [RUN, TOKENS, ADAPTER], ids=["run", "tokens", "adapter"])
def test_the_documentation_lists_every_field(binding: dict[str, str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    table = "".join(f"| `{field}` | {what} |\n" for field, what in binding.items())
    assert table in text

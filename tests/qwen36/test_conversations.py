"""Twelve conversations under 3.5 and 3.6: token for token as transformers, masks as written down.

The golden file beside this one was written by hand from the rules at its top. It is checked
twice: with our own templates and tokenizer, and with the published templates and the real
tokenizer where they are at hand; there the token ids are compared with those of transformers'
``apply_chat_template``, which shares no code with ours.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import own_tokenizer
from support.model_kit import key_list, small_config, small_shapes, write_json
from support.template_kit import OWN_35, OWN_35_NO_THINK, OWN_36
from support.tiers import fast
from support.twelve import ROWS, as_served
from tokenizers import Tokenizer

from qcore.checkpoint.tokenizer import load_tokenizer
from qcore.config.frozen_map import Entries
from qcore.data.dataset import dataset
from qcore.data.policies import Policies
from qcore.data.rendering.masking import IGNORED, Example
from qcore.plugins.resolve_model import Identified, identify
from qcore.testing import write_sparse_checkpoint
from qcore_qwen35.chat import CONTROL
from qcore_qwen35.tiny import MARKS

GOLDEN = Path(__file__).with_name("conversations.txt")
OPEN, CLOSE = "\u3014", "\u3015"  # the brackets of the golden file
PRESERVING = {"preserve_thinking": True}
TITLES = list(ROWS)
THINK, NO_THINK = "<think>\n", "<think>\n\n</think>\n\n"
#: Name of a base below -> section of the golden file without variables.
BASES = {"3.5 think": "3.5", "3.5 no-think": "3.5", "3.6": "3.6"}


def golden() -> dict[str, list[str]]:
    """Section name -> marked text of each conversation, in order."""
    sections: dict[str, list[str]] = {}
    parts = re.split(r"^=== (\d+) (.*)\n", GOLDEN.read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert parts[1::3] == TITLES
    assert parts[0::3] == [str(number + 1) for number in range(12)]
    for body in parts[2::3]:
        for names, text in re.findall(r"^--- (.*)\n((?:(?!---).*\n)+)", body.rstrip() + "\n", re.M):
            for name in names.split(", "):
                sections.setdefault(name, []).append(text.rstrip("\n"))
    assert {name: len(texts) for name, texts in sections.items()} == {
        "3.5": 12, "3.6": 12, "3.6 preserving": 12,
    }  # fmt: skip
    return sections


@dataclass(frozen=True)
class Base:
    """A model folder, identified, and the rows as a file."""

    found: Identified
    tokenizer: Tokenizer
    rows: Path
    made: dict[Entries, tuple[Example, ...]] = field(default_factory=dict)

    def encode(self, **variables: Any) -> tuple[Example, ...]:
        """All rows by core's own path."""
        given = Entries(variables)
        if given not in self.made:
            self.made[given] = dataset(
                self.rows, self.found.checkpoint, self.found.chat_format(), 4096,
                policies=Policies(history="as_rendered"),
                tokenizer=self.tokenizer, variables=given,
            ).train  # fmt: skip
        return self.made[given]

    def marked(self, example: Example) -> str:
        """The tokens as text, trained ones between brackets, the tools turn's own text cut."""
        text = ""
        for trained, run in groupby(zip(example.ids, example.labels), lambda t: t[1] != IGNORED):
            pairs = list(run)
            assert not trained or all(one == label for one, label in pairs)
            said = self.tokenizer.decode([one for one, _ in pairs], skip_special_tokens=False)
            text += f"{OPEN}{said}{CLOSE}" if trained else said
        return re.sub(r"# Tools\n.*</IMPORTANT>", "⟨tools⟩", text, flags=re.DOTALL).rstrip("\n")


def write_base(folder: Path, config: Any, shapes: Any, template: str, tokenizer: Tokenizer) -> Base:
    write_sparse_checkpoint(folder, config, shapes)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS.values()), encoding="utf-8")
    found = identify(str(folder))
    return Base(found, load_tokenizer(found.checkpoint), rows)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """Small checkpoints with our own templates and tokenizer."""
    tokenizer = own_tokenizer()
    tokenizer.add_special_tokens(list(CONTROL))
    tokenizer.add_tokens(list(MARKS))
    made = {}
    for name, template in zip(BASES, (OWN_35, OWN_35_NO_THINK, OWN_36)):
        config = small_config(vocab_size=512, **({"bos_token_id": 248044} if name == "3.6" else {}))
        shapes = small_shapes()
        shapes["model.language_model.embed_tokens.weight"] = (512, 24)
        folder = tmp_path_factory.mktemp("own") / name
        made[name] = write_base(folder, config, shapes, template.text, tokenizer)
    return made


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """Published configs, shapes, templates and the real tokenizer."""
    tokenizer = Tokenizer.from_file(str(shared / "skus/tokenizer/tokenizer.json"))
    made = {}
    for name, sku in zip(BASES, ("3.5/Qwen3.5-4B", "3.5/Qwen3.5-0.8B", "3.6/Qwen3.6-27B")):
        source = shared / f"skus/qwen{sku}"
        made[name] = write_base(
            tmp_path_factory.mktemp("real") / name,
            json.loads((source / "config.json").read_text()),
            key_list(source / "weight_keys.txt"),
            (source / "chat_template.jinja").read_text(encoding="utf-8"),
            tokenizer,
        )
    return made


@pytest.fixture(params=["own", "real"])
def bases(request: pytest.FixtureRequest) -> dict[str, Base]:
    made: dict[str, Base] = request.getfixturevalue(request.param)
    return made


def variants(name: str) -> Iterator[tuple[str, dict[str, bool]]]:
    """Section of the golden file and variables that lead to it."""
    for thinking in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        yield BASES[name], thinking
        if name == "3.6":
            yield "3.6 preserving", PRESERVING | thinking
            yield "3.6", {"preserve_thinking": False} | thinking


def test_each_is_taken_for_what_it_is(bases: dict[str, Base]) -> None:
    for name, base in bases.items():
        decision = base.found.decision
        assert (decision.generation.name, decision.forced) == (name.split()[0], False)
        assert decision.plugin.name == {"3.5": "qwen35", "3.6": "qwen36"}[name.split()[0]]


@pytest.mark.parametrize("name", fast(BASES, *[*BASES][-2:]))
def test_what_is_trained_is_what_is_written_down(bases: dict[str, Base], name: str) -> None:
    wanted = golden()
    for section, variables in variants(name):
        examples = bases[name].encode(**variables)
        for title, example, text in zip(TITLES, examples, wanted[section], strict=True):
            assert bases[name].marked(example) == text, (title, section, variables)


@pytest.mark.parametrize("name", BASES)
def test_the_last_turns_context_is_the_prompt_that_inference_gives(
    bases: dict[str, Base], name: str
) -> None:
    """What stands before the last trained text is the prompt, thinking on or off as it applies."""
    base = bases[name]
    template = base.found.checkpoint.template
    assert template is not None
    for _, variables in variants(name):
        for row, example in zip(ROWS.values(), base.encode(**variables), strict=True):
            served = as_served(row)
            text = template.render(served["messages"], served["tools"], **variables)
            trained = base.marked(example).rpartition(OPEN)[2].removesuffix(CLOSE)
            before = text.rstrip("\n").removesuffix(trained)
            thinks = before.endswith(THINK)
            assert thinks or before.endswith(NO_THINK)
            prompt = template.render(
                served["messages"][:-1], served["tools"], add_generation_prompt=True,
                **{**variables, "enable_thinking": thinks},
            )  # fmt: skip
            assert prompt == before


@pytest.mark.parametrize("name", fast(BASES, [*BASES][-1]))
def test_token_ids_are_those_of_transformers(real: dict[str, Base], name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    base = real[name]
    folder = base.found.checkpoint.path
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    ours = base.found.checkpoint.template
    assert ours is not None
    for _, variables in variants(name):
        for row, example in zip(ROWS.values(), base.encode(**variables), strict=True):
            served = as_served(row)
            options = {"chat_template": template, "tools": served["tools"], **variables}
            ids = reference.apply_chat_template(
                served["messages"], tokenize=True, return_dict=False, **options
            )
            assert list(example.ids) == ids
            prompt = reference.apply_chat_template(
                served["messages"][:-1], tokenize=True, return_dict=False,
                add_generation_prompt=True, **options,
            )  # fmt: skip
            text = ours.render(
                served["messages"][:-1], served["tools"], add_generation_prompt=True, **variables
            )
            assert base.tokenizer.encode(text, add_special_tokens=False).ids == prompt


def test_the_default_tails(bases: dict[str, Base]) -> None:
    asked = ROWS[TITLES[0]]["messages"][:1]
    for name, base in bases.items():
        template = base.found.checkpoint.template
        assert template is not None
        tails = [
            template.render(asked, add_generation_prompt=True, **given).rpartition("assistant\n")[2]
            for given in ({}, {"enable_thinking": True}, {"enable_thinking": False})
        ]
        assert tails == [NO_THINK if name == "3.5 no-think" else THINK, THINK, NO_THINK]


def test_the_golden_file_could_fail(own: dict[str, Base]) -> None:
    """A mask that is one token longer is seen, and so is a template of the other generation."""
    base = own["3.6"]
    example = copy.deepcopy(base.encode()[0])
    assert base.marked(example) == golden()["3.6"][0]
    before = example.labels.index(next(label for label in example.labels if label != IGNORED)) - 1
    example.labels[before] = example.ids[before]
    assert base.marked(example) != golden()["3.6"][0]
    assert golden()["3.5"] != golden()["3.6"] != golden()["3.6 preserving"]

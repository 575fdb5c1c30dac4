"""Foreign rows read as the tools that own their formats read them.

Their converters need neither a GPU nor a model, but their packages require a few hundred others. So
the wheel alone is downloaded, and the functions that convert are run without the rest of it.
"""

from __future__ import annotations

import ast
import copy
import enum
import json
import os
import random
import shutil
import subprocess
import zipfile
from abc import abstractmethod
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from support import foreign_rows as foreign

from qcore.data.formats import Formats

pytestmark = pytest.mark.slow

FORMATS = Formats(kinds=("image", "video"))
PINS = {"trl": "1.16.0", "ms-swift": "4.6.0", "llamafactory": "0.9.5", "axolotl": "0.19.0"}
ROUNDS = 50


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Get the source of a file in a peer's wheel."""
    folder = tmp_path_factory.mktemp("peers")

    def source(name: str, path: str) -> str:
        pip = shutil.which("pip") or "pip"
        if not list((folder / name).glob("*.whl")):
            done = subprocess.run(
                [pip, "download", "-q", "--no-deps", "--disable-pip-version-check",
                 "-d", str(folder / name), f"{name}=={PINS[name]}"],
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            if done.returncode:
                pytest.skip(f"{name} {PINS[name]} cannot be downloaded")
        (wheel,) = (folder / name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(path).decode("utf-8")

    return source


def run(text: str, names: set[str], **provided: Any) -> SimpleNamespace:
    """Execute some functions and classes of a module, without its imports."""
    tree = ast.parse(text)
    chosen = [
        node
        for node in tree.body
        if (isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names)
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names)
    ]
    assert len(chosen) == len(names), names
    space: dict[str, Any] = {"Any": Any, "json": json, "os": os, "chain": chain, **provided}
    # This module's own `annotations` future is inherited: their types need not be there.
    exec(compile(ast.Module(chosen, []), "peer", "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in names})


def flat(messages: list[foreign.Row], names: dict[str, str]) -> list[tuple[str, Any]]:
    """Canonical messages in a form where every call is a message; `names` are its roles."""
    said: list[tuple[str, Any]] = []
    for message in messages:
        if message["content"] or "tool_calls" not in message:
            said.append((names.get(message["role"], message["role"]), message["content"]))
        said += [(names["call"], call["function"]) for call in message.get("tool_calls", ())]
    return said


# LLaMA-Factory.


def factory(peer: Any, entry: foreign.Row) -> Any:
    roles = {"USER": "user", "ASSISTANT": "assistant", "SYSTEM": "system",
             "FUNCTION": "function", "OBSERVATION": "observation"}  # fmt: skip
    attributes = run(
        peer("llamafactory", "llamafactory/data/parser.py"), {"DatasetAttr"}, dataclass=dataclass
    )
    made = run(
        peer("llamafactory", "llamafactory/data/converter.py"),
        {"DatasetConverter", "AlpacaDatasetConverter", "SharegptDatasetConverter"},
        dataclass=dataclass, abstractmethod=abstractmethod, Role=enum.Enum("Role", roles),
        logger=SimpleNamespace(warning_rank0=pytest.fail),
    )  # fmt: skip
    attribute = attributes.DatasetAttr("file", dataset_name="rows.json")
    attribute.join(entry)
    kind = entry.get("formatting", "alpaca")
    converter = {"alpaca": made.AlpacaDatasetConverter, "sharegpt": made.SharegptDatasetConverter}
    return converter[kind](attribute, SimpleNamespace(media_dir=""))


@pytest.mark.parametrize(
    ("write", "entry", "features"),
    [
        (foreign.factory_alpaca, foreign.FACTORY_ALPACA, {}),
        (foreign.factory_sharegpt, foreign.FACTORY_SHAREGPT, {"calls": 1, "said": False}),
    ],
)
def test_llama_factory_reads_the_same_turns(
    peer: Any, write: Any, entry: foreign.Row, features: Any
) -> None:
    theirs = factory(peer, entry)
    rng = random.Random(1)
    columns = set(entry["columns"].values())
    for _ in range(ROUNDS):
        written = write(foreign.conversation(rng, **features), rng)
        read = theirs({**dict.fromkeys(columns, ""), **written})
        _, ours = FORMATS.convert(written, fields=entry)
        messages = list(ours["messages"])
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        names = {"call": "function", "tool": "observation"}
        found = [
            (m["role"], json.loads(m["content"]) if m["role"] == "function" else m["content"])
            for m in (*read["_prompt"], *read["_response"])
        ]
        assert found == flat(messages, names)
        assert (read["_system"] or "") == system
        functions = [one["function"] for one in ours.get("tools", ())]
        assert json.loads(read["_tools"] or "[]") == functions


# ms-swift.


def swift(peer: Any, kind: str) -> Any:
    """A preprocessor of ms-swift that takes rows as they are in the file."""
    history = run(
        peer("ms-swift", "swift/template/utils.py"), {"history_to_messages"},
    ).history_to_messages  # fmt: skip
    calls = run(
        peer("ms-swift", "swift/template/template_inputs.py"), {"normalize_openai_tool_calls"}
    ).normalize_openai_tool_calls
    made = run(
        peer("ms-swift", "swift/dataset/preprocessor/core.py"),
        {"RowPreprocessor", "ResponsePreprocessor", "AlpacaPreprocessor", "MessagesPreprocessor",
         "default_repair_messages", "_pair_keys"},
        history_to_messages=history, normalize_openai_tool_calls=calls, ast=ast,
        np=SimpleNamespace(random=SimpleNamespace(RandomState=random.Random)),
        contextmanager=lambda function: function,
    )  # fmt: skip
    reader = getattr(made, kind)()

    def read(row: foreign.Row) -> foreign.Row:
        # As `safe_rename_columns`: not where two columns would get one name.
        renamed = [reader.columns.get(key, key) for key in row]
        done: foreign.Row = reader.preprocess(
            {
                new if renamed.count(new) == 1 else key: copy.deepcopy(row[key])
                for key, new in zip(row, renamed)
            }
        )
        return done

    return read


def folded(turns: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Content of one text block as text: each side leaves it a block in other rows."""
    return [(role, said[0]["text"] if isinstance(said, list) else said) for role, said in turns]


def swift_turns(read: foreign.Row) -> list[tuple[str, Any]]:
    return [
        (
            "tool_response" if m["role"] == "tool" else m["role"],
            json.loads(m["content"])
            if m["role"] == "tool_call" and isinstance(m["content"], str)
            else m["content"],
        )
        for m in read["messages"]
    ]


@pytest.mark.parametrize(
    ("kind", "write", "features"),
    [
        ("AlpacaPreprocessor", foreign.alpaca, {}),
        ("ResponsePreprocessor", foreign.ms_swift_pair, {}),
        ("MessagesPreprocessor", foreign.ms_swift_messages, {"calls": 2}),
        ("MessagesPreprocessor", foreign.sharegpt, {"calls": 2}),
        ("MessagesPreprocessor", foreign.anthropic, {"calls": 2, "ids": True}),
    ],
)
def test_ms_swift_reads_the_same_turns(peer: Any, kind: str, write: Any, features: Any) -> None:
    theirs = swift(peer, kind)
    rng = random.Random(2)
    compared = 0
    for _ in range(3 * ROUNDS):
        row = foreign.conversation(rng, **features)
        written = write(row, rng)
        items = next((written[k] for k in ("conversations", "conversation") if k in written), [])
        # Roles that ms-swift does not know, and items that are lists of calls.
        known = {"human", "user", "gpt", "assistant", "system", "function_call", "observation",
                 "function_response", "tool_response", "tool"}  # fmt: skip
        if any(one["from"] not in known or one["value"].startswith("[{") for one in items):
            continue
        if written.get("system") in ([], {}, ""):
            written["system"] = None
        if isinstance(written.get("system"), list):  # it takes a string
            written["system"] = written["system"][0]["text"]
        compared += 1
        names = {"call": "tool_call", "tool": "tool_response"}
        ours = flat(FORMATS.convert(written)[1]["messages"], names)
        assert folded(swift_turns(theirs(written))) == folded(ours)
    assert compared >= 10


# Axolotl.


def test_axolotl_reads_the_same_turns(peer: Any) -> None:
    made = run(
        peer("axolotl", "axolotl/prompt_strategies/chat_template.py"), {"ChatTemplateStrategy"},
        PromptTokenizingStrategy=object, LOG=SimpleNamespace(debug=lambda *_: None),
    )  # fmt: skip
    entry = foreign.AXOLOTL
    theirs = made.ChatTemplateStrategy.__new__(made.ChatTemplateStrategy)
    theirs.split_thinking = False
    theirs.prompter = SimpleNamespace(
        message_property_mappings={
            **entry["message_property_mappings"], "reasoning_content": entry["field_thinking"],
        },
        roles={"doctor": "assistant", "nurse": "assistant", "patient": "user", "rules": "system"},
        field_messages=entry["field_messages"], field_system="system",
        field_tools=entry["field_tools"], template_thinking_key="reasoning_content",
        message_field_training=entry["message_field_training"], message_field_training_detail=None,
        chat_template_msg_variables={"tool_calls"}, drop_system_message=False,
    )  # fmt: skip
    rng = random.Random(4)
    for _ in range(ROUNDS):
        row = foreign.conversation(rng, calls=2, reasoning=True, train=True)
        written = foreign.axolotl(row, rng)
        _, ours = FORMATS.convert(written, fields=entry)
        turns = [{**m, **({"training": m["train"]} if "train" in m else {})}
                 for m in ours["messages"]]  # fmt: skip
        read = theirs.get_conversation_thread(copy.deepcopy(written))
        assert read == [{k: v for k, v in turn.items() if k != "train"} for turn in turns]
        assert theirs._get_tools(copy.deepcopy(written)) == ours.get("tools")


# TRL.


@pytest.mark.parametrize("marked", [False, True])
def test_trl_puts_images_in_the_same_place(peer: Any, marked: bool) -> None:
    theirs = run(peer("trl", "trl/data_utils.py"), {"prepare_multimodal_messages"})
    rng = random.Random(3)
    for _ in range(ROUNDS):
        messages = foreign.conversation(rng)["messages"]
        images = [f"{i}.png" for i in range(rng.randint(1, 3))]
        if marked:
            rest = len(images)
            for message in messages:
                message["content"] = [{"type": "text", "text": message["content"]}]
                while rest and message["role"] == "user" and rng.random() < 0.5:
                    message["content"].insert(0, {"type": "image"})
                    rest -= 1
            images = images[: len(images) - rest]
            if not images:
                continue
        row = {"messages": messages, "images": images}
        read = theirs.prepare_multimodal_messages(copy.deepcopy(messages), images=images)
        _, ours = FORMATS.convert(row)
        for one, other in zip(read, ours["messages"], strict=True):
            content = other["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            assert one["content"] == content

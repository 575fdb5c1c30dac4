"""Row formats: what is read, what is left out and reported, and what is refused by its meaning."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from qcore.api.media import RowError
from qcore.data.formats import Formats
from qcore.errors import UsageError

FORMATS = Formats(kinds=("image", "video"))
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 24).decode()
Row = dict[str, Any]


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def bot(content: Any, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


def result(content: Any, **more: Any) -> Row:
    return {"role": "tool", "content": content, **more}


def call(name: str, **arguments: Any) -> Row:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def text(said: str) -> Row:
    return {"type": "text", "text": said}


def image(where: str) -> Row:
    return {"type": "image", "image": where}


QA = [user("q"), bot("a")]
CALLED = [user("q"), bot("", tool_calls=[call("f", x=1)]), result("r"), bot("a")]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

#: row -> format, canonical row, keys that were left out
READ: list[tuple[Row, str, Row, set[str]]] = [
    # Alpaca
    ({"instruction": "q", "input": "", "output": "a"}, "alpaca", {"messages": QA}, set()),
    (
        {"instruction": "q", "input": "more", "output": "a", "system": "s", "text": "### q"},
        "alpaca", {"messages": [system("s"), user("q\nmore"), bot("a")]}, {"text"},
    ),
    (
        {"instruction": "q2", "output": "a2", "history": [["q", "a"]], "system": None},
        "alpaca", {"messages": [*QA, user("q2"), bot("a2")]}, set(),
    ),
    (
        {"instruction": "", "input": "q", "output": "a", "history": '[["q0", null]]'},
        "alpaca", {"messages": [user("q0"), *QA]}, set(),
    ),
    # Anthropic
    (
        {"system": [text("s"), text("t")], "messages": [
            user([text("q")]),
            bot([{"type": "thinking", "thinking": "hm", "signature": "x"}, text("I look."),
                 {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}]),
            user([{"type": "tool_result", "tool_use_id": "t1",
                   "content": [text("r")], "is_error": False}, text("and?")]),
            bot([text("a")]),
        ]},
        "anthropic",
        {"messages": [
            system("s\nt"), user("q"),
            bot("I look.", reasoning_content="hm", tool_calls=[{**call("f", x=1), "id": "t1"}]),
            result("r", tool_call_id="t1"), user("and?"), bot("a"),
        ]},
        {"messages[].is_error"},
    ),
    (
        {"messages": [
            user([{"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                               "data": PNG}}, text("q")]),
            bot([text("one"), text("two")]),
        ]},
        "anthropic",
        {"messages": [user([image(f"data:image/png;base64,{PNG}"), text("q")]),
                      bot([text("one"), text("two")])]},
        set(),
    ),
    (
        {"messages": [user("q"), bot([{"type": "tool_use", "id": "t", "name": "f", "input": {}}]),
                      user([{"type": "tool_result", "tool_use_id": "t"}]), bot("a")]},
        "anthropic",
        {"messages": [user("q"), bot("", tool_calls=[{**call("f"), "id": "t"}]),
                      result("", tool_call_id="t"), bot("a")]},
        set(),
    ),
    # cache_control and other keys that mean nothing
    (
        {"messages": [{**user([{**text("q"), "cache_control": {"type": "ephemeral"}}]),
                       "cache_control": {"type": "ephemeral"}}, bot("a")],
         "cache_control": {"type": "ephemeral"}},
        "openai", {"messages": [user([text("q")]), bot("a")]}, set(),
    ),
    (
        {"messages": [{**user("q"), "tool_calls": None, "name": "", "function_call": {}},
                      {**bot("a"), "refusal": None, "audio": None, "annotations": [],
                       "tool_calls": [], "reasoning_content": ""}],
         "tools": [], "parallel_tool_calls": False, "rejected": None, "images": [],
         "objects": {"ref": [], "bbox": []}},
        "openai", {"messages": QA}, set(),
    ),
    (
        {"messages": [user([{**text("q"), "image": None}]), {**bot("a"), "id": "m1"}]},
        "openai", {"messages": [user([text("q")]), bot("a")]}, {"messages[].id"},
    ),
    (
        {"messages": [user([{**text("q"), "emphasis": "strong"}]), bot("a")]},
        "openai", {"messages": [user([text("q")]), bot("a")]}, {"messages[].content[].emphasis"},
    ),
    # developer
    ({"messages": [{"role": "developer", "content": "s"}, *QA]}, "openai",
     {"messages": [system("s"), *QA]}, set()),
    ({"messages": [{"role": "developer", "content": [text("s")]}, *QA]}, "openai",
     {"messages": [{"role": "system", "content": [text("s")]}, *QA]}, set()),
    ({"messages": [{"role": "Developer", "content": "s", "name": "ops"}, *QA]}, "openai",
     {"messages": [{**system("s"), "name": "ops"}, *QA]}, set()),
    # columns that are not read
    (
        {"id": 7, "messages": QA, "prompt": "q", "prompt_id": "ab", "category": "Open QA",
         "conversation_id": "c", "tags": ["x", "node.js"], "score": 0.5, "redacted": False,
         "meta": {"a": 1}, "train": "train_sft", "text": "<|im_start|>"},
        "openai", {"messages": QA, "id": 7},
        {"prompt", "prompt_id", "category", "conversation_id", "tags", "score", "redacted", "meta",
         "train", "text"},
    ),
    (
        {"messages": [{**user("q"), "timestamp": 1, "header": {"accept": "x"}}, bot("a")],
         "instruction": "q", "response": "a", "openai_moderation": [{"flagged": False}]},
        "openai", {"messages": QA},
        {"messages[].timestamp", "messages[].header", "instruction", "response",
         "openai_moderation"},
    ),
    # JSON strings
    ({"messages": json.dumps(QA), "tools": json.dumps([TOOL])}, "openai",
     {"messages": QA, "tools": [TOOL]}, set()),
    ({"conversations": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]),
      "tools": ""}, "sharegpt", {"messages": QA}, set()),
    ({"messages": QA, "tools": [json.dumps(TOOL)], "chat_template_kwargs": '{"a": 1}'}, "openai",
     {"messages": QA, "tools": [TOOL], "chat_template_kwargs": {"a": 1}}, set()),
    ({"messages": QA, "tools": [{**TOOL, "function": {**TOOL["function"],
                                                      "parameters": '{"type": "object"}'}}]},
     "openai", {"messages": QA, "tools": [TOOL]}, set()),
    # ShareGPT
    (
        {"id": "x", "system": "s", "conversations": [
            {"from": "human", "value": "q"}, {"from": "gpt", "value": "I look."},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}]},
        "sharegpt",
        {"messages": [system("s"), user("q"), bot("I look.", tool_calls=[call("f", x=1)]),
                      result("r"), bot("a")], "id": "x"}, set(),
    ),
    ({"conversation": [{"human": "q", "assistant": "a"}, {"human": "q2", "assistant": "a2"}]},
     "sharegpt", {"messages": [*QA, user("q2"), bot("a2")]}, set()),
    ({"messages": [{"from": "user", "value": "q"}, {"from": "bing", "value": "a"}]}, "sharegpt",
     {"messages": QA}, set()),
    ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
     "sharegpt", {"messages": QA}, set()),
    (
        {"conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": "<think>\nhm\n</think>\n{\"name\": \"f\"}"},
            {"from": "tool", "value": {"ok": True}},
            {"from": "gpt", "value": "a", "weight": None}]},
        "sharegpt",
        {"messages": [user("q"), bot("<think>\nhm\n</think>", tool_calls=[call("f")]),
                      result('{"ok": true}'), bot("a")]}, set(),
    ),
    # results that are objects, calls in other forms
    ({"messages": [*CALLED[:2], result({"mm": 0, "where": "köln"}), bot("a")]}, "openai",
     {"messages": [*CALLED[:2], result('{"mm": 0, "where": "köln"}'), bot("a")]}, set()),
    ({"messages": [*CALLED[:2], result([1, {"a": None}]), bot("a")]}, "openai",
     {"messages": [*CALLED[:2], result('[1, {"a": null}]'), bot("a")]}, set()),
    ({"messages": [*CALLED[:2], result(False), bot("a")]}, "openai",
     {"messages": [*CALLED[:2], result("false"), bot("a")]}, set()),
    ({"messages": [*CALLED[:2], result([text("r")]), bot("a")]}, "openai",
     {"messages": [*CALLED[:2], result([text("r")]), bot("a")]}, set()),
    ({"messages": [user("q"), bot(None, function_call={"name": "f", "arguments": '{"x": 1}'}),
                   {"role": "function", "name": "f", "content": "r"}, bot("a")],
      "functions": [TOOL["function"]], "function_call": "auto"}, "openai",
     {"messages": [*CALLED[:2], result("r", name="f"), bot("a")], "tools": [TOOL]},
     {"function_call"}),
    ({"messages": [user("q"), bot("", tool_calls=[
        {**call("f", x=1), "status": "done", "output": None, "index": 0}])]}, "openai",
     {"messages": CALLED[:2]}, {"messages[].status"}),
    ({"messages": [user("q"), bot(None, refusal="I cannot.")]}, "openai",
     {"messages": [user("q"), bot("I cannot.")]}, set()),
    ({"messages": [user("q"), bot([{"type": "refusal", "refusal": "No."}])], "tools": "null"},
     "openai", {"messages": [user("q"), bot([text("No.")])]}, set()),
    ({"messages": [user("q"), bot("a", tool_calls="[]", thinking="hm")]}, "openai",
     {"messages": [user("q"), bot("a", reasoning_content="hm")]}, set()),
    ({"messages": QA, "tools": [{"name": "f", "parameters": {"type": "object"}}]}, "openai",
     {"messages": QA, "tools": [TOOL]}, set()),
    # TRL
    (
        {"prompt": [system("s"), user("q"), bot("a"), user("q2")], "completion": [bot("a2")]},
        "trl",
        {"messages": [system("s"), user("q"), bot("a", train=False), user("q2"), bot("a2")]}, set(),
    ),
    ({"prompt": "q", "completion": "a", "source": "x"}, "trl", {"messages": QA}, {"source"}),
    ({"prompt": [user("q")], "completion": "a", "chat_template_kwargs": {"enable_thinking": False,
                                                                         "other": None}}, "trl",
     {"messages": QA, "chat_template_kwargs": {"enable_thinking": False}}, set()),
    ({"prompt": [user("q"), bot("x", train=True), user("q")],
      "completion": [bot("", tool_calls=[call("f", x=1)]), result("r"), bot("a")]}, "trl",
     {"messages": [user("q"), bot("x", train=False), *CALLED]}, set()),
    ({"prompt": "q", "completion": "a", "reasoning": "hm"}, "trl",
     {"messages": [user("q"), bot("a", reasoning_content="hm")]}, set()),
    # ms-swift
    ({"prompt": "q", "response": "a"}, "ms-swift", {"messages": QA}, set()),
    ({"system_prompt": "s", "question": "q", "response": ["a"]}, "ms-swift",
     {"messages": [system("s"), *QA]}, set()),
    ({"query": "q2", "answer": "a2", "history": [user("q"), bot("a")], "channel": "chat"},
     "ms-swift", {"messages": [*QA, user("q2"), bot("a2")]}, {"channel"}),
    ({"instruction": "q", "input": "more", "response": "a"}, "ms-swift",
     {"messages": [user("q\nmore"), bot("a")]}, set()),
    ({"query": "q", "answers": '[{"name": "f", "arguments": {"x": 1}}]', "tools": [TOOL]},
     "ms-swift", {"messages": CALLED[:2], "tools": [TOOL]}, set()),
    ({"query": "q", "answer": '[{"name": "f", "arguments": {"x": 1}}]'}, "ms-swift",
     {"messages": [user("q"), bot('[{"name": "f", "arguments": {"x": 1}}]')]}, set()),
    ({"image": "a.png", "question": "q", "answer": "a"}, "ms-swift",
     {"messages": [user([image("a.png"), text("q")]), bot("a")]}, set()),
    ({"messages": [user("q"), bot("a", loss=False), user("q"), bot("a", loss_scale=1.0)]}, "openai",
     {"messages": [user("q"), bot("a", train=False), user("q"), bot("a", train=True)]}, set()),
    # media columns
    (
        {"messages": [user("<image>\nq <image>"), bot("a")], "images": ["a.png", "b.png"]},
        "openai",
        {"messages": [user([image("a.png"), text("\nq "), image("b.png")]), bot("a")]}, set(),
    ),
    (
        {"messages": [user([{"type": "image"}, text("q")]), bot([text("a")])],
         "images": [{"bytes": PNG, "path": None}]}, "openai",
        {"messages": [user([image(f"data:image/png;base64,{PNG}"), text("q")]), bot([text("a")])]},
        set(),
    ),
    (
        {"messages": [user("q"), bot("a"), user("q")],
         "images": [{"bytes": None, "path": "a.png"}]},
        "openai", {"messages": [user([image("a.png"), text("q")]), bot("a"), user("q")]}, set(),
    ),
    (
        {"conversations": [{"from": "human", "value": "<video><image>q"},
                           {"from": "gpt", "value": "a"}],
         "videos": [["f0.png", "f1.png"]], "image": "a.png"}, "sharegpt",
        {"messages": [user([{"type": "video", "video": ["f0.png", "f1.png"]}, image("a.png"),
                            text("q")]), bot("a")]}, set(),
    ),
    (
        {"prompt": [user([{"type": "image"}, text("q")])], "completion": [bot("a")],
         "images": [{"bytes": base64.b64decode(PNG), "path": "x.png"}]}, "trl",
        {"messages": [user([image(f"data:image/png;base64,{PNG}"), text("q")]), bot("a")]}, set(),
    ),
    (
        {"messages": [user([text("q"), {"type": "image_url",
                                        "image_url": {"url": "data:x", "detail": "low"}},
                            {"type": "input_image", "image_url": "data:y"},
                            {"type": "image", "path": "a.png", "url": None, "max_pixels": 9},
                            {"type": "image", "base64": PNG}, {"image": "b.png"}]), bot("a")]},
        "openai",
        {"messages": [user([text("q"), image("data:x"), image("data:y"),
                            {**image("a.png"), "max_pixels": 9},
                            image(f"data:image/png;base64,{PNG}"), image("b.png")]), bot("a")]},
        {"messages[].content[].detail"},
    ),
    ({"messages": [{**user("q"), "images": ["a.png"]}, bot("a")]}, "openai",
     {"messages": [user([image("a.png"), text("q")]), bot("a")]}, set()),
    # weights and other marks
    ({"messages": [user("q"), bot("a", loss_mask=0), user("q"), bot("a", trainable=True)]},
     "openai", {"messages": [user("q"), bot("a", train=False), user("q"), bot("a", train=True)]},
     set()),
    # keys whose text the messages repeat
    ({"messages": [user("Long text.\n\nq"), bot("The a.")], "context": ["Long  text."],
      "answer": "a", "instruction": "q"}, "openai",
     {"messages": [user("Long text.\n\nq"), bot("The a.")]},
     {"context", "answer", "instruction"}),
    ({"messages": [user("q"), bot("a", weight=0), user("q"), bot("a", weight=1.0)]}, "openai",
     {"messages": [user("q"), bot("a", train=False), user("q"), bot("a", train=True)]}, set()),
    ({"messages": [{**user("q"), "weight": 1, "train": False}, bot("a", weight=None)], "weight": 1},
     "openai", {"messages": QA}, set()),
    ({"messages": QA, "weight": 0}, "openai", {"messages": QA, "train": False}, set()),
    ({"messages": [user("q"), bot([{**text("a"), "train": False}, {**text("b"), "weight": 0}])]},
     "openai", {"messages": [user("q"), bot([text("a"), text("b")], train=False)]}, set()),
    ({"messages": [user("q"), bot("abc", train_detail=[
        {"begin_offset": 0, "end_offset": 1, "train": True},
        {"begin_offset": 2, "end_offset": 2, "train": True}])]},
     "openai", {"messages": [user("q"), bot("abc", train=True)]}, set()),
]  # fmt: skip

#: row -> code, place, something that message or fix says
REFUSED: list[tuple[Any, str, str, str]] = [
    ([], "QC-DATA-005", "", "a list"),
    ({}, "QC-DATA-023", "", "is empty"),
    ({"mesages": QA}, "QC-DATA-023", "", "{messages: mesages}"),
    ({"dialogue": QA}, "QC-DATA-023", "", "fields: {messages: dialogue}"),
    ({"question": "q"}, "QC-DATA-023", "", "question"),
    ({"messages": None, "tools": [TOOL]}, "QC-DATA-010", "messages", "empty"),
    ({"messages": 3}, "QC-DATA-005", "messages", "the number 3"),
    ({"messages": "[}"}, "QC-DATA-004", "messages", "not JSON"),
    ({"messages": ["q"]}, "QC-DATA-006", "messages[0]", "not a message"),
    ({"messages": [{"content": "q"}]}, "QC-DATA-006", "messages[0]", "has no role"),
    ({"messages": [{"role": "user", "text": "q"}]}, "QC-DATA-006", "messages[0]",
     "fields: {content: text}"),
    ({"messages": [user("q"), bot("a", thought="hm")]}, "QC-DATA-024", "messages[1].thought",
     "fields: {reasoning_content: thought}"),
    ({"conversations": [{"from": "gtp", "value": "x"}]}, "QC-DATA-006", "conversations[0].from",
     'write "assistant"'),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "QC-DATA-006", "messages[0].role",
     "fields: {roles: {assistant: narrator}}"),
    # preferences
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "QC-DATA-020", "rejected",
     "fields: {completion: chosen}, ignore_columns: [rejected]"),
    ({"chosen": QA, "rejected": QA}, "QC-DATA-020", "rejected", "fields: {messages: chosen}"),
    ({"messages": QA, "rejected_response": "b"}, "QC-DATA-020", "rejected_response",
     "ignore_columns: [rejected_response]"),
    ({"messages": QA, "rejected_messages": QA}, "QC-DATA-020", "rejected_messages", "preference"),
    ({"prompt": "q", "completion": "a", "label": True}, "QC-DATA-020", "label", "label is true"),
    ({"input": {"messages": [user("q")]}, "preferred_output": [bot("a")],
      "non_preferred_output": [bot("b")]}, "QC-DATA-020", "non_preferred_output",
     "of preferred_output as one list"),
    ({"messages": QA, "kto_tag": False}, "QC-DATA-020", "kto_tag", "KTO"),
    ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
      "rejected": {"from": "gpt", "value": "b"}}, "QC-DATA-020", "rejected", "DPO"),
    # text
    ({"text": "Once upon"}, "QC-DATA-021", "text", "prompt and completion"),
    ({"text": "x", "meta": {"a": 1}}, "QC-DATA-021", "text", "raw text"),
    ({"segments": [{"label": False, "text": "<s>q"}, {"label": True, "text": "a"}]}, "QC-DATA-021",
     "segments", '"train": false'),
    # marks
    ({"messages": [user("q"), bot("a", weight=0.5)]}, "QC-DATA-022", "messages[1].weight", "0.5"),
    ({"messages": [user("q"), bot("a", train="no")]}, "QC-DATA-022", "messages[1].train", "'no'"),
    ({"messages": [user("q"), bot("a", train=True, weight=0)]}, "QC-DATA-022", "messages[1]",
     "contradict"),
    ({"messages": [{**user("q"), "train": True}, bot("a")]}, "QC-DATA-022", "messages[0].train",
     "only assistant turns"),
    ({"messages": [user("q"), bot("abc", train_detail=[
        {"begin_offset": 0, "end_offset": 1, "train": True}])]}, "QC-DATA-022",
     "messages[1].train_detail", "a part of a turn"),
    ({"messages": [user("q"), bot([{**text("a"), "train": True}, {**text("b"), "train": False}])]},
     "QC-DATA-022", "messages[1].content", "a part of a turn"),
    ({"messages": [user("q"), bot([{**text("a"), "weight": 0}, text("b")])]},
     "QC-DATA-022", "messages[1].content", "a part of a turn"),
    ({"messages": QA, "weight": 0.25}, "QC-DATA-022", "weight", "0.25"),
    # keys that change the input
    ({"messages": QA, "conversations": QA}, "QC-DATA-024", "conversations",
     "ignore_columns: [conversations]"),
    ({"messages": QA, "old_messages": QA}, "QC-DATA-024", "old_messages", "holds messages"),
    ({"messages": QA, "toolz": [TOOL]}, "QC-DATA-024", "toolz", "tools"),
    ({"messages": QA, "api": [{"name": "f", "parameters": {}}]}, "QC-DATA-024", "api",
     "fields: {tools: api}"),
    ({"messages": [user("q")], "response": "a"}, "QC-DATA-024", "response",
     "fields: {prompt: messages, completion: response}"),
    ({"messages": QA, "prompt": [user("other")]}, "QC-DATA-024", "prompt", "beside messages"),
    ({"messages": [system("s"), *QA], "system": "t"}, "QC-DATA-024", "system", "differs"),
    *[({"messages": QA, key: value}, "QC-DATA-024", key, fix) for key, value, fix in (
        ("context", "c", "ignore_columns: [context]"),
        ("documents", [{"text": "d"}], "ignore_columns: [documents]"),
        ("instruction", "i", "fields: {system: instruction}"),
        ("instructions", "i", "fields: {system: instructions}"),
        ("system_message", "s", "fields: {system: system_message}"),
        ("persona", "p", "fields: {system: persona}"),
        ("prompt", "p", "ignore_columns: [prompt]"),
        ("answer", "other", "ignore_columns: [answer]"),
        ("output", "other", "ignore_columns: [output]"),
    )],
    ({"messages": [user("q"), bot("a", mask=1)]}, "QC-DATA-022", "messages[1].mask",
     "fields: {train: mask}"),
    ({"messages": [user("q"), bot("a", loss_mask=[0, 1])]}, "QC-DATA-022",
     "messages[1].loss_mask", "true, false, 1 or 0"),
    ({"conversation": QA, "context": "c"}, "QC-DATA-024", "context", "ignore_columns: [context]"),
    ({"instruction": "q", "context": "c", "response": "a"}, "QC-DATA-024", "context",
     "fields: {input: context}"),
    ({"question": "q", "rationale": "r", "answer": "a"}, "QC-DATA-024", "rationale",
     "fields: {reasoning_content: rationale}"),
    ({"problem": "q", "solution": "s", "answer": "a"}, "QC-DATA-024", "answer",
     "fields: {response: answer}, ignore_columns: [solution]"),
    ({"prompt": "q", "completion": "a", "response": "b"}, "QC-DATA-024", "response",
     "second answer"),
    ({"instruction": "q", "output": "a", "systm": "s"}, "QC-DATA-024", "systm",
     'did you mean "system"'),
    ({"messages": [user("q"), {**bot(""), "tool_cals": [call("f")]}]}, "QC-DATA-024",
     "messages[1].tool_cals", 'did you mean "tool_calls"'),
    ({"messages": [user("q"), {**bot("a"), "attachments": ["x"]}]}, "QC-DATA-024",
     "messages[1].attachments", "ignore_columns: [messages[].attachments]"),
    ({"messages": [user([{**text("q"), "spans": [1]}]), bot("a")]}, "QC-DATA-024",
     "messages[0].content[0].spans", "ignore_columns: [messages[].content[].spans]"),
    ({"messages": [user("q"), bot("", tool_calls=[{**call("f"), "parsed": {"x": 1}}])]},
     "QC-DATA-024", "messages[1].tool_calls[0].parsed", "ignore_columns: [messages[].parsed]"),
    ({"messages": [user("q"), bot("a", refusal="no")]}, "QC-DATA-024", "messages[1].refusal",
     "beside content"),
    ({"messages": QA, "parallel_tool_calls": False} | {"messages": [
        user("q"), bot("", tool_calls=[call("f"), call("g")])]}, "QC-DATA-024",
     "parallel_tool_calls", "2 calls"),
    ({"messages": QA, "tools": [TOOL], "functions": [{"name": "g"}]}, "QC-DATA-024", "functions",
     "differs from tools"),
    ({"messages": QA, "images": ["a.png"], "image": "a.png"}, "QC-DATA-024", "images", "second"),
    # media
    ({"messages": [user("<image><image>q"), bot("a")], "images": ["a.png"]}, "QC-DATA-025",
     "images", "1 media, 2 of <image>"),
    ({"messages": [user([{"type": "image"}, text("q")]), bot("a")], "images": ["a.png", "b.png"]},
     "QC-DATA-025", "images", "2 media, 1 of <image>"),
    ({"messages": [bot("a")], "images": ["a.png"]}, "QC-DATA-025", "images", "no user turn"),
    ({"messages": QA, "audios": ["a.wav"]}, "QC-DATA-009", "audios", "no installed plugin"),
    ({"messages": QA, "files": ["a.PNG"]}, "QC-DATA-009", "files", "fields: {image: files}"),
    ({"messages": QA, "jpg": b"\xff\xd8"}, "QC-DATA-009", "jpg", "fields: {image: jpg}"),
    ({"messages": QA, "objects": {"bbox": [[1, 2, 3, 4]]}}, "QC-DATA-009", "objects", "media"),
    # blocks without a counterpart
    ({"messages": [user("q"), bot([{"type": "redacted_thinking", "data": "x"}, text("a")])]},
     "QC-DATA-026", "messages[1].content[0]", "encrypted reasoning"),
    ({"messages": [user("q"), bot([text("a"), {"type": "thinking", "thinking": "hm"}])]},
     "QC-DATA-026", "messages[1].content[1]", "thinking block after text"),
    ({"messages": [user("q"), bot([{"type": "tool_use", "id": "t", "name": "f", "input": {}},
                                   text("a")])]},
     "QC-DATA-026", "messages[1].content[1]", "text block after tool_use"),
    ({"messages": QA, "tools": [{"type": "web_search_20250305", "name": "web_search"}]},
     "QC-DATA-026", "tools[0]", "web_search_20250305"),
    # calls
    ({"messages": [user("q"), bot("", function_call={"name": "f", "arguments": "{"})]},
     "QC-DATA-004", "messages[1].function_call[0].arguments", "not JSON"),
    ({"conversations": [{"from": "human", "value": "q"},
                        {"from": "function_call", "value": "f(1)"}]},
     "QC-DATA-004", "conversations[1].value", "not JSON"),
    ({"messages": [user("q"), bot("", function_call={"name": "f"}, tool_calls=[call("g")])]},
     "QC-DATA-007", "messages[1].function_call", "differs from tool_calls"),
    ({"question": "q", "answer": {"text": ["a"]}}, "QC-DATA-005", "answer", "an object"),
    ({"query": "q", "response": "a", "history": [["q"]]}, "QC-DATA-005", "history[0]", "a pair"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "expected", "left_out"), READ, ids=range(len(READ)))
def test_read(row: Row, name: str, expected: Row, left_out: set[str]) -> None:
    before = repr(row)
    read = FORMATS.read(row)
    assert (read.format, read.row) == (name, expected)
    assert set(read.ignored) == left_out
    assert repr(row) == before, "the reader mutates its input"


@pytest.mark.parametrize(("row", "code", "at", "says"), REFUSED, ids=range(len(REFUSED)))
def test_refused(row: Row, code: str, at: str, says: str) -> None:
    with pytest.raises(RowError) as caught:
        FORMATS.read(row)
    error = caught.value.error(None, 1)
    assert (error.code, caught.value.at) == (code, at)
    assert says in f"{error.message} {error.fix}"
    assert "leave it out" not in str(error.fix)


# Fixes work.


@pytest.mark.parametrize(
    ("row", "fields", "ignore", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"completion": "chosen"}, ["rejected"],
         QA),
        ({"chosen": QA, "rejected": QA}, {"messages": "chosen"}, ["rejected"], QA),
        ({"messages": QA, "rejected_response": "b"}, {}, ["rejected_response"], QA),
        ({"messages": QA, "kto_tag": True}, {}, ["kto_tag"], QA),
        ({"dialogue": QA}, {"messages": "dialogue"}, [], QA),
        ({"mesages": QA}, {"messages": "mesages"}, [], QA),
        ({"messages": [user("q")], "response": "a"},
         {"prompt": "messages", "completion": "response"}, [], QA),
        ({"messages": QA, "conversations": [user("x")]}, {}, ["conversations"], QA),
        ({"messages": QA, "prompt": [user("other")]}, {}, ["prompt"], QA),
        ({"instruction": "q", "context": "c", "response": "a"}, {"input": "context"}, [],
         [user("q\nc"), bot("a")]),
        ({"question": "q", "context": "c", "answer": "a"}, {"input": "context"}, [],
         [user("q\nc"), bot("a")]),
        ({"question": "q", "rationale": "r", "answer": "a"}, {"reasoning_content": "rationale"}, [],
         [user("q"), bot("a", reasoning_content="r")]),
        ({"problem": "q", "solution": "s", "answer": "a"}, {"response": "answer"}, ["solution"],
         QA),
        ({"problem": "q", "solution": "a", "answer": "4"}, {"response": "solution"}, [], QA),
        ({"messages": [{"role": "narrator", "content": "a"}]},
         {"roles": {"assistant": "narrator"}}, [], [bot("a")]),
        ({"messages": [user("q"), {**bot("a"), "attachments": ["x"]}]}, {},
         ["messages[].attachments"], QA),
        ({"messages": [user([{**text("q"), "spans": [1]}]), bot("a")]}, {},
         ["messages[].content[].spans"], [user([text("q")]), bot("a")]),
        ({"messages": [user([{**text("q"), "spans": [1]}]), bot("a")]}, {},
         ["messages[].spans"], [user([text("q")]), bot("a")]),
        ({"messages": QA, "tool": "hammer"}, {}, ["tool"], QA),
        ({"says": [{"who": "me", "what": "q"}, {"who": "you", "what": "a"}]},
         {"messages": "says", "role": "who", "content": "what",
          "roles": {"user": "me", "assistant": ["you", "it"]}}, [], QA),
        ({"conversations": [user("x")], "other": QA}, {"conversations": "other"}, [], QA),
        ({"messages": QA, "jpg": b"\xff\xd8\xff"}, {"image": "jpg"}, [],
         [user([image("data:image/jpeg;base64,/9j/"), text("q")]), bot("a")]),
        ({"messages": [{"role": "user", "text": "q"}, {"role": "bot", "text": "a"}]},
         {"content": "text"}, [], QA),
        ({"messages": [user("q"), bot("a", thought="hm")]}, {"reasoning_content": "thought"}, [],
         [user("q"), bot("a", reasoning_content="hm")]),
        ({"conversation": [{"input": "q", "output": "a"}]},
         {"roles": {"user": "input", "assistant": "output"}}, [], QA),
        ({"texts": [{"user": "q", "assistant": "a", "source": "x"}], "images": ["a.png"]},
         {"messages": "texts"}, [], [user([image("a.png"), text("q")]), bot("a")]),
        ({"photo": "a.png", "question": "q", "answer": "a"}, {"image": "photo"}, [],
         [user([image("a.png"), text("q")]), bot("a")]),
    ],
)  # fmt: skip
def test_a_mapping_reads_the_row(row: Row, fields: Row, ignore: list[str], expected: Any) -> None:
    assert FORMATS.convert(row, fields=fields, ignore=ignore)[1] == {"messages": expected}


def test_columns_are_counted_once_a_row() -> None:
    formats = Formats()
    for number in range(3):
        formats.convert({"messages": [{**user("q"), "id": "m"}, bot("a", id="n")], "n": number})
    assert formats.ignored == {"messages[].id": 3, "n": 3}
    assert formats.notes()[1] == ("n", "n is not read (3 rows)")


def test_media_without_a_plugin_are_refused() -> None:
    for row in (
        {"messages": [user("<image>q"), bot("a")], "images": ["a.png"]},
        {"messages": QA, "images": [{"bytes": PNG, "path": None}]},
    ):
        with pytest.raises(RowError) as caught:
            Formats().read(row)
        assert caught.value.code == "QC-DATA-009"


# Field mappings and forced formats.


def test_a_forced_format_that_does_not_fit_is_refused() -> None:
    for name in ("openai", "anthropic", "sharegpt", "trl", "alpaca", "ms-swift"):
        with pytest.raises(RowError) as caught:
            FORMATS.read({"nothing": 1}, forced=name)
        assert caught.value.code in ("QC-DATA-005", "QC-DATA-023")


@pytest.mark.parametrize(
    ("name", "fix"),
    [("share-gpt", "did you mean sharegpt?"), ("chatml", "did you mean openai?"),
     ("LlamaFactory", "with fields in a mix file"), ("x", "read by their keys")],
)  # fmt: skip
def test_an_unknown_format_is_a_usage_error(name: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        FORMATS.read({"messages": QA}, forced=name)
    assert caught.value.code == "QC-DATA-027"
    assert fix in str(caught.value.fix)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"message": "x"}, "fields.message"),
        ({"messages": 3}, "fields.messages"),
        ({"messages": ""}, "fields.messages"),
        ({"roles": {"bot": "gpt"}}, "fields.roles.bot"),
        ({"roles": ["gpt"]}, "fields.roles"),
        ({"roles_to_train": ["assistant"]}, "fields.roles_to_train"),
        ({"message_property_mappings": "role"}, "fields.message_property_mappings"),
        ({"formatting": "chatml"}, "fields.formatting"),
        ({"columns": {"promt": "q"}}, "fields.columns.promt"),
        ({"columns": {}, "tags": {"bot_tag": "gpt"}}, "fields.tags.bot_tag"),
        ({"columns": {}, "colums": {}}, "fields.colums"),
    ],
)
def test_an_invalid_mapping_is_a_usage_error(fields: Row, field: str) -> None:
    with pytest.raises(UsageError) as caught:
        FORMATS.check(fields=fields)
    assert (caught.value.code, caught.value.field) == ("QC-DATA-028", field)


def test_dataset_info_reads_only_what_it_names() -> None:
    entry = {"file_name": "x.json", "columns": {"prompt": "q", "response": "a"}}
    read = FORMATS.read({"q": "q", "a": "a", "input": "more", "system": "s"}, fields=entry)
    assert (read.format, read.row) == ("alpaca", {"messages": QA})
    assert set(read.ignored) == {"input", "system"}


def test_dataset_info_of_openai_messages_and_of_preferences() -> None:
    entry: Row = {
        "formatting": "openai", "columns": {"messages": "turns"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "U",
                 "assistant_tag": "A"},
    }  # fmt: skip
    turns = [{"role": "U", "content": "q"}, {"role": "A", "content": "a"}]
    assert FORMATS.convert({"turns": turns}, fields=entry) == ("openai", {"messages": QA})
    with pytest.raises(RowError) as caught:
        FORMATS.read({"turns": turns}, fields={**entry, "ranking": True})
    assert caught.value.code == "QC-DATA-020"


def test_dataset_info_defaults() -> None:
    row = {"instruction": "q", "input": "", "output": "a", "history": [["x", "y"]]}
    read = FORMATS.read(row, fields={"file_name": "x.json"})
    assert (read.row, read.ignored) == ({"messages": QA}, ("history",))
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    read = FORMATS.read(shared, fields={"file_name": "x.json", "formatting": "sharegpt"})
    assert (read.format, read.row) == ("sharegpt", {"messages": QA})

"""Repairs: what is rewritten, what is refused, and that nothing else changes."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.chat_rows import Writer
from support.template_kit import family_template

from qcore.api.media import RowError
from qcore.checkpoint.chat_template import Template
from qcore.data.repairs.repair import RepairContext, repair, repair_context
from qcore.data.repairs.template_probes import Abilities, probe_abilities
from qcore.data.rows import RowCheck
from qcore_qwen35.chat import QWEN35
from qcore_qwen36.chat import QWEN36

CONTEXT = RepairContext(
    marks=("<think>", "</think>"), call_tags=QWEN35.call_tags, result_tags=QWEN35.result_tags,
    parse=QWEN35.parse, kinds=("image", "video", "audio"),
)  # fmt: skip
REAL = {
    "qwen3.5/Qwen3.5-4B": QWEN35,
    "qwen3.5/Qwen3.5-0.8B": QWEN35,
    "qwen3.6/Qwen3.6-27B": QWEN36,
}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def bot(content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def result(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TEXT = {"type": "string"}


def fixed(
    *messages: dict[str, Any], tools: Any = None, context: RepairContext = CONTEXT, raw: Any = None
) -> tuple[list[dict[str, Any]], list[tuple[str, str, str]]]:
    """The repaired messages, and code, severity and field of each finding."""
    row: dict[str, Any] = {"messages": list(messages)}
    if tools is not None:
        row["tools"] = tools
    before = copy.deepcopy(row)
    made, found = repair(row, context, number=7, raw=raw)
    assert row == before, "a repair must not mutate the row"
    assert all(one.row == 7 and one.message for one in found)
    return made["messages"], [(one.code, one.severity, one.field) for one in found]


def refusal(*messages: dict[str, Any], **more: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        fixed(*messages, **more)
    return caught.value


# Rows that need no repair.


@pytest.mark.parametrize("seed", range(3))
def test_a_row_that_serving_can_produce_stays(seed: int) -> None:
    writer = Writer(seed)
    for _ in range(50):
        row = writer.row()
        if row["messages"][-1]["role"] == "assistant" and _ordinary(row["messages"]):
            made, found = repair(row, CONTEXT)
            assert made == row
            assert {one.severity for one in found} <= {"note"}, found


def _ordinary(messages: list[dict[str, Any]]) -> bool:
    roles = [message["role"] for message in messages]
    pairs = list(pairwise(roles))
    text = str(messages)
    return ("assistant", "assistant") not in pairs and "<tool_response>" not in text


@pytest.mark.parametrize("row", [{}, {"messages": 5}, {"messages": [5]}, {"messages": []},
                                 {"messages": [{"role": 5}]}, {"messages": [{}]},
                                 {"messages": [user("a"), bot(tool_calls=[5, {"function": 5}])]},
                                 {"messages": [user(5), bot(5)], "tools": 5}])  # fmt: skip
def test_malformed_rows_are_left_to_the_check(row: dict[str, Any]) -> None:
    made, _ = repair(row, CONTEXT)
    assert made == row


# Order.


@pytest.mark.parametrize(
    ("given", "wanted", "codes"),
    [
        ([user("a"), user("b"), bot("c")], [user("a\n\nb"), bot("c")], ["050"]),
        ([user("a"), user("b"), user("c"), bot("d")], [user("a\n\nb\n\nc"), bot("d")],
         ["050", "050"]),
        ([user("a"), user([{"type": "text", "text": "b"}]), bot("c")],
         [user([{"type": "text", "text": text} for text in ("a", "\n\n", "b")]), bot("c")],
         ["050"]),
        ([user("a", name="x"), user("b", name="x"), bot("c")],
         [user("a\n\nb", name="x"), bot("c")], ["050"]),
        ([user("a"), bot("b"), bot("c")], [user("a"), bot("b\n\nc")], ["050"]),
        ([user("a"), bot("b", reasoning_content="r"), bot("c")],
         [user("a"), bot("b\n\nc", reasoning_content="r")], ["050"]),
        ([user("a"), bot("", reasoning_content="r"), bot("c")],
         [user("a"), bot("c", reasoning_content="r")], ["050"]),
        ([user("a"), bot(""), bot("c", reasoning_content="r")],
         [user("a"), bot("c", reasoning_content="r")], ["050"]),
        ([user("a"), bot("b", train=False), bot("c", train=False)],
         [user("a"), bot("b\n\nc", train=False)], ["050"]),
        ([system("a"), system("b"), user("c"), bot("d")],
         [system("a\n\nb"), user("c"), bot("d")], ["050"]),
        ([bot("hello"), user("a"), bot("b")], [bot("hello", train=False), user("a"), bot("b")],
         ["052"]),
        ([system("s"), bot("hello"), user("a"), bot("b")],
         [system("s"), bot("hello", train=False), user("a"), bot("b")], ["052"]),
        ([user("a"), bot("b"), user("c")], [user("a"), bot("b")], ["052"]),
        ([user("a"), bot("b"), user("c"), user("d")], [user("a"), bot("b")], ["050", "052"]),
    ],
)  # fmt: skip
def test_order(given: Any, wanted: Any, codes: list[str]) -> None:
    made, found = fixed(*given)
    assert made == wanted
    assert [code.removeprefix("QC-DATA-") for code, _, _ in found] == codes


def test_calls_in_a_row_are_joined() -> None:
    tools = [tool("f"), tool("g")]
    made, found = fixed(
        user("a"), bot("Wait."), bot(tool_calls=[call("f")]), bot(tool_calls=[call("g")]),
        result("1"), result("2"), bot("b"), tools=tools,
    )  # fmt: skip
    assert made[1] == bot("Wait.", tool_calls=[call("f"), call("g")])
    assert [one[2] for one in found] == ["messages[2]", "messages[3]"]


def test_results_at_the_end_are_left_out() -> None:
    made, found = fixed(user("a"), bot(tool_calls=[call("f")]), result("1"), tools=[tool("f")])
    assert made == [user("a"), bot(tool_calls=[call("f")])]
    assert found == [("QC-DATA-052", "warning", "messages[2]")]


@pytest.mark.parametrize(
    ("given", "at", "what"),
    [
        ([user("a"), bot("b"), system("c"), user("d"), bot("e")], 2, "not the first"),
        ([user("a"), system("c"), bot("e")], 1, "not the first"),
        ([user("a"), bot("b"), bot("c", reasoning_content="r")], 2, "reasoning right after"),
        ([user("a"), bot("b", train=True), bot("c")], 2, "marked for training"),
        ([user("a"), bot(tool_calls=[call("f")]), bot("c")], 2, "have no result"),
        ([user("a"), result("x"), bot("c")], 1, "without a preceding"),
        ([result("x"), user("a"), bot("c")], 0, "without a preceding"),
        ([user("a"), bot("b"), result("x"), bot("c")], 2, "without a preceding"),
        ([user("a"), bot(tool_calls=[{**call("f"), "id": "1"}]), result("x", tool_call_id="2"),
          bot("c")], 2, "does not make"),
    ],
)  # fmt: skip
def test_turns_that_cannot_be_joined(given: Any, at: int, what: str) -> None:
    error = refusal(*given)
    assert (error.code, error.at) == ("QC-DATA-051", f"messages[{at}]")
    assert what in error.what
    assert error.fix


def test_system_turns_of_different_names_are_not_joined() -> None:
    error = refusal(system("a"), {**system("b"), "name": "rules"}, user("c"), bot("d"))
    assert (error.code, error.at) == ("QC-DATA-051", "messages[1].name")


def test_a_template_that_renders_late_system_turns_gets_them() -> None:
    able = replace(CONTEXT, abilities=Abilities(late_system=True, answers_first=True))
    rows = [system("a"), bot("x"), user("b"), system("c"), bot("d")]
    assert fixed(*rows, context=able) == (rows, [])


def test_a_greeting_is_context_and_the_answer_is_trained() -> None:
    with family_template() as template:
        context = repair_context(template, QWEN35)
    made, _ = fixed(system("s"), bot("hello"), user("a"), bot("b"), context=context)
    assert [turn.get("train") for turn in made] == [None, False, None, None]


# Null padding.

CITY, ROOM, LEVEL = {"city": TEXT}, {"room": TEXT}, {"level": {"type": ["integer", "null"]}}


def calling(*calls: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    turns = [user("a", **more)]
    for one in calls:
        turns += [bot(tool_calls=[one]), result("ok", **more), bot("done", **more)]
        turns.append(user("next"))
    return turns[:-1]


def arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        one["function"]["arguments"] for turn in messages for one in turn.get("tool_calls") or []
    ]


@pytest.mark.parametrize(
    ("tools", "given", "wanted"),
    [
        # The schema has no such property.
        ([tool("rain", **CITY)], {"city": "Lima", "room": None}, {"city": "Lima"}),
        # The function has the property, and nothing shows padding.
        ([tool("rain", **CITY, **ROOM)], {"city": "Lima", "room": None},
         {"city": "Lima", "room": None}),
        # The property itself is padding of the schema's column.
        ([tool("rain", **CITY, room=None)], {"city": "Lima", "room": None}, {"city": "Lima"}),
        # The property allows null.
        ([tool("rain", **CITY, **LEVEL)], {"city": "Lima", "level": None},
         {"city": "Lima", "level": None}),
        ([tool("rain", city={"nullable": True, **TEXT})], {"city": None}, {"city": None}),
        ([tool("rain", city={"anyOf": [TEXT, {"type": "null"}]})], {"city": None}, {"city": None}),
        ([tool("rain", city={"enum": ["Lima", None]})], {"city": None}, {"city": None}),
        ([tool("rain", city={})], {"city": None}, {"city": None}),
        # All of them.
        ([tool("rain")], {"city": None, "room": None}, {}),
    ],
)  # fmt: skip
def test_nulls_by_the_schema(tools: Any, given: Any, wanted: Any) -> None:
    made, found = fixed(*calling(call("rain", **given)), tools=tools)
    assert arguments(made) == [wanted]
    assert ("QC-DATA-053" in [code for code, _, _ in found]) == (wanted != given)


POINT = {"type": "object", "properties": {"lat": {"type": "number"}}}


@pytest.mark.parametrize(
    ("schema", "given", "wanted"),
    [
        (POINT, {"lat": 1.5, "city": None}, {"lat": 1.5}),
        (POINT, {"lat": None}, {"lat": None}),
        ({"type": "array", "items": POINT}, [{"lat": 1, "x": None}, {"lat": 2}],
         [{"lat": 1}, {"lat": 2}]),
        ({"type": "array"}, [None, 1], [None, 1]),
        ({"type": "object"}, {"any": None}, {"any": None}),
        ({**POINT, "additionalProperties": True}, {"any": None}, {"any": None}),
        ({}, {"any": None}, {"any": None}),
    ],
)  # fmt: skip
def test_nulls_inside_arguments(schema: Any, given: Any, wanted: Any) -> None:
    made, found = fixed(*calling(call("f", at=given)), tools=[tool("f", at=schema)])
    assert arguments(made) == [{"at": wanted}]
    assert ("QC-DATA-053" in [code for code, _, _ in found]) == (wanted != given)


def test_nulls_inside_arguments_of_a_padded_row() -> None:
    tools = [tool("f", at={"type": "object"}), tool("g", unit=None)]
    made, _ = fixed(*calling(call("f", at={"any": None, "x": 1})), tools=tools)
    assert arguments(made) == [{"at": {"x": 1}}]
    error = refusal(*calling(call("f", at=[{"any": None}])))
    assert error.at == "messages[1].tool_calls[0].at[0].any"


def test_nulls_by_the_row() -> None:
    """Rows of `datasets`, without tools: messages have nulls where others have a value."""
    given = calling(call("rain", city="Lima", room=None, level=None))
    raw = {"messages": [{"tool_calls": None, **turn} for turn in given]}
    made, found = fixed(*given, raw=raw)
    assert arguments(made) == [{"city": "Lima"}]
    assert [code for code, _, _ in found] == ["QC-DATA-053", "QC-DATA-057"]


def test_nulls_by_other_calls() -> None:
    made, _ = fixed(*calling(
        call("rain", city="Lima", room=None), call("lamp", city=None, room="hall")
    ))  # fmt: skip
    assert arguments(made) == [{"city": "Lima"}, {"room": "hall"}]


def test_nulls_of_known_properties_in_a_padded_row() -> None:
    tools = [tool("rain", ("level",), **CITY, **LEVEL)]
    given = calling(call("rain", city=None, level=None))
    raw = {"messages": [{"tool_calls": None, **turn} for turn in given]}
    made, _ = fixed(*given, raw=raw, tools=tools)
    assert arguments(made) == [{"level": None}]
    error = refusal(*given, raw=raw, tools=[tool("rain", ("city",), **CITY, **LEVEL)])
    assert (error.code, error.at) == ("QC-DATA-053", "messages[1].tool_calls[0].city")
    assert error.fix == "write the value that the call had"


def test_a_null_that_does_not_fit_is_kept_and_reported() -> None:
    made, found = fixed(*calling(call("rain", city=None)), tools=[tool("rain", **CITY)])
    assert arguments(made) == [{"city": None}]
    assert found == [("QC-DATA-058", "warning", "messages[1].tool_calls[0].city")]


def test_nulls_in_json_strings_are_values() -> None:
    given = calling(call("rain", city="Lima", room=None))
    raw = copy.deepcopy({"messages": [{"tool_calls": None, **turn} for turn in given]})
    raw["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Lima", "room": null}'
    made, found = fixed(*given, raw=raw)
    assert arguments(made) == [{"city": "Lima", "room": None}]
    assert [code for code, _, _ in found] == ["QC-DATA-057"]


@pytest.mark.parametrize("tools", [None, [tool("lamp", **ROOM)]])
def test_nulls_that_may_be_values(tools: Any) -> None:
    error = refusal(*calling(call("rain", city="Lima", room=None)), tools=tools)
    assert (error.code, error.at) == ("QC-DATA-053", "messages[1].tool_calls[0].room")
    assert error.fix


def test_flat_calls_lose_their_padding_too() -> None:
    flat = {"name": "rain", "arguments": {"city": "Lima", "room": None}}
    made, _ = fixed(user("a"), bot(tool_calls=[flat]), tools=[tool("rain", **CITY)])
    assert made[1]["tool_calls"] == [{"name": "rain", "arguments": {"city": "Lima"}}]


# Calls as text.

JSON_CALL = '<tool_call>\n{"name": "ls", "arguments": {"path": "shed"}}\n</tool_call>'
XML_CALL = (
    "<tool_call>\n<function=ls>\n<parameter=path>\nshed\n</parameter>\n</function>\n</tool_call>"
)
LS = [tool("ls", path=TEXT)]


@pytest.mark.parametrize(
    ("said", "content", "calls"),
    [
        (JSON_CALL, "", 1),
        (f"Let me look.\n{JSON_CALL}\n", "Let me look.", 1),
        (f"{JSON_CALL}\n{JSON_CALL}", "", 2),
        (JSON_CALL.replace("\n", ""), "", 1),
        (JSON_CALL.replace('{"path": "shed"}', '"{\\"path\\": \\"shed\\"}"'), "", 1),
        (f"<think>\nr\n</think>\n\n{JSON_CALL}", "<think>\nr\n</think>", 1),
        (XML_CALL, "", 1),
        (f"Let me look.\n\n{XML_CALL}\n{XML_CALL}", "Let me look.", 2),
    ],
)
def test_calls_as_text(said: str, content: str, calls: int) -> None:
    made, found = fixed(
        user("List the shed."), bot(said),
        *[user("<tool_response>\nrake\n</tool_response>")] * calls, bot("A rake."), tools=LS,
    )  # fmt: skip
    assert made == [
        user("List the shed."),
        bot(content, tool_calls=[call("ls", path="shed")] * calls),
        *[result("rake")] * calls,
        bot("A rake."),
    ]
    assert {code for code, _, _ in found} == {"QC-DATA-054"}


def test_ids_of_calls_as_text_pair_their_results() -> None:
    """A template renders no ids, so that results in another order would be those of other calls."""
    said = "\n".join(
        f'<tool_call>\n{{"id": "{n}", "name": "ls", "arguments": {{"path": "{at}"}}}}\n</tool_call>'
        for n, at in ((1, "shed"), (2, "barn"))
    )
    made, found = fixed(
        user("List both."), bot(said), result("cow", tool_call_id="2"),
        result("rake", tool_call_id="1"), bot("A rake and a cow."), tools=LS,
    )  # fmt: skip
    assert [one["id"] for one in made[1]["tool_calls"]] == ["1", "2"]
    assert [one["content"] for one in made[2:4]] == ["rake", "cow"]
    assert {code for code, _, _ in found} == {"QC-DATA-050", "QC-DATA-054"}


def test_several_results_in_one_turn() -> None:
    two = "<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response>"
    for role in ("user", "tool"):
        made, _ = fixed(
            user("q"), bot(f"{JSON_CALL}\n{JSON_CALL}"), {"role": role, "content": two}, bot("x"),
            tools=LS,
        )  # fmt: skip
        assert made[2:4] == [result("a"), result("b")]


@pytest.mark.parametrize(
    ("said", "tools", "what"),
    [
        (JSON_CALL, None, "of a function that tools does not declare"),
        (JSON_CALL, [tool("cat")], "of a function that tools does not declare"),
        (JSON_CALL + " Done.", LS, "text after a tool call"),
        (XML_CALL + " Done.", LS, "text after a tool call"),
        (JSON_CALL + " and " + JSON_CALL, LS, "text after a tool call"),
        ('<tool_call>\n{"name": "ls", "arguments": {', LS, "cannot be read"),
        (JSON_CALL.replace('"', "'"), LS, "cannot be read"),
        (JSON_CALL.replace("</tool_call>", ""), LS, "cannot be read"),
        (JSON_CALL.replace("name", "tool"), LS, "cannot be read"),
        (JSON_CALL.replace('{"path": "shed"}', "[1]"), LS, "cannot be read"),
        (JSON_CALL.replace('{"path": "shed"}', '{"a": 1, "a": 2}'), LS, "cannot be read"),
    ],
)
def test_calls_as_text_that_cannot_be_converted(said: str, tools: Any, what: str) -> None:
    error = refusal(user("q"), bot(said), tools=tools)
    assert (error.code, error.at) == ("QC-DATA-054", "messages[1].content")
    assert what in error.what
    assert error.fix


@pytest.mark.parametrize(
    "said", ["Qwen writes <tool_call> first.", "<tool_call>", "<tool_call>\n<function=ls>"]
)
def test_a_mention_is_left_alone(said: str) -> None:
    assert fixed(user("q"), bot(said))[0] == [user("q"), bot(said)]


def test_the_tags_are_those_of_the_chat_format() -> None:
    said = '[CALL]{"name": "ls", "arguments": {"path": "shed"}}[/CALL]'
    row = [user("q"), bot(said), user("[OUT]rake[/OUT]"), bot("A rake.")]
    other = replace(CONTEXT, call_tags=("[CALL]", "[/CALL]"), result_tags=("[OUT]", "[/OUT]"))
    made, _ = fixed(*row, tools=LS, context=other)
    assert made[1:3] == [bot("", tool_calls=[call("ls", path="shed")]), result("rake")]
    assert fixed(*row, tools=LS)[0] == row
    plain = replace(CONTEXT, call_tags=None, result_tags=None)
    row = [user("q"), bot(JSON_CALL), user("<tool_response>a</tool_response>"), bot("x")]
    assert fixed(*row, tools=LS, context=plain)[0] == row


def test_a_template_that_writes_json_gets_text_as_it_is() -> None:
    able = replace(CONTEXT, abilities=Abilities(calls="json"))
    assert fixed(user("q"), bot(JSON_CALL), context=able) == ([user("q"), bot(JSON_CALL)], [])


def test_what_is_converted_renders_as_a_call() -> None:
    with family_template() as template:
        context = repair_context(template, QWEN35)
        made, _ = fixed(user("q"), bot(JSON_CALL), tools=LS, context=context)
        assert XML_CALL in template.render(made, LS)


# Think blocks.


def test_think_blocks_where_the_template_does_not_split_them() -> None:
    able = replace(CONTEXT, abilities=Abilities(splits_content=False))
    block = "<think>\nr\n</think>\n\nx"
    made, found = fixed(user("q"), bot(block), context=able)
    assert made == [user("q"), bot("x", reasoning_content="r")]
    assert found == [("QC-DATA-050", "note", "messages[1].content")]
    for other in (
        CONTEXT,
        replace(CONTEXT, abilities=Abilities(splits_content=False, reads_reasoning=False)),
    ):
        assert fixed(user("q"), bot(block), context=other) == ([user("q"), bot(block)], [])
    for said in ("x <think>r</think>", "<think>r", "<think>a</think><think>b</think>", "</think>x"):
        made, _ = fixed(user("q"), bot(said), context=able)
        wanted = bot("x", reasoning_content="") if said == "</think>x" else bot(said)
        assert made == [user("q"), wanted]


# Marks, empty turns, functions.


def test_a_mark_beside_a_word_in_backticks() -> None:
    assert refusal(user("`<image>` and <image>"), bot("Red.")).code == "QC-DATA-055"


@pytest.mark.parametrize("mark", ["image", "video", "audio"])
def test_marks_without_media(mark: str) -> None:
    error = refusal(user(f"<{mark}>\nWhich colour?"), bot("Red."))
    assert (error.code, error.at) == ("QC-DATA-055", "messages[0].content")
    assert error.fix is not None
    assert "beside messages" in error.fix
    part = {"type": mark, mark: "a.bin"}
    text = {"type": "text", "text": f"<{mark}>Which colour?"}
    error = refusal(user([part, text]), bot("Red."))
    assert error.fix is not None
    assert "take the mark out" in error.fix


@pytest.mark.parametrize(
    "said",
    ["The `<image>` tag?", "`a <image> b`", "<image><url>x</url></image>", "<images>", "image"],
)
def test_words_that_are_no_marks(said: str) -> None:
    assert fixed(user(said), bot("Yes.")) == ([user(said), bot("Yes.")], [])


def test_marks_of_unknown_kinds_are_text() -> None:
    context = replace(CONTEXT, kinds=())
    assert fixed(user("<table>"), bot("Red."), context=context)[1] == []


def test_marks_in_answers_are_text() -> None:
    assert fixed(user("q"), bot("Write <image>."))[1] == []


@pytest.mark.parametrize("content", ["", " \n", [], [{"type": "text", "text": ""}]])
def test_empty_user_turns_are_counted(content: Any) -> None:
    made, found = fixed(user(content), bot("Hello."))
    assert made == [user(content), bot("Hello.")]
    assert found == [("QC-DATA-056", "warning", "messages[0].content")]
    assert refusal(
        user(content), bot("x"), context=replace(CONTEXT, refused={"QC-DATA-056"})
    ).code == "QC-DATA-056"  # fmt: skip


def test_a_turn_with_a_picture_is_not_empty() -> None:
    assert fixed(user([{"type": "image", "image": "a.png"}]), bot("x"))[1] == []


@pytest.mark.parametrize(
    ("tools", "severity", "what"),
    [
        (None, "warning", "the row has no tools"),
        ([tool("ls")], "warning", "calls 'rain', which tools does not declare"),
        ([tool("rain"), tool("ls")], "note", "declared and not called: ls"),
    ],
)
def test_functions(tools: Any, severity: str, what: str) -> None:
    row = {"messages": calling(call("rain"), call("rain"))}
    if tools:
        row["tools"] = tools
    _, found = repair(row, CONTEXT)
    assert (found[0].code, found[0].severity) == ("QC-DATA-057", severity)
    assert what in found[0].message
    undeclared = [one for one in found if one.severity == "warning"]
    assert len(undeclared) == (severity == "warning")


def test_tools_that_no_turn_calls() -> None:
    assert fixed(user("a"), bot("b"), tools=LS)[1] == [("QC-DATA-057", "note", "tools")]


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, [1], ["1", True, 1.5, 2.0**60]),
        ({"type": "number"}, [1, 2.5], ["1", True]),
        ({"type": "string"}, ["1"], [1, True, {}, []]),
        ({"type": "boolean"}, [True], ["true", 1]),
        ({"type": ["object", "array"]}, [{}, []], ["{}"]),
        ({"type": "string", "nullable": True}, [None, ""], [5]),
        ({"type": "float"}, ["1", 1], []),
        ({}, ["1", 1], []),
    ],
)
def test_types_of_arguments(schema: Any, good: list[Any], bad: list[Any]) -> None:
    wanted = [("QC-DATA-058", "warning", "messages[1].tool_calls[0].x")]
    for values, findings in ((good, []), (bad, wanted)):
        for value in values:
            _, found = fixed(*calling(call("f", x=value)), tools=[tool("f", x=schema)])
            assert found == findings, value


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({}, True),
        ({"additionalProperties": False}, True),
        ({"additionalProperties": True}, False),
        ({"additionalProperties": {"type": "integer"}}, False),
        ({"properties": {}}, False),
    ],
)
def test_an_argument_that_the_schema_does_not_list(more: Any, warned: bool) -> None:
    """Servers type arguments by the schema; the values of others stay strings."""
    declared = tool("f", x={"type": "integer"})
    declared["function"]["parameters"] |= more
    _, found = fixed(*calling(call("f", y=1)), tools=[declared])
    assert found == [("QC-DATA-058", "warning", "messages[1].tool_calls[0].y")] * warned


@pytest.mark.parametrize(
    ("schema", "value", "made"),
    [
        ({"type": "integer"}, 3.0, 3),
        ({"type": ["integer", "null"]}, -2.0, -2),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 3.0, 3),
        ({"type": "array", "items": {"type": "integer"}}, [1.0, 2.0], [1, 2]),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": 0.0, "b": 1.0},
         {"a": 0, "b": 1.0}),
        ({"type": "number"}, 3.0, 3.0),
        ({"type": ["integer", "number"]}, 3.0, 3.0),
        ({}, 3.0, 3.0),
    ],
)  # fmt: skip
def test_doubles_of_column_formats_become_integers(schema: Any, value: Any, made: Any) -> None:
    messages, found = fixed(*calling(call("f", x=value)), tools=[tool("f", x=schema)])
    argument = messages[1]["tool_calls"][0]["function"]["arguments"]["x"]
    assert json.dumps(argument) == json.dumps(made)
    wanted = [("QC-DATA-058", "note", "messages[1].tool_calls")]
    assert found == ([] if json.dumps(value) == json.dumps(made) else wanted)


@pytest.mark.parametrize(
    ("messages", "more"),
    [
        ([user("<image>What color?"), bot("Red.")], {}),
        ([user("Hear this: <audio>"), bot("Red.")], {}),
        ([user("In <image> it is?"), bot("Red.")], {"image": "red.png"}),
        ([user("q"), bot("See <image>.")], {"picture": "red.png"}),
        ([system("Look at <video>."), user("q"), bot("a")], {"videos": ["a.mp4"]}),
    ],
)
def test_marks_without_a_reader_are_refused(messages: Any, more: Any) -> None:
    with pytest.raises(RowError) as caught:
        repair({"messages": messages, **more}, replace(CONTEXT, kinds=()), raw={**more})
    assert caught.value.code == "QC-DATA-055"
    assert "install a plugin" in str(caught.value.fix)


def test_markup_without_media_passes() -> None:
    for messages in ([user("What is <audio> for?"), bot("<audio> plays.")],):
        _, found = repair({"messages": messages}, replace(CONTEXT, kinds=()))
        assert found == ()


# Probes.


@pytest.mark.parametrize("sku", REAL)
def test_probes_of_real_templates(shared: Path, sku: str) -> None:
    path = shared / "skus" / sku / "chat_template.jinja"
    with Template(path.read_text(encoding="utf-8"), sku) as template:
        for variables in ({}, {"enable_thinking": False}):
            assert probe_abilities(template, REAL[sku], variables) == Abilities(
                splits_content=True, reads_reasoning=True, calls="other", wraps_results=True,
                late_system=False, answers_first=False,
            )  # fmt: skip


PLAIN = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.reasoning_content and loop.last -%}
{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content -}}
{%- for c in m.tool_calls or [] -%}
{{- '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' -}}
{{- c.function.arguments | tojson + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def test_probes_of_another_template() -> None:
    with Template(PLAIN, "plain") as template:
        assert probe_abilities(template, QWEN35) == Abilities(
            splits_content=False, reads_reasoning=True, calls="json", wraps_results=False,
            late_system=True, answers_first=True,
        )  # fmt: skip
        given = replace(QWEN35, splits_content=True)
        assert probe_abilities(template, given).splits_content
    with Template("{{ messages[0].content }}", "bare") as template:
        assert probe_abilities(template, QWEN35) == Abilities(
            splits_content=True, reads_reasoning=False, calls="", wraps_results=False,
            answers_first=True,
        )  # fmt: skip


def test_a_repaired_row_passes_the_check_and_renders(shared: Path) -> None:
    path = shared / "skus" / "qwen3.5/Qwen3.5-4B" / "chat_template.jinja"
    rows: list[list[dict[str, Any]]] = [
        [user("a"), user("b"), bot("c"), bot("d"), user("e")],
        [system("a"), system("b"), user("c"), bot("d")],
        [bot("hello"), user("a"), bot("b")],
        [user("q"), bot(JSON_CALL), user("<tool_response>\nx\n</tool_response>"), bot("y")],
    ]
    with Template(path.read_text(encoding="utf-8"), "t") as template:
        context = repair_context(template, QWEN35)
        for messages in rows:
            made, _ = repair({"messages": messages, "tools": LS}, context)
            for turn in made["messages"]:
                turn.pop("train", None)  # a key that the check of rows learns elsewhere
            row = RowCheck(QWEN35)(1, made)
            assert template.render(row.messages, row.tools)


@pytest.mark.parametrize("seed", range(2))
def test_no_row_raises_anything_else(seed: int) -> None:
    rng = random.Random(seed)
    keys = (
        "role", "content", "tool_calls", "function", "name", "arguments", "type", "text", "id",
        "tool_call_id", "reasoning_content", "train", "parameters", "properties", "required",
        "enum", "anyOf", "nullable", "f", "x",
    )  # fmt: skip
    texts = (
        "user", "assistant", "tool", "system", "f", "x", "", "text", "image", "object", "null",
        JSON_CALL, XML_CALL, "<tool_call>", "<tool_response>a</tool_response>", "<image>",
        "<think>a</think>b",
    )  # fmt: skip

    def value(depth: int) -> Any:
        kind = rng.randrange(8 if depth else 4)
        if kind < 4:
            return rng.choice((None, True, 1, 2.5, *texts))
        if kind < 6:
            return [value(depth - 1) for _ in range(rng.randrange(3))]
        return {rng.choice(keys): value(depth - 1) for _ in range(rng.randrange(4))}

    refused: list[RowError] = []
    for _ in range(4000):
        messages = []
        for _ in range(rng.randrange(5)):
            message = {rng.choice(keys): value(4) for _ in range(3)}
            message["role"] = rng.choice(("user", "assistant", "tool", "system", value(1)))
            if rng.random() < 0.5:
                message["tool_calls"] = [call("f", x=value(2))]
            messages.append(message)
        tools = [tool("f", x=value(3))] if rng.random() < 0.5 else value(3)
        try:
            repair({"messages": messages, "tools": tools}, CONTEXT, raw=value(4))
        except RowError as bad:
            refused.append(bad)
    assert len(refused) > 100
    assert all(bad.code.startswith("QC-DATA-05") and bad.at for bad in refused)

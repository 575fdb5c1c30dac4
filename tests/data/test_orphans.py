"""Calls and results that do not belong together, calls written twice, turns of two speakers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qcore.api.media import RowError
from qcore.data.findings import DataFinding
from qcore.data.repairs.repair import RepairContext, repair
from qcore.data.repairs.template_probes import Abilities
from qcore_qwen35.chat import QWEN35

CONTEXT = RepairContext(
    marks=("<think>", "</think>"), call_tags=QWEN35.call_tags, result_tags=QWEN35.result_tags,
    parse=QWEN35.parse,
)  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in "fg"
]


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def bot(content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, id: str | None = None, **arguments: Any) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if id is None else {**made, "id": id}


def result(content: str, id: str | None = None) -> dict[str, Any]:
    made = {"role": "tool", "content": content}
    return made if id is None else {**made, "tool_call_id": id}


F, G = call("f", "1"), call("g", "2")


def fixed(
    *messages: dict[str, Any], context: RepairContext = CONTEXT
) -> tuple[list[dict[str, Any]], tuple[DataFinding, ...]]:
    row, notes = repair({"messages": list(messages), "tools": TOOLS}, context)
    return row["messages"], tuple(note for note in notes if note.code != "QC-DATA-057")


def refused(*messages: dict[str, Any], context: RepairContext = CONTEXT) -> RowError:
    with pytest.raises(RowError) as caught:
        fixed(*messages, context=context)
    return caught.value


# Results.


@pytest.mark.parametrize(
    ("messages", "at", "what"),
    [
        ([user("a"), bot(tool_calls=[call("f")]), user("b"), bot("c")], 1, "no result"),
        ([user("a"), bot(tool_calls=[F, G]), result("x", "1"), user("b"), bot("c")], 1, "2"),
        ([user("a"), bot(tool_calls=[F, G]), result("x", "2"), bot("c")], 1, "1"),
        ([user("a"), bot(tool_calls=[F, G]), result("x", "1"), result("y", "1"), bot("c")], 3,
         "second result"),
    ],
)  # fmt: skip
def test_calls_and_results_that_do_not_pair_are_refused(messages: Any, at: int, what: str) -> None:
    error = refused(*messages)
    assert (error.code, error.at) == ("QC-DATA-051", f"messages[{at}]")
    assert what in f"{error.what} {error.found}"
    assert error.fix


def test_results_get_the_order_of_the_calls() -> None:
    made, notes = fixed(
        user("a"), bot(tool_calls=[F, G]), result("y", "2"), result("x", "1"), bot("c")
    )
    assert made[2:4] == [result("x", "1"), result("y", "2")]
    ((code, severity, at),) = [(n.code, n.severity, n.field) for n in notes]
    assert (code, severity, at) == ("QC-DATA-050", "note", "messages[2]")


def test_results_in_the_order_of_the_calls_stay() -> None:
    given = [user("a"), bot(tool_calls=[F, G]), result("x", "1"), result("y", "2"), bot("c")]
    assert fixed(*given) == (given, ())
    same = [call("f", "0"), call("g", "0")]  # ids that name nothing
    given = [user("a"), bot(tool_calls=same), result("x", "0"), result("y", "0"), bot("c")]
    assert fixed(*given) == (given, ())


def test_another_number_of_results_without_ids_is_reported() -> None:
    """It may hold both results, as in exports that write one observation a turn."""
    given = [user("a"), bot(tool_calls=[call("f"), call("g")]), result("[1, 2]"), bot("c")]
    made, notes = fixed(*given)
    assert made == given
    assert [(n.code, n.severity, n.field) for n in notes] == [
        ("QC-DATA-052", "warning", "messages[1].tool_calls")
    ]
    _, notes = fixed(user("a"), bot(tool_calls=[call("f")]), result("x"), result("y"), bot("c"))
    assert [n.message for n in notes] == ["1 calls have 2 results"]
    strict = replace(CONTEXT, refused={"QC-DATA-052"})
    assert refused(*given, context=strict).code == "QC-DATA-052"


def test_calls_at_the_end_need_no_result() -> None:
    given = [user("a"), bot(tool_calls=[F, G])]
    assert fixed(*given) == (given, ())
    made, _ = fixed(*given, result("x", "2"))  # nothing after it is trained
    assert made == given


# Calls as text beside `tool_calls`, and in reasoning.

TEXT = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
XML = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize("text", [TEXT, XML])
def test_a_call_that_is_also_text_loses_the_text(text: str) -> None:
    tools = [call("f", x=1 if text is TEXT else "1")]
    made, notes = fixed(user("a"), bot(f"Wait.\n{text}", tool_calls=tools))
    assert made[1] == bot("Wait.", tool_calls=tools)
    assert [(n.code, n.severity) for n in notes] == [("QC-DATA-054", "note")]


@pytest.mark.parametrize("text", [TEXT, XML, f"{TEXT}\n{TEXT}"])
def test_a_call_as_text_beside_another_call_is_refused(text: str) -> None:
    error = refused(user("a"), bot(text, tool_calls=[call("g")]))
    assert (error.code, error.at) == ("QC-DATA-054", "messages[1].content")
    assert error.fix


@pytest.mark.parametrize("more", [{}, {"tool_calls": [call("f", x=1)]}])
def test_a_call_in_reasoning_is_refused(more: Any) -> None:
    error = refused(user("a"), bot("c", reasoning_content=f"Hm.\n{TEXT}", **more))
    assert (error.code, error.at) == ("QC-DATA-054", "messages[1].reasoning_content")
    assert error.fix


@pytest.mark.parametrize("text", ["Use <tool_call> here.", "<tool_call>{not json}</tool_call>"])
def test_a_mention_in_reasoning_is_left_alone(text: str) -> None:
    given = [user("a"), bot("c", reasoning_content=text)]
    assert fixed(*given) == (given, ())


def test_a_template_that_writes_json_is_left_alone() -> None:
    context = replace(CONTEXT, abilities=Abilities(calls="json"))
    given = [user("a"), bot(TEXT, tool_calls=[call("g")], reasoning_content=TEXT)]
    assert fixed(*given, context=context) == (given, ())


# Names.


@pytest.mark.parametrize("other", [{"name": "y"}, {}])
def test_turns_of_two_speakers_are_not_joined(other: dict[str, str]) -> None:
    error = refused(user("a", name="x"), user("b", **other), bot("c"))
    assert (error.code, error.at) == ("QC-DATA-051", "messages[1].name")
    assert "content" in str(error.fix)
    assert refused(user("a"), bot("b", name="x"), bot("c", name="y")).at == "messages[2].name"


def test_turns_of_one_speaker_are_joined() -> None:
    made, _ = fixed(user("a", name="x"), user("b", name="x"), bot("c"))
    assert made[0] == user("a\n\nb", name="x")

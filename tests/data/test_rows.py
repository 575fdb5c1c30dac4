"""Rows: what is read and normalized, and every bad row with its exact line and field."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import bot, call, read_file, user, write_rows

from qcore.data.rejects import SHOWN, Rejects
from qcore.data.rows import ChatRow
from qcore.data.source_counts import SourceCount
from qcore.data.sources.jsonl import MAX_LINE
from qcore.errors import InputError, PreflightError

GOOD = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
USER = '{"role": "user", "content": "q"}'


def row(message: str) -> bytes:
    """A row whose second message is `message`."""
    return f'{{"messages": [{USER}, {message}]}}'.encode()


def answer(more: str) -> bytes:
    return row(f'{{"role": "assistant", "content": "a", {more}}}')


def ending(more: str) -> bytes:
    """A good row with another key."""
    return (GOOD[:-1] + f", {more}}}").encode()


# bytes of the bad line, code, field inside the row, something that the message says
BAD: list[tuple[bytes, str, str, str]] = [
    (b'{"messages": "\xff"}', "QC-DATA-003", "", "0xff at byte 15"),
    (b'{"messages": "\xc3("}', "QC-DATA-003", "", "byte 15"),
    (b"\xef\xbb\xbf" + GOOD.encode(), "QC-DATA-004", "", "byte 1"),
    (b'{"messages": [', "QC-DATA-004", "", "at byte 15"),
    (b"{'messages': []}", "QC-DATA-004", "", "double quotes at byte 2"),
    ("{\"é\": x}".encode(), "QC-DATA-004", "", "at byte 8"),
    ((GOOD + GOOD).encode(), "QC-DATA-004", "", f"Extra data at byte {len(GOOD) + 1}"),
    (b"nonsense", "QC-DATA-004", "", "Expecting value"),
    (b'{"messages": [], "messages": []}', "QC-DATA-004", "", "duplicate key"),
    (answer('"content": "b"'), "QC-DATA-004", "", "'content'"),
    (ending('"metadata": NaN'), "QC-DATA-004", "", "NaN"),
    (ending('"metadata": -Infinity'), "QC-DATA-004", "", "-Infinity"),
    (ending('"metadata": 1e999'), "QC-DATA-004", "", "1e999"),
    (ending(f'"metadata": {"9" * 5000}'), "QC-DATA-004", "", "digits"),
    (ending(f'"metadata": {"[" * 70}{"]" * 70}'), "QC-DATA-004", "", "too deep"),
    (b"[" * 100_000, "QC-DATA-004", "", "too deep"),
    (b'{"a":' * 100_000, "QC-DATA-004", "", "too deep"),
    (b'"messages"', "QC-DATA-005", "", "the string 'messages'"),
    (b"null", "QC-DATA-005", "", "found null"),
    (b"[]", "QC-DATA-005", "", "found a list"),
    (b"{}", "QC-DATA-005", "", "no messages"),
    (b'{"mesages": []}', "QC-DATA-005", "mesages", "unknown key"),
    (b'{"conversations": []}', "QC-DATA-005", "conversations", "unknown key"),
    (b'{"messages": null}', "QC-DATA-005", "", "no messages"),
    (b'{"messages": []}', "QC-DATA-005", "messages", "empty list"),
    (b'{"messages": {"role": "user"}}', "QC-DATA-005", "messages", "an object"),
    (b'{"messages": "hello"}', "QC-DATA-005", "messages", "hello"),
    (b'{"prompt": "q", "response": "a"}', "QC-DATA-005", "prompt", "unknown key"),
    (ending('"prompt": "q"'), "QC-DATA-005", "prompt", "unknown key"),
    (ending('"tools": "[]"'), "QC-DATA-007", "tools", "the string"),
    (row('"text"'), "QC-DATA-006", "messages[1]", "not an object"),
    (row('{"content": "a"}'), "QC-DATA-006", "messages[1]", "no role"),
    (row('{"role": null, "content": "a"}'), "QC-DATA-006", "messages[1].role", "no role"),
    (row('{"role": "asistant", "content": "a"}'), "QC-DATA-006", "messages[1].role", "'asistant'"),
    (row('{"role": "developer", "content": "a"}'), "QC-DATA-006", "messages[1].role", "developer"),
    (row('{"role": "gpt", "content": "a"}'), "QC-DATA-006", "messages[1].role", "'gpt'"),
    (row('{"role": "user"}'), "QC-DATA-006", "messages[1].content", "missing"),
    (row('{"role": "user", "content": null}'), "QC-DATA-006", "messages[1].content", "missing"),
    (row('{"role": "user", "content": 3}'), "QC-DATA-006", "messages[1].content", "number 3"),
    (row('{"role": "user", "content": {"text": "a"}}'), "QC-DATA-006", "messages[1].content",
     "object"),
    (row('{"role": "user", "content": ["a"]}'), "QC-DATA-006", "messages[1].content[0]", "part"),
    (row('{"role": "user", "content": [{"text": "a"}]}'), "QC-DATA-006",
     "messages[1].content[0]", "not a valid text part"),
    (row('{"role": "user", "content": [{"type": "text", "text": 1}]}'), "QC-DATA-006",
     "messages[1].content[0]", "number 1"),
    (row('{"role": "user", "content": [{"type": "image", "image": "a.png"}]}'), "QC-DATA-009",
     "messages[1].content[0]", "'image', expected text parts"),
    (row('{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}'), "QC-DATA-009",
     "messages[1].content[0]", "image_url"),
    (row('{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}'),
     "QC-DATA-009", "messages[1].content[0]", "'input_audio'"),
    (row('{"role": "user", "content": [{"type": "file", "file": "a.pdf"}]}'), "QC-DATA-009",
     "messages[1].content[0]", "of an unknown type"),
    (row('{"role": "user", "content": [{"type": "text", "text": "a", "image": "a.png"}]}'),
     "QC-DATA-006", "messages[1].content[0].image", ""),
    (row('{"role": "user", "content": "a", "contnet": "b"}'), "QC-DATA-006",
     "messages[1].contnet", "unknown key"),
    (answer('"weight": 0'), "QC-DATA-006", "messages[1].weight", "unknown key"),
    (answer('"name": 3'), "QC-DATA-006", "messages[1].name", "number 3"),
    (answer('"function_call": {}'), "QC-DATA-006", "messages[1].function_call", "unknown key"),
    (answer('"thinking": "x"'), "QC-DATA-006", "messages[1].thinking", "unknown key"),
    (answer('"reasoning_content": ["x"]'), "QC-DATA-006", "messages[1].reasoning_content",
     "a list"),
    (answer('"tool_calls": {"name": "f"}'), "QC-DATA-007", "messages[1].tool_calls", "an object"),
    (answer('"tool_calls": ["f"]'), "QC-DATA-007", "messages[1].tool_calls[0]", "not a call"),
    (answer('"tool_calls": [{"function": {}}]'), "QC-DATA-007",
     "messages[1].tool_calls[0].function", "no function"),
    (answer('"tool_calls": [{"function": "f"}]'), "QC-DATA-007",
     "messages[1].tool_calls[0].function", "not a function"),
    (answer('"tool_calls": [{"function": {"name": "f", "args": {}}}]'), "QC-DATA-007",
     "messages[1].tool_calls[0].function.args", "unknown key"),
    (answer('"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]'), "QC-DATA-007",
     "messages[1].tool_calls[0].function.arguments", "a list"),
    (answer('"tool_calls": [{"function": {"name": "f", "arguments": "x=1"}}]'), "QC-DATA-004",
     "messages[1].tool_calls[0].function.arguments", "not JSON"),
    (answer('"tool_calls": [{"function": {"name": "f", "arguments": "{\\"a\\":1,\\"a\\":2}"}}]'),
     "QC-DATA-004", "messages[1].tool_calls[0].function.arguments", "duplicate key"),
    (answer('"tool_calls": [{"name": "f", "arguments": 3}]'), "QC-DATA-007",
     "messages[1].tool_calls[0].arguments", "number 3"),
    (row('{"role": "user", "content": "a", "tool_calls": []}'), "QC-DATA-006",
     "messages[1].tool_calls", "unknown key"),
    (row('{"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}'),
     "QC-DATA-006", "messages[1]", "without a preceding tool call"),
    (ending('"tools": {"name": "f"}'), "QC-DATA-007", "tools", "an object"),
    (ending('"tools": [{"type": "function"}]'), "QC-DATA-007", "tools[0]", "function name"),
    (ending('"tools": "[oops"'), "QC-DATA-007", "tools", "not a list"),
    (ending('"tools": [3]'), "QC-DATA-007", "tools[0]", "number 3"),
    (row(USER), "QC-DATA-010", "messages", "no assistant turn"),
    (row('{"role": "assistant", "content": " \\n"}'), "QC-DATA-010", "messages[1]", "is empty"),
    (row('{"role": "assistant"}'), "QC-DATA-010", "messages[1]", "is empty"),
    (row('{"role": "assistant", "content": "a<|im_end|>b"}'), "QC-DATA-008",
     "messages[1].content", "'<|im_end|>'"),
    (answer('"reasoning_content": "<|im_start|>"'), "QC-DATA-008",
     "messages[1].reasoning_content", "'<|im_start|>'"),
    (answer('"tool_calls": [{"name": "f", "arguments": {"k": ["<|im_end|>"]}}]'), "QC-DATA-008",
     "messages[1].tool_calls[0].arguments.k[0]", "'<|im_end|>'"),
    (answer('"tool_calls": [{"name": "f", "arguments": {"<|im_end|>": 1}}]'), "QC-DATA-008",
     "messages[1].tool_calls[0].arguments", "'<|im_end|>'"),
    (ending('"tools": [{"name": "f", "description": "<|im_end|>"}]'), "QC-DATA-008",
     "tools[0].description", "'<|im_end|>'"),
    (row('{"role": "assistant", "content": "a\\u0000b"}'), "QC-DATA-008",
     "messages[1].content", "NUL"),
    (row('{"role": "assistant", "content": "a\\ud83d"}'), "QC-DATA-008",
     "messages[1].content", "\\ud83d"),
    (answer('"reasoning_content": "x</think>y"'), "QC-DATA-016",
     "messages[1].reasoning_content", "</think>"),
    (row('{"role": "assistant", "content": "<think>x</think>a", "reasoning_content": ""}'),
     "QC-DATA-016", "messages[1].content", "beside"),
    (row('{"role": "assistant", "content": "<think>x and no end"}'), "QC-DATA-016",
     "messages[1].content", "think block"),
    (row('{"role": "assistant", "content": "<think>x</think>a<think>y</think>b"}'),
     "QC-DATA-016", "messages[1].content", "think block"),
    (row('{"role": "assistant", "content": "lost <think>x</think>a"}'), "QC-DATA-016",
     "messages[1].content", "drops"),
]  # fmt: skip


def read(path: Path, **more: Any) -> list[ChatRow]:
    return list(read_file(path, **more))


@pytest.mark.parametrize(("raw", "code", "field", "says"), BAD, ids=range(len(BAD)))
def test_bad_row_is_one_line_with_file_line_and_field(
    tmp_path: Path, raw: bytes, code: str, field: str, says: str
) -> None:
    good = GOOD.encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good + b"\n\n" + good + b"\n" + raw + b"\n" + good + b"\n")
    seen = []
    with pytest.raises(InputError) as caught:
        seen.extend(read_file(path))
    error = caught.value
    assert (error.code, error.exit_code) == (code, 65)
    assert error.field == (f"line 4, {field}" if field else "line 4")
    assert says in error.message
    assert "\n" not in error.message
    assert len(error.message) < 600


def test_the_rows_around_a_bad_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{{\n{GOOD}\nnull\n{GOOD}\n")
    rejects = Rejects()
    counts: list[SourceCount] = []
    assert [r.line for r in read_file(path, rejects, counts=counts)] == [1, 3, 5]
    assert rejects.count == 2
    with pytest.raises(PreflightError) as caught:
        rejects.stop(counts)
    assert [e.field for e in caught.value.errors] == ["line 2", "line 4"]


def test_all_bad_rows_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{GOOD}\n" if n % 3 else "oops\n" for n in range(3000)))
    with pytest.raises(PreflightError) as caught:
        read(path)
    *shown, last = caught.value.errors
    assert [e.field for e in shown] == [f"line {3 * n + 1}" for n in range(SHOWN)]
    assert last.code == "QC-DATA-014"
    assert "1000 rows" in last.message


@pytest.mark.parametrize(
    ("raw", "code", "says"),
    [
        (b"", "QC-DATA-002", "no rows"),
        (b"\n \r\n\n", "QC-DATA-002", "no rows"),
        (b"\x1f\x8b\x08\x00", "QC-DATA-031", "gzip"),
        (b"PAR1\x15\x04", "QC-DATA-031", "a whole Parquet file"),
        (GOOD.encode("utf-16"), "QC-DATA-003", "UTF-16"),
        (json.dumps(json.loads(GOOD), indent=1).encode(), "QC-DATA-003", "one JSON document"),
    ],
)
def test_a_file_of_another_kind_is_one_error(
    tmp_path: Path, raw: bytes, code: str, says: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.code == code
    assert says in caught.value.message
    assert not isinstance(caught.value, PreflightError)


@pytest.mark.parametrize("name", ["absent.jsonl", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path / name)
    assert caught.value.code == "QC-DATA-001"


def test_a_huge_line_is_refused_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(GOOD.encode() + b"\n")
        for _ in range(4 * MAX_LINE >> 20):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + GOOD.encode())
    rejects = Rejects()
    counts: list[SourceCount] = []
    tracemalloc.start()
    rows = list(read_file(path, rejects, counts=counts))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [r.line for r in rows] == [1, 3]
    assert rejects.count == 1
    assert peak < 3 * MAX_LINE
    assert counts[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_byte_order_mark_and_windows_line_ends_mean_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n")
    assert [r.line for r in read(path)] == [1, 2]


def one(tmp_path: Path, value: object) -> ChatRow:
    (found,) = read(write_rows(tmp_path / "rows.jsonl", [value]))
    return found


def test_nulls_that_column_formats_fill_in_are_dropped(tmp_path: Path) -> None:
    part = {"type": "text", "text": "q", "image": None, "video": None}
    found = one(
        tmp_path,
        {
            "messages": [
                {"role": "user", "content": [part], "tool_calls": None, "name": None},
                {"role": "assistant", "content": None, "tool_calls": [call("f", {"a": None})]},
                {"role": "tool", "content": "r", "tool_call_id": "c1", "thinking": None},
                {"role": "assistant", "content": "a", "tool_calls": None, "reasoning": None},
            ],
            "tools": [
                {
                    "type": "function",
                    "strict": None,
                    "function": {
                        "name": "f",
                        "parameters": {
                            "properties": {"a": {"default": None, "enum": None}, "b": None}
                        },
                    },
                }
            ],
        },
    )
    asked, called, result, last = found.messages
    assert asked == {"role": "user", "content": [{"type": "text", "text": "q"}]}
    # An argument that is null is what the call says; the template writes it.
    assert called == {"role": "assistant", "tool_calls": [call("f", {"a": None})]}
    assert result == {"role": "tool", "content": "r", "tool_call_id": "c1"}
    assert last == bot("a")
    assert found.tools == (
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"a": {"default": None}}}},
        },
    )


@pytest.mark.parametrize(
    ("given", "read_as"),
    [
        ('{"b": 1, "a": [true, null]}', {"b": 1, "a": [True, None]}),
        ({"b": 1}, {"b": 1}),
        ("", {}),
        ("  ", {}),
        (None, {}),
        ("{}", {}),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_string_arguments_are_parsed(
    tmp_path: Path, given: object, read_as: dict[str, object], nested: bool
) -> None:
    made = call("f", given) if nested else {"name": "f", "arguments": given}
    found = one(tmp_path, {"messages": [user("q"), bot(None, tool_calls=[made])]})
    (got,) = found.messages[1]["tool_calls"]
    arguments = (got["function"] if nested else got)["arguments"]
    assert arguments == read_as
    assert list(arguments) == list(read_as)


def test_an_empty_list_of_tools_is_none(tmp_path: Path) -> None:
    exchange = [user("q"), bot("a")]
    assert one(tmp_path, {"messages": exchange, "tools": []}).tools is None


@pytest.mark.parametrize(
    "said", ["<think>\nr\n</think>\n\na", " <think></think>a", "r</think>a", "a < b, a > b"]
)
def test_one_think_block_at_the_start_of_content_is_allowed(tmp_path: Path, said: str) -> None:
    assert one(tmp_path, {"messages": [user("q"), bot(said)]}).messages[1]["content"] == said


def test_think_marks_may_be_control_strings_and_an_inline_block_still_allowed(
    tmp_path: Path,
) -> None:
    control = ("<think>", "</think>")
    rows = [
        {"messages": [user("q"), bot("<think>r</think>a")]},
        {"messages": [user("what is <think>?"), bot("a")]},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    rejects = Rejects()
    counts: list[SourceCount] = []
    assert [r.line for r in read_file(path, rejects, control=control, counts=counts)] == [1]
    with pytest.raises(InputError, match=r"line 2, messages\[0\].content"):
        rejects.stop(counts)


def test_control_strings_that_composition_makes_are_refused(tmp_path: Path) -> None:
    # U+212A KELVIN SIGN composes to the letter K.
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [user("<|\u212aEY|>"), bot("a")]}])
    with pytest.raises(InputError, match="must not reach the model"):
        read(path, control=("<|KEY|>",))


def test_text_keeps_its_characters(tmp_path: Path) -> None:
    said = "हिन्दी e\u0301 مُحَمَّد \u2028 👍🏽 \t"
    assert one(tmp_path, {"messages": [user(said), bot(said)]}).messages[1]["content"] == said

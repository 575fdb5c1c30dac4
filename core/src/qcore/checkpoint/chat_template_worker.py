"""The subprocess that renders chat templates in a jinja2 sandbox, as transformers would.

This file decides which resources a template may use, and the messages. It runs as a script by its
path, so that nothing else of this package is imported; `qcore.checkpoint.chat_template_sandbox`
decides what a template may see. The kernel limits memory and the processor time of a render, so
that a loaded machine refuses no template; an alarm ends a process whose parent has died.

Messages on stdin and stdout are eight bytes of length, little endian, then JSON. The worker sends
``{"ready": true}`` and answers ``{"template": ...}`` with ``{"inputs": [...]}``. A request
``{"variables": {...}, "rows": [[messages, tools, [[count, prompt, variables], ...]], ...]}`` asks
for the renderings of the first `count` messages of each row. Each rendering is answered by a part:
eight bytes with the number of characters that it shares with the beginning of the last text of its
row, eight bytes with the length of what follows, and the rest of the text in UTF-8. Prefixes of a
conversation share most of their text, so that little of it is copied. A failure has 2**64 - 1 in
place of the first number, and ``{"error": kind, "text": ..., "type": ..., "line": ...}`` as text;
the other two answers may be such an object too.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import jinja2
import jinja2.debug
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

if TYPE_CHECKING or __package__:
    from .chat_template_sandbox import Raised, environment
else:  # a script, which knows no package
    _path = Path(__file__).with_name("chat_template_sandbox.py")
    _spec = importlib.util.spec_from_file_location(_path.stem, _path)
    _sandbox = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_sandbox)
    Raised, environment = _sandbox.Raised, _sandbox.environment

MEMORY = 512 << 20  #: bytes of address space
OUTPUT = 8 << 20  #: characters of one rendered conversation
CPU_SECONDS = 2.0  #: processor time of one render; wall time would depend on the machine's load
ROW_SECONDS = 30.0  #: processor time of all renderings of one row
ALARM = 60  #: seconds after which a render ends, even if the parent process has died
FLUSH_SECONDS = 0.5  #: after which finished renderings are sent
FAILED = (1 << 64) - 1  #: in place of the number of shared characters
_SLOW: dict[str, Any] = {"error": "slow", "text": "", "type": "", "line": None}

#: Every exception that a template can cause; any other exception is a bug in this file.
RAISED = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class TooMuch(Exception):
    """The output exceeded its limit."""


def inputs(env: jinja2.Environment, text: str) -> set[str]:
    """Return the variables that a template reads from its caller: loads minus stores.

    Jinja's own ``find_undeclared_variables`` also counts names that only a branch sets. A name
    that the template sets only if the caller did not (``is defined``, ``default``) is an input
    too.
    """
    tree = env.parse(text)
    loads: set[str] = set()
    optional: set[str] = set()
    stores = {"loop", "caller", "varargs", "kwargs", "self", "super"}
    for name in tree.find_all(jinja2.nodes.Name):
        (loads if name.ctx == "load" else stores).add(name.name)
    stores.update(macro.name for macro in tree.find_all(jinja2.nodes.Macro))
    for node in _outside_macros(tree):
        tested = isinstance(node, jinja2.nodes.Test) and node.name in ("defined", "undefined")
        filled = isinstance(node, jinja2.nodes.Filter) and node.name in ("default", "d")
        if (tested or filled) and isinstance(node.node, jinja2.nodes.Name):  # type: ignore[attr-defined]
            optional.add(node.node.name)  # type: ignore[attr-defined]
    undeclared = jinja2.meta.find_undeclared_variables(tree)
    return (loads - stores - set(env.globals)) | (optional & undeclared)


def _outside_macros(node: jinja2.nodes.Node) -> Iterator[jinja2.nodes.Node]:
    for child in node.iter_child_nodes():
        if not isinstance(child, jinja2.nodes.Macro):
            yield child
            yield from _outside_macros(child)


def conversation(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prepare messages as transformers does: drop nulls, unify the names of reasoning."""
    prepared = []
    for original in messages:
        message = {key: value for key, value in original.items() if value is not None}
        for key in ("reasoning_content", "thinking", "reasoning"):
            if key in message:
                reasoning = message[key]
                message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
                break
        prepared.append(message)
    return prepared


def renderings(
    variables: dict[str, Any], row: tuple[list[dict[str, Any]], Any, list[Any]]
) -> Iterator[dict[str, Any]]:
    """The inputs of each rendering of a row.

    Args:
        variables: inputs of all rows.
        row: its messages, its tools, and its prefixes: the number of messages, whether a
            generation prompt follows, and variables over those of all rows.
    """
    messages, tools, prefixes = row
    messages = conversation(messages)
    for count, prompt, own in prefixes:
        yield {
            **variables,
            **own,
            "messages": messages[:count],
            "tools": tools,
            "add_generation_prompt": prompt,
        }


def shared_length(one: str, other: str) -> int:
    """Number of characters at the beginning that two texts have in common."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    least = 0
    while most - least > 1:  # one[:least] is common, one[:most] is not
        middle = (least + most) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle
    return least


def render(template: jinja2.Template, values: dict[str, Any]) -> str:
    """Render one conversation.

    Raises:
        TooMuch: the output is longer than `OUTPUT` characters.
        UnicodeEncodeError: it has a lone surrogate.
    """
    blocks, length = [], 0
    for block in template.generate(**values):
        length += len(block)
        if length > OUTPUT:
            raise TooMuch
        blocks.append(block)
    text = "".join(blocks)
    if not text.isascii():
        text.encode("utf-8")  # raises for a lone surrogate
    return text


def failure(error: BaseException) -> dict[str, Any]:
    """Describe an error for the parent process: kind, text, type and line of the template."""
    kind = "runtime"
    for name, types in (
        ("raised", Raised),
        ("security", jinja2.exceptions.SecurityError),
        ("syntax", (jinja2.TemplateSyntaxError, SyntaxError)),
        ("memory", MemoryError),
        ("output", TooMuch),
        ("recursion", RecursionError),
    ):
        if isinstance(error, types):
            kind = name
            break
    line, frames = getattr(error, "lineno", None), error.__traceback__
    while frames is not None:
        if frames.tb_frame.f_code.co_filename == "<template>":
            line = frames.tb_lineno
        frames = frames.tb_next
    text = "" if isinstance(error, RecursionError) else str(error)[:300]
    return {"error": kind, "text": text, "type": type(error).__name__, "line": line}


def limit() -> None:
    """Limit memory, and disable file writes and core dumps, which a template never needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    for what, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        try:
            resource.setrlimit(what, (value, value))
        except (ValueError, OSError):  # macOS defines RLIMIT_AS but rejects it
            continue


def _receive(stream: BinaryIO) -> dict[str, Any] | None:
    head = stream.read(8)
    if len(head) < 8:
        return None
    request: dict[str, Any] = json.loads(stream.read(int.from_bytes(head, "little")))
    return request


def _json(answer: dict[str, Any]) -> bytes:
    # A lone surrogate in an error message becomes its JSON escape.
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _send(stream: BinaryIO, answer: dict[str, Any]) -> None:
    body = _json(answer)
    stream.write(len(body).to_bytes(8, "little") + body)
    stream.flush()


def main() -> None:
    """Answer requests until stdin ends."""
    env = environment()
    env.from_string("{{ messages | tojson }}").render(messages=[])  # trigger jinja's lazy imports
    limit()
    _send(sys.stdout.buffer, {"ready": True})
    template: jinja2.Template | None = None
    while (request := _receive(sys.stdin.buffer)) is not None:
        if template is None:
            template, answer = _open(env, request["template"])
            _send(sys.stdout.buffer, answer)
            continue
        _answer(sys.stdout.buffer, template, request)


def _answer(stream: BinaryIO, template: jinja2.Template, request: dict[str, Any]) -> None:
    """Send the renderings of all rows of a request."""
    flushed = time.monotonic()
    for row in request["rows"]:
        last, until = "", time.process_time() + ROW_SECONDS
        # The limit on time holds for each rendering, so that a slow template is found at once.
        for values in renderings(request["variables"], row):
            late = time.process_time() > until
            made = _SLOW if late else _bounded(template, values)
            if isinstance(made, str):
                shared = shared_length(last, made)
                _part(stream, shared, made[shared:].encode())
                last = made
            else:
                _part(stream, FAILED, _json(made))
            if time.monotonic() - flushed > FLUSH_SECONDS:
                stream.flush()
                flushed = time.monotonic()
    stream.flush()


def _part(stream: BinaryIO, shared: int, body: bytes) -> None:
    stream.write(shared.to_bytes(8, "little") + len(body).to_bytes(8, "little") + body)


def _start_clock() -> None:
    """Let a signal end this process when a render is late, in whatever code it is."""
    signal.alarm(ALARM)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)


def _stop_clock() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)


def _open(env: jinja2.Environment, text: str) -> tuple[jinja2.Template | None, dict[str, Any]]:
    _start_clock()
    try:
        return env.from_string(text), {"inputs": sorted(inputs(env, text))}
    except (*RAISED, TooMuch) as error:
        return None, failure(error)
    finally:
        _stop_clock()


def _bounded(template: jinja2.Template, values: dict[str, Any]) -> str | dict[str, Any]:
    _start_clock()
    try:
        return render(template, values)
    except (*RAISED, TooMuch) as error:
        return failure(error)
    finally:
        _stop_clock()


if __name__ == "__main__":
    main()

"""Lines of a compiled chat template that renderings do not reach."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any

import jinja2

from qcore.checkpoint.chat_template_worker import environment

_FILE = "<compiled template>"
#: Lines that jinja2 writes around every filter, test, macro and namespace, and the first line of
#: an output, whose further lines are counted.
_OWN = re.compile(
    r"raise TemplateRuntimeError|= undefined\(\"parameter|\.append\($|^(try|except|@|def |pass)"
)


def unreached(text: str, renderings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The lines of the Python code of a template that no rendering runs.

    Args:
        text: the template.
        renderings: its variables, for each rendering.
    """
    made = environment()
    source = str(made.compile(text, raw=True))
    code = compile(source, _FILE, "exec")
    template = jinja2.Template.from_code(made, code, made.make_globals(None))
    reached: set[int] = set()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != _FILE:
            return None
        reached.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for variables in renderings:
            template.render(**variables)
    finally:
        sys.settrace(before)
    numbers = {n for one in code.co_consts if isinstance(one, CodeType) for n in _numbers(one)}
    lines = source.splitlines()
    left = [lines[number - 1].strip() for number in sorted(numbers - reached)]
    return [line for line in left if line and not _OWN.search(line)]


def _numbers(code: CodeType) -> Iterator[int]:
    for _, _, number in code.co_lines():
        if number:
            yield number
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _numbers(inner)

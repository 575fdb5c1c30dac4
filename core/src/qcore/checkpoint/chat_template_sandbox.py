"""The jinja2 sandbox in which chat templates are rendered, as transformers would.

This file decides what a template may see. It is that of transformers' ``apply_chat_template``
(chat_template_utils.py of 5.23): immutable sandbox, trimmed blocks, loop controls, ``tojson``
without HTML escapes, ``raise_exception``, ``strftime_now``, guarded ``dict`` and ``namespace``, the
``generation`` tag. It imports only jinja2 and the standard library.
`qcore.checkpoint.chat_template_worker` renders in it.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

DICT_ATTRIBUTES = frozenset(dir(dict))
MOST_DECIDED = 1024  #: attributes of types that the sandbox remembers


class Raised(jinja2.TemplateError):
    """The template called ``raise_exception``."""


class Generation(jinja2.ext.Extension):
    """``{% generation %}``: renders its body and has no other effect."""

    tags = {"generation"}  # noqa: RUF012, jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body)
        return call.set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


class Dict:
    """``dict`` without the attributes of the type, which could escape the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class Namespace(jinja2.utils.Namespace):
    """``namespace`` that rejects names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is not a named parameter, so that a template may call namespace(self=...).
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} is not allowed in a namespace")


def raise_exception(message: Any) -> None:
    """Refuse the conversation; templates call this.

    Raises:
        Raised: always.
    """
    raise Raised(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers writes it, without HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def strftime_now(pattern: str) -> str:
    """Return the local time, formatted by `pattern`."""
    return datetime.datetime.now().strftime(pattern)


DECIDED = frozenset((str, dict, list, Namespace, jinja2.runtime.LoopContext))


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which decides once about an attribute of a type instead of at every use."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._safe: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = type(obj), attr
        known = self._safe.get(key)
        if known is None:
            known = super().is_safe_attribute(obj, attr, value)
            # Whether these are safe depends on the type and the name alone.
            if key[0] in DECIDED and len(self._safe) < MOST_DECIDED:
                self._safe[key] = known
        return known

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is not dict or attribute in DICT_ATTRIBUTES:
            return super().getattr(obj, attribute)
        try:  # jinja2 looks for an attribute first, which raises an error for most keys
            return obj[attribute]
        except KeyError:
            return self.undefined(obj=obj, name=attribute)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Build the Jinja environment of ``apply_chat_template``."""
    env = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    env.globals["dict"] = Dict()
    env.globals["namespace"] = Namespace
    return env

"""Fake distributions on disk, a process to look at them in, and checkpoints without files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qcore.errors import InputError

GOOD = """
from qcore import hookimpl
from qcore.records import Architecture, Bar, Claim, Generation, Modality, Sign

def build(context):
    raise NotImplementedError

@hookimpl
def qcore_describe():
    yield Architecture(name="{kind}", model_types=("{kind}",), root="m", groups={{}}, build=build)
    yield Generation(name="1", architectures=("{kind}",))

@hookimpl
def qcore_detect(checkpoint):
    yield Claim(architecture="{kind}", generation="1", signs=(Sign(field="f", value="v"),))
"""


def good(kind: str) -> str:
    """A sound plugin with an architecture `kind` and a generation that it always signs."""
    return GOOD.format(kind=kind)


def distribution(
    folder: Path,
    name: str,
    *,
    module: str,
    source: str = "",
    plugin: str | None = None,
    model_types: tuple[str, ...] = (),
    version: str = "1.0",
    requires: str | None = "qcore-framework>=0.1,<0.2",
    entry_points: str | None = None,
) -> None:
    """Write a distribution as an installer leaves it: modules beside a ``*.dist-info``."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    if requires is not None:
        metadata += f"Requires-Dist: {requires}\n"
    (info / "METADATA").write_text(metadata)
    if entry_points is None:
        entry_points = f"[qcore.plugins]\n{plugin or name} = {module}\n"
        if model_types:
            entry_points += "[qcore.model_types]\n"
            entry_points += "".join(f"{kind} = {module}\n" for kind in model_types)
    (info / "entry_points.txt").write_text(entry_points)
    if source:
        (folder / f"{module}.py").write_text(textwrap.dedent(source))


def process(folder: Path, code: str, **environment: str) -> Any:
    """Run `code` in a process that sees `folder`; it calls ``show(value)`` once with JSON.

    `plugins` is ``Plugins.discover()``; stdout must hold nothing else.
    """
    head = """
        import json, sys
        from qcore.errors import QcoreError
        from qcore.plugins import Plugins
        def show(value): print(json.dumps(value))
        def error_of(call):
            try:
                call()
            except QcoreError as error:
                return {**error.as_json(), "exit": error.exit_code}
        plugins = Plugins.discover()
        def statuses():
            return {i.name: [i.status.value, i.reason, i.distribution] for i in plugins.infos}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class _GenerationTag(Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class FakeTemplate:
    """A template rendered in this process, with the attributes of the real one."""

    def __init__(self, text: str, source: str = "chat_template.jinja") -> None:
        self.text = text
        self.source = source
        self.renders = 0
        self.environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag]
        )
        self.environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self.environment.globals["raise_exception"] = self._raise

    def _raise(self, message: str) -> None:
        raise jinja2.TemplateError(message)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.rstrip("\r\n").encode()).hexdigest()

    def inputs(self) -> frozenset[str]:
        tree = self.environment.parse(self.text)
        stored = {n.name for n in tree.find_all(nodes.Name) if n.ctx in ("store", "param")}
        read = {n.name for n in tree.find_all(nodes.Name) if n.ctx == "load"}
        macros = {n.name for n in tree.find_all(nodes.Macro)}
        return frozenset(read - stored - macros - {"loop", *self.environment.globals})

    def render(self, messages: Any, tools: Any = None, **variables: Any) -> str:
        self.renders += 1
        try:
            template = self.environment.from_string(self.text)
            return template.render(messages=messages, tools=tools, **variables)
        except (jinja2.TemplateError, TypeError) as error:
            raise InputError("QC-FAKE-001", str(error)) from None


def checkpoint(config: dict[str, Any], template: Any = None) -> Any:
    """What detection looks at of a `Checkpoint`."""
    return SimpleNamespace(
        path=Path("model"), source="model", config=config, template=template, headers={}
    )

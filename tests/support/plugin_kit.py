"""Fake distributions on disk, a process to look at them in, and checkpoints without files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qcore.plugins.manager import Plugins

GOOD = """
from qcore import hookimpl
from qcore.api import Architecture, Claim, Evidence, Generation, Modality

def build(context):
    raise NotImplementedError

@hookimpl
def qcore_describe():
    yield Architecture(name="{kind}", model_types=("{kind}",), root="m", build=build)
    yield Generation(name="1", architectures=("{kind}",))

@hookimpl
def qcore_detect(checkpoint):
    yield Claim(generation="1", evidence=(Evidence(field="f", value="v", supports=True),))
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
        from qcore.plugins.manager import Plugins
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


def installed(*folders: Path, real: tuple[str, ...] = ()) -> Plugins:
    """The plugins of distributions in `folders`, and of installed ones named in `real`."""
    found = [*metadata.distributions(path=[str(folder) for folder in folders])]
    found += [metadata.distribution(name) for name in real]
    return Plugins.discover(point for dist in found for point in dist.entry_points)


def checkpoint(config: dict[str, Any], template: Any = None) -> Any:
    """What detection looks at of a `Checkpoint`."""
    return SimpleNamespace(
        path=Path("model"), source="model", config=config, template=template, headers={}
    )

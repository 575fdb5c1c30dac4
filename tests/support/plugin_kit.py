"""The source of a sound plugin, and a process in which a test looks at installed plugins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

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

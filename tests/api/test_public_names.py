"""`qcore.api`: every name resolves, each to one object, and only those of blocks import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import qcore.api
from qcore.api.views import SettingsView
from qcore.config.settings import Settings

PLUGINS = ("qcore_qwen35.plugin", "qcore_qwen36.plugin", "qcore_multimodal.plugin")


def declared() -> dict[str, str]:
    """Public name -> its module, as type checkers see it."""
    tree = ast.parse(Path(qcore.api.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.name: node.module or ""
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def loads_torch(code: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip() == "True"


def test_names_are_those_that_type_checkers_see() -> None:
    modules = declared()
    assert set(modules) == set(qcore.api.__all__) == set(dir(qcore.api))
    for name, module in modules.items():
        assert getattr(qcore.api, name) is getattr(import_module(f"qcore.api.{module}"), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qcore.api.nothing


def test_names_load_no_torch_unless_they_are_blocks() -> None:
    light = [name for name, module in declared().items() if module != "blocks"]
    assert not loads_torch("from qcore.api import Claim")
    assert not loads_torch(f"from qcore.api import {', '.join(light)}")
    assert loads_torch("from qcore.api import Packed")


def test_no_plugin_module_loads_torch() -> None:
    assert not loads_torch(f"import {', '.join(PLUGINS)}")


def test_settings_have_every_name_of_their_view() -> None:
    view = {name for name in vars(SettingsView) if not name.startswith("_")}
    assert view <= set(Settings().to_dict())

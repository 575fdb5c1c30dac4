"""What is public, how it imports, and the size of files and functions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.imports import SOURCES, modules

import qcore

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path
    for folder in ("core/src", "qwen35_plugin/src", "qwen36_plugin/src", "multimodal_plugin/src")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
PUBLIC = {
    "qcore": False,
    "qcore.api": False,
    "qcore.errors": False,
    "qcore.ops": True,
    "qcore.testing": False,
}  #: module -> whether importing it may import torch
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "qcore_qwen35", "rich", "yaml")
MAX_FILE, MAX_FUNCTION = 400, 60
#: Functions that are longer, each with its reason.
LONG = {
    "_conv_backward": "one Triton kernel, whose registers the parts share",
    "_pairs": "one Triton kernel, whose registers the parts share",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("module", [name for name, heavy in PUBLIC.items() if not heavy])
def test_public_modules_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_light_modules_load_no_torch() -> None:
    """What the import contract says of their source, seen when they are imported."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    (light,) = (c["source_modules"] for c in contracts if c["name"].startswith("What is light"))
    every = modules(SOURCES["qcore"], "qcore")
    names = [name for name in every if any(f"{name}.".startswith(f"{one}.") for one in light)]
    # The worker is a program of its own, run with another interpreter's flags.
    names = [name for name in names if not name.endswith("_worker")]
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_list_of_public_modules_is_the_documented_one() -> None:
    text = (ROOT / "docs/python-api.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(qcore[\w.]*)` \|.*\| (yes|no) \|$", text, re.MULTILINE))
    assert told == {name: "yes" if heavy else "no" for name, heavy in PUBLIC.items()}
    assert qcore.__doc__ is not None
    for name in PUBLIC:
        assert f"`{name.split('.')[1] if '.' in name else 'hookimpl'}`" in qcore.__doc__


def test_all_names_of_the_package_exist() -> None:
    assert sorted(qcore.__all__) == list(qcore.__all__)
    for name in qcore.__all__:
        assert getattr(qcore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qcore.nothing


def test_versions_agree() -> None:
    for project in ("core", "qwen35_plugin"):
        text = (ROOT / project / "pyproject.toml").read_text(encoding="utf-8")
        assert f'version = "{qcore.__version__}"' in text
    assert f"## [{qcore.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def oversized(text: str) -> list[str]:
    """What a reader of this source would miss: a docstring, an end in sight."""
    tree, faults = ast.parse(text), []
    if not ast.get_docstring(tree):
        faults.append("no module docstring")
    if (lines := text.count("\n")) > MAX_FILE:
        faults.append(f"{lines} lines")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION and node.name not in LONG:
                faults.append(f"{node.name}: {lines} lines")
    return faults


def test_files_have_a_docstring_and_a_readable_size() -> None:
    assert len(FILES) > 150
    faults = {name_of(path): oversized(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: lines for name, lines in faults.items() if lines} == {}


def test_each_fault_of_size_is_seen() -> None:
    body = "    pass\n"
    assert oversized("x = 1\n") == ["no module docstring"]
    assert oversized('"""A module."""\n' + "\n" * MAX_FILE) == [f"{MAX_FILE + 1} lines"]
    assert oversized('"""A module."""\ndef f() -> None:\n' + body * MAX_FUNCTION) == [
        f"f: {MAX_FUNCTION + 1} lines"
    ]
    assert oversized('"""A module."""\ndef f() -> None:\n' + body) == []


def test_core_names_no_model() -> None:
    for path in (ROOT / "core/src").rglob("*"):
        if path.is_file() and path.suffix in (".py", ".yaml", ".jsonl"):
            assert "qwen" not in path.read_text(encoding="utf-8").lower(), name_of(path)


def test_all_names_of_ops_exist_and_are_documented() -> None:
    import qcore.ops

    public = {name for name in vars(qcore.ops) if not name.startswith("_")} - {"annotations"}
    assert public == set(qcore.ops.__all__)
    for name in qcore.ops.__all__:
        assert f"`{name}`" in (qcore.ops.__doc__ or "")

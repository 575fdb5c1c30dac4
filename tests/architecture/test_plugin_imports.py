"""What a plugin may import of qcore and of other plugins: a whitelist; type-only imports count."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module

import pytest
from support.imports import ROOT, SOURCES, imported, modules

PLUGINS = {name: folder for name, folder in SOURCES.items() if name != "qcore"}
#: module -> the names that may be imported from it; ``None``: all of its public ones.
ALLOWED: dict[str, frozenset[str] | None] = {
    "qcore": frozenset({"hookimpl"}),
    "qcore.api": None,
    "qcore.ops": None,
    "qcore.errors": None,
}
#: What the tests of a plugin may import beside `ALLOWED`.
IN_TESTS = {"qcore.testing"}


def dependencies(package: str) -> set[str]:
    """The packages of the plugins that a plugin's distribution depends on."""
    path = ROOT / package.replace("qcore_", "") / "pyproject.toml"
    path = (
        path if path.exists() else path.parent.with_name(f"{path.parent.name}_plugin") / path.name
    )
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in project["dependencies"]}
    return names & set(PLUGINS)


def fault(package: str, module: str, name: str, *, in_tests: bool = False) -> str | None:
    """Why a plugin may not import ``name`` from ``module``, or ``None``."""
    top = module.partition(".")[0]
    if top == package or top not in SOURCES:
        return None
    allowed = dict(ALLOWED) | {f"{other}.api": None for other in dependencies(package)}
    if in_tests:
        allowed |= dict.fromkeys(IN_TESTS)
    if module not in allowed:
        return f"{module} is not public"
    names = allowed[module]
    public = getattr(import_module(module), "__all__", None) if names is None else names
    if not name or (public is not None and name not in public):
        return f"{module} has no public name '{name}'"
    return None


@pytest.mark.parametrize("package", PLUGINS)
def test_a_plugin_imports_public_names_alone(package: str) -> None:
    faults = [
        f"{module}: {why}"
        for module, path in modules(PLUGINS[package], package).items()
        for base, name in imported(module, path)
        if (why := fault(package, base, name)) is not None
    ]
    assert faults == []


@pytest.mark.parametrize(
    ("package", "module", "name", "fits"),
    [
        ("qcore_qwen35", "qcore.api", "Claim", True),
        ("qcore_qwen35", "qcore", "hookimpl", True),
        ("qcore_qwen36", "qcore_qwen35.api", "parts", True),
        ("qcore_qwen35", "torch", "nn", True),
        ("qcore_qwen35", "qcore", "__version__", False),
        ("qcore_qwen35", "qcore.api", "nothing", False),
        ("qcore_qwen35", "qcore.api.records", "Claim", False),
        ("qcore_qwen35", "qcore.testing", "write_distribution", False),
        ("qcore_qwen35", "qcore.nn.moe.routing", "Routing", False),
        ("qcore_qwen35", "qcore.api", "", False),  # ``import qcore.api``
        ("qcore_qwen36", "qcore_qwen35.table", "parts", False),
        ("qcore_qwen35", "qcore_qwen36.chat", "QWEN36", False),
        ("qcore_multimodal", "qcore_qwen35.api", "parts", False),  # it does not depend on it
    ],
)
def test_the_whitelist(package: str, module: str, name: str, fits: bool) -> None:
    assert (fault(package, module, name) is None) is fits


@pytest.mark.parametrize(
    ("module", "name", "fits"),
    [
        ("qcore.api", "Claim", True),
        ("qcore.testing", "write_distribution", True),
        ("qcore.testing", "nothing", False),
        ("qcore.testing.checkpoints", "sparse_header", False),
    ],
)
def test_the_whitelist_of_tests(module: str, name: str, fits: bool) -> None:
    assert (fault("qcore_qwen35", module, name, in_tests=True) is None) is fits


def test_public_names_of_qwen35_resolve() -> None:
    api = import_module("qcore_qwen35.api")
    assert all(getattr(api, name) is not None for name in api.__all__)
    assert len(set(api.__all__)) == len(api.__all__)

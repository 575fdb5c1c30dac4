"""Fake installed distributions for tests of plugins, and discovery limited to them.

This file decides what of an installed distribution is written (metadata, entry points, at most
one module) and which distributions a test sees. What discovery makes of them is
`qcore.plugins`' business.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from ..io.entry_points import FRAMEWORK, INDEX, PLUGINS
from ..plugins.manager import Plugins


def write_distribution(
    folder: Path,
    name: str,
    *,
    module: str,
    source: str = "",
    plugin: str | None = None,
    model_types: Iterable[str] = (),
    version: str = "1.0",
    requires: str | None = FRAMEWORK,
    entry_points: str | None = None,
) -> None:
    """Write a distribution: ``{module}.py`` beside a ``*.dist-info``.

    Python imports the module once `folder` is on ``sys.path``. Use another module name in each
    test: a module that was imported once stays in ``sys.modules``.

    Args:
        folder: where; made if absent, may hold other distributions.
        name: of the distribution, such as ``qcore-acme``.
        module: the module of the hooks.
        source: its text, dedented; empty: no module is written.
        plugin: name of the plugin; the distribution's by default.
        model_types: what the plugin serves, for the index.
        version: of the distribution.
        requires: its ``Requires-Dist``; ``None`` for none. By default any version of qcore.
        entry_points: text of ``entry_points.txt``, in place of that of `plugin` and `model_types`.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    if requires is not None:
        lines.append(f"Requires-Dist: {requires}")
    _write(info / "METADATA", "\n".join(lines) + "\n")
    if entry_points is None:
        entry_points = f"[{PLUGINS}]\n{plugin or name} = {module}\n[{INDEX}]\n"
        entry_points += "".join(f"{kind} = {module}\n" for kind in model_types)
    _write(info / "entry_points.txt", entry_points)
    if source:
        _write(folder / f"{module}.py", textwrap.dedent(source))


def discover_plugins(*folders: Path, distributions: Iterable[str] = ()) -> Plugins:
    """The plugins of chosen distributions, whatever else is installed. Nothing is imported.

    Args:
        folders: every distribution in these folders (see `write_distribution`).
        distributions: names of installed distributions, such as ``qcore-acme``.

    Raises:
        importlib.metadata.PackageNotFoundError: one of `distributions` is not installed.
    """
    chosen = [*metadata.distributions(path=[str(folder) for folder in folders])]
    chosen += [metadata.distribution(name) for name in distributions]
    return Plugins.discover(point for each in chosen for point in each.entry_points)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

r"""Makes a checkout runnable without installing it: writes entry points, prints PYTHONPATH.

    export PYTHONPATH=$(python benchmarks/checkout.py [--root CHECKOUT] [FOLDER])
    python -m pytest -m gpu

Plugins, presets and SKU files are looked up by the entry points of installed distributions, so
the source folders alone are not enough. For each distribution of the checkout this writes a
``*.dist-info`` below FOLDER with what an installer would take from its pyproject.toml: name,
version, requirements and entry points. It copies no code, so an edit of the sources counts at
once. Without FOLDER it makes a temporary one, which stays. What the distributions require must be
installed.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Print the path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where the metadata goes")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout; default: this one")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="qcore-metadata-"))
    print(python_path(given.root, folder))


def python_path(root: Path, folder: Path) -> str:
    """Write the metadata of the checkout `root` below `folder`; the value of PYTHONPATH.

    What PYTHONPATH holds already comes last.

    Raises:
        FileNotFoundError: there is no distribution in `root`.
    """
    places = [folder.resolve()]
    for path, project in projects(root):
        write_metadata(folder, project["project"])
        where = project["tool"]["setuptools"]["packages"]["find"]["where"]
        places += [path.parent / one for one in where]
    if len(places) == 1:
        raise FileNotFoundError(f"no pyproject.toml of a distribution below {root}")
    given = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    return os.pathsep.join(map(str, [*places, *(Path(one).resolve() for one in given)]))


def projects(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Path and content of the pyproject.toml of each distribution, by path."""
    root = root.resolve()
    for path in sorted([*root.glob("*/pyproject.toml"), *root.glob("plugins/*/pyproject.toml")]):
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        if "project" in project:
            yield path, project


def write_metadata(folder: Path, project: Mapping[str, Any]) -> None:
    """Write METADATA and entry_points.txt of the ``[project]`` table of a distribution."""
    name, version = project["name"], project["version"]
    info = folder / f"{re.sub(r'[-_.]+', '_', name).lower()}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {one}" for one in project.get("dependencies", ())]
    for extra, needs in project.get("optional-dependencies", {}).items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f'Requires-Dist: {one}; extra == "{extra}"' for one in needs]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    groups = dict(project.get("entry-points", {}))
    groups["console_scripts"] = project.get("scripts", {})
    text = "".join(
        f"[{group}]\n" + "".join(f"{one} = {target}\n" for one, target in points.items()) + "\n"
        for group, points in groups.items()
        if points
    )
    (info / "entry_points.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

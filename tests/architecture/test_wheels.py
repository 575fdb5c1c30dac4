"""The wheels hold every file of the packages, and work without the source tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.imports import ROOT, SOURCES

from qcore.config.presets import load_presets
from qcore.skus.registry import load_skus

pytestmark = pytest.mark.slow

BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
#: Reads data files of every package; prints where the packages came from and what was read.
USE = """
import json, sys
from importlib.resources import files
from pathlib import Path
import qcore, qcore_multimodal, qcore_qwen35, qcore_qwen36
from qcore.config.presets import load_presets
from qcore.plugins.manager import Plugins
from qcore.skus.registry import load_skus

plugins = Plugins.discover().load_all()
inspected = {}
for name, owned in plugins.describe().architectures.items():
    if owned.record.tiny is not None:
        folder = Path(sys.argv[1]) / name
        owned.record.tiny(folder)
        report = qcore.inspect(str(folder))
        inspected[name] = [report.generation, [str(problem) for problem in report.problems]]
packages = (qcore, qcore_multimodal, qcore_qwen35, qcore_qwen36)
print(json.dumps({
    "from": sorted({str(Path(package.__file__).parents[1]) for package in packages}),
    "statuses": {info.name: info.status.value for info in plugins.infos},
    "presets": sorted(preset.id for preset in load_presets()),
    "skus": sorted(sku.id for sku in load_skus()),
    "rows": len(files("qcore.data").joinpath("demo.jsonl").read_text("utf-8").splitlines()),
    "inspected": inspected,
}))
"""


def run(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a Python process."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Package -> its wheel, built from a copy: folders of earlier builds play no part."""
    home = tmp_path_factory.mktemp("wheels")
    built = {}
    for package, source in SOURCES.items():
        project, copy = source.parents[1], home / package
        ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
        shutil.copytree(project / "src", copy / "src", ignore=ignored)
        for name in ("pyproject.toml", "README.md"):
            shutil.copyfile(project / name, copy / name)
        run("-c", BUILD, home / "dist" / package, cwd=copy)
        (built[package],) = (home / "dist" / package).glob("*.whl")
    return built


@pytest.mark.parametrize("package", SOURCES)
def test_a_wheel_holds_the_files_of_its_package(wheels: dict[str, Path], package: str) -> None:
    source = SOURCES[package]
    expected = {
        path.relative_to(source.parent).as_posix()
        for path in source.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    names = set(zipfile.ZipFile(wheels[package]).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert f"{package}/py.typed" in names


def test_the_wheels_work_without_the_source_tree(wheels: dict[str, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    for wheel in wheels.values():
        zipfile.ZipFile(wheel).extractall(site)
    # -S: no .pth file puts the source folders of an editable install on the path.
    sources = {str(folder.parent) for folder in SOURCES.values()} | {str(ROOT), str(ROOT / "tests")}
    others = (folder for folder in sys.path if folder and folder not in sources)
    path = os.pathsep.join([str(site), *others])
    shown = json.loads(run("-S", "-c", USE, tmp_path / "tiny", cwd=tmp_path, PYTHONPATH=path))
    assert shown == {
        "from": [str(site)],
        "statuses": dict.fromkeys(("multimodal", "qwen35", "qwen36"), "loaded"),
        "presets": sorted(preset.id for preset in load_presets()),
        "skus": sorted(sku.id for sku in load_skus()),
        "rows": 21,
        "inspected": {"qwen3_5": ["3.5", []], "qwen3_5_moe": ["3.5", []]},
    }

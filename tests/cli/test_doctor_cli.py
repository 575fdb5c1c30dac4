"""``qcore doctor`` with checks of plugins."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cli_kit import here
from support.plugin_kit import good

from qcore.plugins.manager import Plugins
from qcore.testing import discover_plugins, write_distribution

FINDINGS = """
from qcore.api import Finding, Severity

@hookimpl
def qcore_doctor():
    yield Finding(code="TOY-001", severity=Severity.NOTE, what="has a cache")
    yield Finding(code="TOY-002", severity=Severity.WARNING, field="toy cache", what="is full")
"""


def test_a_finding_without_a_field_is_listed_under_its_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = good("toy") + FINDINGS
    write_distribution(tmp_path, "toy", module="toy_of_doctor", source=source, model_types=("toy",))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = discover_plugins(tmp_path)
    monkeypatch.setattr(Plugins, "discover", classmethod(lambda cls: plugins))
    ended = here(capsys, "doctor")
    assert (ended.code, ended.err) == (0, "")
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert "plugin toy has a cache" in lines
    assert "! toy cache is full" in lines
    rows = here(capsys, "doctor", "--json").json["findings"]
    subjects = {row["code"]: row["subject"] for row in rows}
    assert (subjects["TOY-001"], subjects["TOY-002"]) == ("plugin toy", "toy cache")

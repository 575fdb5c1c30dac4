"""Names of data-file entries are settled by one rule, whatever the entries are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from itertools import permutations
from pathlib import Path
from typing import ClassVar

import pytest

from qcore.config.expect import Contract, Expect
from qcore.config.registry import Kind, Registry, load
from qcore.errors import PluginError, UsageError

CONTRACT = Contract("QC-T-004", "breaks the contract")


@dataclass(frozen=True, kw_only=True)
class Tool:
    id: str
    aliases: tuple[str, ...]
    origin: str
    file: Path

    def names(self) -> tuple[str, ...]:
        return tuple(name.lower() for name in (self.id, *self.aliases))


KIND = Kind(
    noun="tool",
    group="tests.tools",
    folder="tools",
    field="NAME",
    listing="list them",
    unknown="QC-T-001",
    broken="QC-T-002",
    contested="QC-T-003",
    spellings=lambda name: (name.lower(),),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools(Registry[Tool]):
    kind: ClassVar[Kind] = KIND


def read_tools(file: Path, origin: str) -> Iterator[Tool]:
    for entry in Expect.of_file(file, CONTRACT).keys(("tools",))["tools"].items():
        fields = entry.keys(("id", "aliases"), optional=("aliases",))
        aliases = fields["aliases"].texts() if "aliases" in fields else ()
        yield Tool(id=fields["id"].text(), aliases=aliases, origin=origin, file=file)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Registries of core's text and of plugins' texts by name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(core: str = "tools: []", **plugins: str) -> Tools:
        own = tmp_path / "core.yaml"
        own.write_text(core)
        points = []
        for name, text in plugins.items():
            folder = tmp_path / f"tools_of_{name}" / "tools"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "a.yaml").write_text(text)
            points.append(EntryPoint(name=name, value=folder.parent.name, group=KIND.group))
        made = [
            Tools(**load(KIND, read_tools, own=[own], plugins=order)._asdict())
            for order in permutations(points)
        ]
        assert all(one == made[0] for one in made), "the order of discovery means nothing"
        return made[0]

    return make


def origins(registry: Tools) -> dict[str, str]:
    return {tool.id: tool.origin for tool in registry}


def test_a_name_of_core_stays_cores(tools) -> None:
    made = tools("tools: [{id: saw}]", one="tools: [{id: axe, aliases: [SAW]}, {id: file}]")
    assert origins(made) == {"saw": "core", "file": "one"}
    assert made.get("Saw").origin == "core"
    assert [broken.reason for broken in made.broken] == ["saw is already a tool of core"]
    with pytest.raises(PluginError, match="tool axe of one cannot be used: saw is") as caught:
        made.get("axe")
    assert caught.value.code == "QC-T-002"


def test_an_alias_of_two_plugins_means_neither_and_both_stay(tools) -> None:
    made = tools(one="tools: [{id: axe, aliases: [cut]}]", two="tools: [{id: saw, aliases: [cut]}]")
    assert origins(made) == {"axe": "one", "saw": "two"}
    assert made.claimed_twice == {"cut": ("one", "two")}
    assert made.find("cut") is None
    with pytest.raises(
        PluginError, match="two plugins bring tool cut: found one and two"
    ) as caught:
        made.get("cut")
    assert caught.value.code == "QC-T-003"


def test_an_id_of_two_plugins_drops_both(tools) -> None:
    made = tools(one="tools: [{id: axe, aliases: [cut]}]", two="tools: [{id: AXE}, {id: saw}]")
    assert origins(made) == {"saw": "two"}
    with pytest.raises(PluginError) as caught:
        made.get("axe")
    assert caught.value.code == "QC-T-003"
    with pytest.raises(PluginError, match="two plugins bring tool axe") as caught:
        made.get("cut")
    assert caught.value.code == "QC-T-002"


def test_within_one_plugin_the_first_keeps_its_names(tools) -> None:
    made = tools(one="tools: [{id: axe}, {id: axe}]")
    assert origins(made) == {"axe": "one"}
    assert [broken.reason for broken in made.broken] == ["axe is already a tool of one"]


@pytest.mark.parametrize(
    "text", ["tools: [{id: Axe, aliases: [cut], x: 1}]", "tools:\n- id: Axe\n]"]
)
def test_names_of_a_broken_file_are_known(tools, text: str) -> None:
    made = tools("tools: [{id: saw}]", one=text)
    assert origins(made) == {"saw": "core"}
    with pytest.raises(PluginError, match="of one cannot be used") as caught:
        made.get("AXE")
    assert caught.value.code == "QC-T-002"
    with pytest.raises(UsageError, match=r"unknown tool \(those of one could not be read\)") as two:
        made.get("sow")
    assert (two.value.code, two.value.fix) == ("QC-T-001", "did you mean saw?")


@pytest.mark.parametrize(
    ("text", "shape", "found"),
    [
        ("a: [1]", "text", "no text"),
        ("a: ''", "text", "no text"),
        ("a: b", "texts", "something else"),
        ("a: []", "texts", "something else"),
        ("a: b", "items", "something else"),
        ("a: b", "mapping", "something else"),
        ("a: 1.5", "integer", "'1.5'"),
        ("a: '1'", "integer", "'1'"),
        ("a: one", "number", "'one'"),
        ("a: yes", "boolean", "'yes'"),
        ("a: 1 May", "date", "'1 May'"),
    ],
)
def test_a_breach_names_the_place_and_what_was_expected(
    tmp_path: Path, text: str, shape: str, found: str
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    value = Expect.of_file(file, CONTRACT).mapping()["a"]
    with pytest.raises(UsageError) as caught:
        getattr(value, shape)()
    error = caught.value
    assert (error.code, error.file, error.field) == ("QC-T-004", str(file), "a")
    assert error.found == found
    assert error.expected

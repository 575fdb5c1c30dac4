"""Row formats of plugins: imported only when needed, contained, named where they fail."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from support.cli_kit import apart

from qcore.api.media import RowError
from qcore.data.formats import Formats, load_formats
from qcore.errors import InputError, PluginError
from qcore.testing import write_distribution

SOURCE = """
from qcore.api import DataFormat, RowError
from qcore.errors import InputError


def matches(row):
    {matches}


def convert(row):
    {convert}


FORMAT = DataFormat(name="{name}", matches=matches, convert=convert)
OTHER = 3
"""
GOOD = """return {"messages": [{"role": "user", "content": row["ask"]},
                             {"role": "assistant", "content": row["tell"]}]}"""
ROW = {"ask": "q", "tell": "a"}
QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Make formats of one distribution; every call needs a module name of its own."""
    count = 0

    def make(
        convert: str = GOOD, matches: str = 'return "ask" in row', *, name: str = "faq",
        value: str = "", requires: str = "qcore-framework", own: str = "", source: str = SOURCE,
    ) -> Formats:  # fmt: skip
        nonlocal count
        count += 1
        module = f"faq_{abs(hash(request.node.name)) % 10**8}_{count}"
        folder = tmp_path / module
        text = source.replace("{matches}", matches).replace("{convert}", convert)
        write_distribution(
            folder, "acme-faq", module=module, source=text.replace("{name}", own or name),
            entry_points=f"[qcore.data_formats]\n{name} = {value.format(module) or module}\n",
            requires=requires,
        )  # fmt: skip
        monkeypatch.syspath_prepend(str(folder))
        dists = metadata.distributions(path=[str(folder)])
        loaded = load_formats(point for dist in dists for point in dist.entry_points)
        assert module not in sys.modules
        return loaded

    return make


def refused(formats: Formats, row: Any, **more: Any) -> PluginError:
    with pytest.raises(PluginError) as caught:
        formats.read(row, **more)
    assert "'faq' of acme-faq 1.0" in caught.value.message
    assert caught.value.fix is not None
    assert "QCORE_DISABLE_PLUGINS=acme-faq" in caught.value.fix
    return caught.value


def test_a_plugins_format_reads_rows_that_core_does_not(formats: Any) -> None:
    made = formats()
    assert made.names[-1] == "faq"
    assert made.convert(ROW) == ("faq", {"messages": QA})
    assert made.convert({"messages": QA})[0] == "openai"


def test_a_forced_format_of_a_plugin_reads_rows_of_core_too(formats: Any) -> None:
    made = formats(convert='return {"messages": row["messages"][:1]}', matches="return False")
    assert made.convert({"messages": QA}, forced="faq") == ("faq", {"messages": QA[:1]})
    assert made.convert({"messages": QA})[0] == "openai"


def test_the_attribute_may_be_named(formats: Any) -> None:
    assert refused(formats(value="{}:OTHER"), ROW, forced="faq").code == "QC-PLUGIN-001"
    assert formats(value="{}:FORMAT").convert(ROW)[0] == "faq"


def test_a_row_error_is_the_rows(formats: Any) -> None:
    made = formats(convert='raise RowError("QC-DATA-006", "has no answer", at="tell")')
    with pytest.raises(RowError, match="has no answer"):
        made.read(ROW)
    made = formats(convert='raise InputError("QC-DATA-001", "cannot be read")')
    with pytest.raises(InputError):
        made.read(ROW)


@pytest.mark.parametrize(
    ("convert", "matches", "code", "says"),
    [
        ("1 / 0", "return True", "QC-PLUGIN-002", "failed in convert: found ZeroDivisionError"),
        ("import sys; sys.exit(3)", "return True", "QC-PLUGIN-002", "SystemExit"),
        (GOOD, "return row['x']", "QC-PLUGIN-002", "failed in matches: found KeyError"),
        (GOOD, 'raise RowError("QC-DATA-006", "x")', "QC-PLUGIN-002", "failed in matches"),
        ("return None", "return True", "QC-PLUGIN-003", "found NoneType"),
        ("return {'message': []}", "return True", "QC-PLUGIN-003", "found message"),
        ("return {'messages': 'x'}", "return True", "QC-PLUGIN-003", "canonical row"),
    ],
)
def test_a_failure_names_the_plugin(
    formats: Any, convert: str, matches: str, code: str, says: str
) -> None:
    error = refused(formats(convert, matches), ROW)
    assert error.code == code
    assert says in error.message


def test_a_broken_format_is_named_only_where_it_is_needed(formats: Any) -> None:
    for made in (
        formats(source="import nothing_of_this_name"),
        formats(own="other"),
        formats(value="no_such_module_here"),
        formats(requires="qcore-framework>=99"),
    ):
        assert made.convert({"messages": QA})[0] == "openai"
        with pytest.raises(RowError) as caught:
            made.read(ROW)
        assert caught.value.code == "QC-DATA-023"
        assert "row format 'faq' of acme-faq 1.0" in str(caught.value.found)
        assert refused(made, ROW, forced="faq").code == "QC-PLUGIN-001"


def test_a_disabled_format_is_not_there(formats: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "acme-faq")
    made = formats()
    assert "faq" not in made.names
    with pytest.raises(RowError) as caught:
        made.read(ROW)
    assert "faq" not in str(caught.value.found)


def test_a_name_of_core_stays_cores(formats: Any) -> None:
    made = formats(convert='return {"messages": []}', matches="return True", name="trl")
    assert made.convert({"prompt": "q", "completion": "a"}) == ("trl", {"messages": QA})
    assert made.names.count("trl") == 1


def test_the_example_of_the_page_reads_its_rows(formats: Any) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/plugins.md").read_text("utf-8")
    section = page.partition("### Row formats\n")[2]
    source = section.partition("```python\n")[2].partition("```")[0]
    made = formats(source=source)
    assert made.convert(ROW) == ("faq", {"messages": QA})
    with pytest.raises(RowError, match="has no answer"):
        made.read({"ask": "q"})


def test_plugins_list_shows_formats(tmp_path: Path) -> None:
    points = "[qcore.data_formats]\nfaq = acme_faq\ntrl = acme_faq\n"
    write_distribution(tmp_path, "acme-faq", module="acme_faq", entry_points=points)
    ended = apart("plugins", "list", "--json", env={"PYTHONPATH": str(tmp_path)})
    rows = json.loads(ended.out)["entry_points"]
    shown = {row["name"]: row for row in rows if row["group"] == "qcore.data_formats"}
    assert shown["faq"]["status"] == "available"
    assert (shown["trl"]["status"], shown["trl"]["reason"]) == (
        "invalid", "is a row format of core",
    )  # fmt: skip

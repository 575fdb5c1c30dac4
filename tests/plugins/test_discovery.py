"""Discovery by metadata: statuses, attribution, order; nothing imported, nothing raised."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.plugin_kit import good, process

from qcore.io.entry_points import _unmet
from qcore.testing import write_distribution

CANARY = "open({canary!r}, 'w').close()"


def test_discovery_imports_no_plugin_and_no_torch(tmp_path: Path) -> None:
    canary = tmp_path / "imported"
    write_distribution(
        tmp_path, "toy", module="toy_mod", source=CANARY.format(canary=str(canary)),
        model_types=("toy",),
    )  # fmt: skip
    seen = process(
        tmp_path,
        """
        status = statuses()["toy"]
        heavy = {"torch", "transformers", "peft", "pluggy", "jinja2", "yaml", "rich", "click"}
        show({"status": status, "mods": [m for m in ("toy_mod", *heavy) if m in sys.modules],
              "index": {k: [i.name for i in v] for k, v in plugins.model_types.items()}})
        """,
    )
    assert seen["status"] == ["available", None, "toy"]
    assert seen["mods"] == []
    assert seen["index"]["toy"] == ["toy"]
    assert not canary.exists()


def test_order_is_by_name_whatever_the_path_order(tmp_path: Path) -> None:
    for name in ("zeta", "alpha", "mid"):
        write_distribution(tmp_path, f"dist-{name}", module=f"mod_{name}", plugin=name)
    assert [
        name
        for name in process(tmp_path, "show([i.name for i in plugins.infos])")
        if name in ("zeta", "alpha", "mid")
    ] == ["alpha", "mid", "zeta"]


@pytest.mark.parametrize(
    ("requires", "status", "reason"),
    [
        ("qcore-framework>=0.1,<0.2", "available", None),
        ("qcore_framework (>=0.1)", "available", None),
        ("QCore.Framework>=0.1 ; python_version >= '3'", "available", None),
        ("qcore-framework>=9 ; python_version < '3'", "available", None),
        ("qcore-framework>=9 ; extra == 'new'", "available", None),
        ("qcore-framework>=9", "incompatible", "requires qcore-framework>=9, installed is"),
        ("qcore-framework<0.1", "incompatible", "requires qcore-framework<0.1"),
        ("qcore-framework>>nine", "invalid", "does not parse: InvalidRequirement"),
        (None, "available", "does not say which qcore-framework it needs"),
        ("qcore-framework-extras>=9", "available", "does not say which"),
    ],
)
def test_version_gate(
    tmp_path: Path, requires: str | None, status: str, reason: str | None
) -> None:
    write_distribution(tmp_path, "toy", module="toy_mod", requires=requires)
    found = process(tmp_path, "show(statuses())")["toy"]
    assert found[0] == status
    assert (reason in found[1]) if reason else found[1] is None


def test_a_development_version_of_the_framework_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcore.io.version.__version__", "0.1.1.dev0")
    assert _unmet(["qcore-framework>=0.1,<0.2"]) is None
    assert _unmet(["qcore-framework<0.1"]) is not None


def test_two_plugins_of_one_name_are_both_listed_and_neither_imported(tmp_path: Path) -> None:
    write_distribution(tmp_path, "first", module="mod_a", plugin="toy", source="raise SystemExit")
    write_distribution(tmp_path, "second", module="mod_b", plugin="toy", source="raise SystemExit")
    code = """
        plugins.load_all()
        show([[i.distribution, i.status.value, i.reason] for i in plugins.infos if i.name == "toy"])
    """
    assert process(tmp_path, code) == [
        ["first", "duplicate", "name 'toy' is also that of plugin 'toy' (second 1.0)"],
        ["second", "duplicate", "name 'toy' is also that of plugin 'toy' (first 1.0)"],
    ]
    # Leaving one out by its distribution settles it.
    found = process(tmp_path, code, QCORE_DISABLE_PLUGINS="second")
    assert [status for _, status, _ in found] == ["broken", "disabled"]


def test_one_module_under_two_names_is_a_duplicate(tmp_path: Path) -> None:
    write_distribution(tmp_path, "first", module="mod_a", plugin="a", source=good("toy"))
    write_distribution(tmp_path, "second", module="mod_a", plugin="b")
    found = process(tmp_path, "show(statuses())")
    assert (found["a"][0], found["b"][0]) == ("duplicate", "duplicate")
    assert "module 'mod_a' is also that of plugin 'b' (second 1.0)" in found["a"][1]


def test_disabled_plugins_are_not_imported_and_do_not_stop_a_verb(tmp_path: Path) -> None:
    write_distribution(
        tmp_path, "toy", module="toy_mod", source="raise SystemExit", model_types=("toy",)
    )
    found = process(
        tmp_path,
        """
        scope = plugins.for_model_type("toy")
        show([statuses()["toy"], scope.ask("qcore_doctor"), "toy_mod" in sys.modules])
        """,
        QCORE_DISABLE_PLUGINS=" other, TOY ",
    )
    assert found == [["disabled", "named in QCORE_DISABLE_PLUGINS", "toy"], [], False]


@pytest.mark.parametrize(
    ("entry_points", "status", "reason"),
    [
        ("[qcore.plugins]\ntoy = toy_mod:attr\n", "invalid", "'toy_mod:attr' is not a module"),
        ("[qcore.plugins]\ntoy = not a module\n", "invalid", "is not a module"),
        ("[qcore.plugins]\ntoy\n", "broken", "entry_points.txt cannot be read"),
        (
            "[qcore.model_types]\ntoy = elsewhere\n",
            "invalid",
            "qcore.model_types names module 'elsewhere', which is no plugin of its distribution",
        ),
    ],
)
def test_bad_entry_points_are_named(
    tmp_path: Path, entry_points: str, status: str, reason: str
) -> None:
    write_distribution(tmp_path, "toy", module="toy_mod", entry_points=entry_points)
    write_distribution(
        tmp_path, "fine", module="fine_mod", source=good("fine"), model_types=("fine",)
    )
    found = process(tmp_path, "plugins.load_all(); show(statuses())")
    assert found["toy"][0] == status
    assert reason in found["toy"][1]
    assert found["fine"][0] == "loaded"


def test_an_unreadable_foreign_distribution_is_passed_over(tmp_path: Path) -> None:
    write_distribution(tmp_path, "other", module="m", entry_points="[console_scripts]\nbroken\n")
    write_distribution(
        tmp_path, "fine", module="fine_mod", source=good("fine"), model_types=("fine",)
    )
    found = process(tmp_path, "show(statuses())")
    assert "other" not in found
    assert found["fine"][0] == "available"


def test_a_squatter_cannot_index_a_type_with_anothers_module(tmp_path: Path) -> None:
    write_distribution(
        tmp_path, "fine", module="fine_mod", source=good("fine"), model_types=("fine",)
    )
    write_distribution(
        tmp_path, "squat", module="x", entry_points="[qcore.model_types]\nother = fine_mod\n"
    )
    found = process(
        tmp_path,
        """
        show([error_of(lambda: plugins.for_model_type("other")),
              error_of(lambda: plugins.for_model_type("fine"))])
        """,
    )
    assert found[0]["code"] == "QC-PLUGIN-001"
    assert "plugin 'other' (squat 1.0)" in found[0]["message"]
    assert found[1] is None


def test_missing_metadata_raises_nothing(tmp_path: Path) -> None:
    write_distribution(tmp_path, "toy", module="toy_mod", source=good("toy"), model_types=("toy",))
    next(tmp_path.glob("*.dist-info/METADATA")).unlink()
    assert process(tmp_path, "plugins.load_all(); show(statuses())")["toy"][0] == "loaded"


def test_entry_points_may_be_handed_in() -> None:
    from importlib.metadata import EntryPoint

    from qcore.plugins.manager import Plugins

    points = [
        EntryPoint("toy", "nowhere_to_be_found", "qcore.plugins"),
        EntryPoint("ignored", "x", "console_scripts"),
    ]
    plugins = Plugins.discover(points)
    assert [(i.name, i.status.value) for i in plugins.infos] == [("toy", "available")]
    (info,) = plugins.load_all().infos
    assert info.status.value == "broken"
    assert "nowhere_to_be_found" in (info.reason or "")

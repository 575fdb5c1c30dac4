"""Entry points of all groups: listed without an import, disabled, gated and contained alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.plugin_kit import process

from qcore.io.entry_points import GROUPS, INDEX, PLUGINS
from qcore.testing import write_distribution

OTHERS = [group for group in GROUPS if group not in (PLUGINS, INDEX)]
LISTING = """
    from qcore.io.entry_points import GROUPS, entries
    def listed(group, **how):
        return {e.name: [e.status.value, e.reason] for e in entries(group, **how)
                if e.identity.distribution.startswith("toy")}
"""


def written(folder: Path, name: str = "toy-dist", **more: Any) -> None:
    """A distribution with one entry point in every group; importing its module fails."""
    points = "[qcore.plugins]\ntoy = toy_mod\n"
    points += "".join(f"[{group}]\nthing = toy_mod\n" for group in OTHERS)
    write_distribution(
        folder, name, module="toy_mod", source="raise SystemExit", entry_points=points, **more
    )


@pytest.mark.parametrize(
    ("requires", "status", "reason"),
    [
        ("qcore-framework>=0.1,<0.2", "available", None),
        ("qcore-framework>=9", "incompatible", "requires qcore-framework>=9, installed is"),
        ("qcore-framework>>nine", "invalid", "does not parse: InvalidRequirement"),
        (None, "available", "does not say which qcore-framework it needs"),
    ],
)
def test_the_version_gate_is_that_of_plugins(
    tmp_path: Path, requires: str | None, status: str, reason: str | None
) -> None:
    written(tmp_path, requires=requires)
    found = process(
        tmp_path,
        LISTING
        + f"""
    show({{g: listed(g)["thing"] for g in {OTHERS!r}}} | {{"plugin": statuses()["toy"][:2]}})
    """,
    )
    assert set(found) == {*OTHERS, "plugin"}
    for group, (got, why) in found.items():
        assert got == status, group
        assert (reason in why) if reason else why is None


@pytest.mark.parametrize("named", ["toy-dist", "TOY_dist", "toy", "thing"])
def test_all_groups_obey_the_list_of_disabled_plugins(tmp_path: Path, named: str) -> None:
    """By the distribution, by its plugin, or by the entry point's own name."""
    written(tmp_path)
    code = LISTING + f"    show([listed(g)['thing'][0] for g in {OTHERS!r}])"
    assert process(tmp_path, code, QCORE_DISABLE_PLUGINS=named) == ["disabled"] * len(OTHERS)
    assert process(tmp_path, code, QCORE_DISABLE_PLUGINS="other") == ["available"] * len(OTHERS)


def test_a_name_of_two_distributions_is_used_by_neither_where_it_names_one_thing(
    tmp_path: Path,
) -> None:
    written(tmp_path)
    written(tmp_path, "toy-twin")
    found = process(
        tmp_path,
        LISTING + f"    show({{g: [e.status.value for e in entries(g) if e.name == 'thing']"
        f" for g in {OTHERS!r}}})",
    )
    data = ("qcore.presets", "qcore.skus", "qcore.media_kinds")
    for group, statuses in found.items():
        assert statuses == ["available" if group in data else "duplicate"] * 2, group


def test_a_distribution_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    written(tmp_path)
    write_distribution(tmp_path, "broken", module="m", entry_points="[qcore.presets]\nbroken\n")
    code = LISTING + f"    show([listed(g)['thing'][0] for g in {OTHERS!r}])"
    assert process(tmp_path, code) == ["available"] * len(OTHERS)


def test_presets_of_an_incompatible_distribution_are_refused_and_those_of_a_disabled_one_absent(
    tmp_path: Path,
) -> None:
    points = "[qcore.presets]\ntoy = toy_package\n"
    write_distribution(tmp_path, "toy-dist", module="toy_package", entry_points=points,
                       requires="qcore-framework>=9")  # fmt: skip
    code = """
        from qcore.config.presets import load_presets
        show([b.reason for b in load_presets().broken if b.origin == "toy"])
    """
    (reason,) = process(tmp_path, code)
    assert "requires qcore-framework>=9" in reason
    assert process(tmp_path, code, QCORE_DISABLE_PLUGINS="toy") == []


def test_a_command_that_may_not_be_used_is_refused_with_its_reason(tmp_path: Path) -> None:
    for name in ("toy-a", "toy-b"):
        write_distribution(tmp_path, name, module="toy_mod", entry_points="[qcore.commands]\n"
                           f"{name} = toy_mod:command\ntwice = toy_mod:command\n",
                           requires="qcore-framework>=9" if name == "toy-a" else None)  # fmt: skip
    code = """
        from qcore.cli.main import cli
        show([error_of(lambda: cli.get_command(None, name)) for name in ("toy-a", "toy-b", "twice")]
             + [name for name in cli.list_commands(None) if name in ("toy-a", "toy-b", "twice")])
    """
    gated, disabled, twice, *listed = process(tmp_path, code, QCORE_DISABLE_PLUGINS="toy-b")
    assert {error["code"] for error in (gated, disabled, twice)} == {"QC-PLUGIN-020"}
    assert "plugin command 'toy-a' (toy-a 1.0) is incompatible" in gated["message"]
    assert "found requires qcore-framework>=9" in gated["message"]
    assert "plugin command 'toy-b' (toy-b 1.0) is disabled" in disabled["message"]
    assert listed == ["toy-a", "twice"], "--help does not pay for the version gate"

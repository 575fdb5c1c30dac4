"""No modules import each other in a circle, in any distribution; type-only imports count."""

from __future__ import annotations

from support.imports import SOURCES, circles, imports


def test_no_import_circle() -> None:
    found = {name: circles(imports(folder, name)) for name, folder in SOURCES.items()}
    assert {name: some for name, some in found.items() if some} == {}


def test_the_check_sees_a_circle() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}}
    assert circles(graph) == [["a", "b", "c"]]
    assert circles({"a": {"a"}}) == [["a"]]

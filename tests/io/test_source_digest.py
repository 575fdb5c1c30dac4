"""The digest of a package's code: it changes with every file, and nothing is imported for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qcore.io.source_digest import package_digest


def test_the_digest_is_of_names_and_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "digested_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError")
    (package / "inner/one.py").write_text("a = 1")
    (tmp_path / "digested_module.py").write_text("raise RuntimeError")

    def digest(name: str = "digested_package") -> str | None:
        package_digest.cache_clear()
        return package_digest(name)

    seen = [digest()]
    (package / "inner/one.py").write_text("a = 2")
    seen.append(digest())
    (package / "inner/one.py").rename(package / "inner/two.py")
    seen.append(digest())
    (package / "notes.txt").write_text("not code")
    assert digest() == seen[-1]
    assert len({*seen}) == 3
    assert None not in seen
    assert digest("digested_module") is not None
    assert not {"digested_package", "digested_module"} & sys.modules.keys()
    assert [digest(name) for name in ("__main__", "no_such_package", "sys")] == [None] * 3

"""Rules of the trust boundary that a reader cannot see in one file."""

from __future__ import annotations

import ast
from pathlib import Path

import qcore

CORE = Path(qcore.__file__).parent


def _broad(tree: ast.AST) -> list[int]:
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
            broad = node.type is None or names & {"Exception", "BaseException"}
            if broad and not (_only_the_bare_class(node) or _raises_again(node)):
                lines.append(node.lineno)
    return lines


def _only_the_bare_class(handler: ast.ExceptHandler) -> bool:
    """``if type(error) is not Exception: raise`` first: for libraries that raise that class."""
    first = handler.body[0]
    return (
        isinstance(first, ast.If)
        and ast.unparse(first.test) == f"type({handler.name}) is not Exception"
        and ast.unparse(first.body) == "raise"
    )


def _raises_again(handler: ast.ExceptHandler) -> bool:
    """The handler cleans up, and its last statement is ``raise``."""
    return ast.unparse(handler.body[-1]) == "raise"


def test_the_check_sees_broad_handlers() -> None:
    for clause in ("except:", "except Exception:", "except (ValueError, BaseException) as e:"):
        assert _broad(ast.parse(f"try:\n    pass\n{clause}\n    pass\n")) == [3]
    narrow = "except Exception as e:\n    if type(e) is not Exception:\n        raise\n    pass\n"
    assert _broad(ast.parse(f"try:\n    pass\n{narrow}")) == []
    assert _broad(ast.parse("try:\n    pass\nexcept BaseException:\n    f()\n    raise\n")) == []
    assert _broad(ast.parse("try:\n    pass\nexcept BaseException:\n    raise X\n")) == [3]
    assert _broad(ast.parse("try:\n    pass\nexcept ValueError:\n    pass\n")) == []


def test_broad_except_stands_in_contained_only() -> None:
    found = {
        path.relative_to(CORE).as_posix()
        for path in CORE.rglob("*.py")
        if _broad(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == {"errors.py"}


def test_core_names_no_model() -> None:
    word = "qwen"
    found = [
        path.relative_to(CORE).as_posix()
        for path in CORE.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and (
            word in path.name.lower()
            or word in path.read_text(encoding="utf-8", errors="replace").lower()
        )
    ]
    assert found == []


def test_hooks_are_called_by_ask_alone() -> None:
    """No module reaches for ``manager.hook`` or asks for the first result."""
    for path in CORE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "load_setuptools_entrypoints" not in text, path
        assert "firstresult" not in text, path
        if path.name != "plugins.py":
            assert ".hook." not in text, path

"""Nothing in core or plugin opens a pickle, runs a checkpoint's code, or evaluates text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path for folder in ("core/src", "qwen35_plugin/src") for path in (ROOT / folder).rglob("*.py")
)
MODULES = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__"}
#: Names of transformers and torch that read pickles, run code that lies beside the weights, choose
#: classes by what lies there, or write a checkpoint by way of a model class.
NAMES = {
    "AutoTokenizer", "AutoModel", "AutoModelForCausalLM", "AutoConfig", "AutoProcessor",
    "from_pretrained", "save_pretrained", "trust_remote_code", "apply_chat_template",
}  # fmt: skip
TORCH = {"load", "save", "compile_pickle"}
#: `qcore verify --against stock` asks transformers itself, which is its purpose. Its files may say
#: these words and no others: weights are read from safetensors alone, and a folder that names code
#: of its own is refused before transformers sees it (tests/merging/test_against_stock.py).
#: Messages of rows pass between qcore's own processes and are never a file.
ALLOWED = {
    "core/src/qcore/merging/stock_class.py": {"AutoConfig", "from_pretrained"},
    "core/src/qcore/merging/stock_model.py": {"from_pretrained"},
    "core/src/qcore/merging/stock_prompts.py": {
        "AutoTokenizer", "apply_chat_template", "from_pretrained",
    },
    "core/src/qcore/data/rendering/row_messages.py": {"pickle"},
}  # fmt: skip


def offences(tree: ast.AST) -> Iterator[str]:
    """What a module must not say, with its line."""
    for node in ast.walk(tree):
        said: set[str] = set()
        if isinstance(node, ast.Import):
            said = {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            said = {(node.module or "").split(".")[0]} & MODULES
            said |= {alias.name for alias in node.names} & NAMES
            if node.module == "torch":
                said |= {alias.name for alias in node.names} & TORCH
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            said = {node.func.id} & CALLS
        elif isinstance(node, ast.Attribute):
            said = {node.attr} & NAMES
            if isinstance(node.value, ast.Name) and node.value.id == "torch":
                said |= {node.attr} & TORCH
        elif isinstance(node, ast.Name):
            said = {node.id} & NAMES
        elif isinstance(node, ast.keyword):
            said = {str(node.arg)} & NAMES
        for word in said:
            yield f"line {getattr(node, 'lineno', '?')}: {word}"


def test_no_way_to_run_what_was_downloaded() -> None:
    assert len(FILES) > 150
    hits: dict[str, list[str]] = {}
    for path in FILES:
        name = str(path.relative_to(ROOT))
        lines = list(offences(ast.parse(path.read_text(encoding="utf-8"))))
        allowed = ALLOWED.get(name, set())
        assert allowed <= {line.rpartition(" ")[2] for line in lines}, "allowed and not said"
        hits[name] = [line for line in lines if line.rpartition(" ")[2] not in allowed]
    assert {name: lines for name, lines in hits.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec(text)",
        "model.save_pretrained(folder)",
        "f(trust_remote_code=True)",
        "from transformers import AutoTokenizer",
        "transformers.AutoConfig.register('x', y)",
    ],
)
def test_each_would_be_seen(text: str) -> None:
    assert list(offences(ast.parse(text)))


def test_words_in_comments_and_methods_of_that_name_are_no_offence() -> None:
    assert not list(offences(ast.parse('"""Not AutoTokenizer."""\nmodel.eval()\nre.compile("x")')))

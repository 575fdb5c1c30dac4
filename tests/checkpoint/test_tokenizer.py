"""A tokenizer.json that the tokenizers library refuses is one error, however the library fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.e2e_kit import tiny_folder

from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.tokenizer import load_tokenizer
from qcore.errors import InputError


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"model": None}, id="raises"),
        # Its Rust code slices a token at the length of the prefix, and panics.
        pytest.param({"model": {"continuing_subword_prefix": "q_proj"}}, id="panics"),
    ],
)
def test_a_file_that_cannot_be_loaded(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = shutil.copytree(tiny_folder(), tmp_path / "model")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(InputError) as error:
        load_tokenizer(Checkpoint.open_files(folder))
    assert error.value.code == "QC-TOKENIZER-001"
    assert error.value.file == str(path)

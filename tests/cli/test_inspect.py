"""What inspect shows of a checkpoint that cannot be used as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cli_kit import here
from support.model_kit import small_config, small_shapes

from qcore.errors import InputError
from qcore.plugins import resolve_model
from qcore.testing import write_sparse_checkpoint


def test_a_refused_format_is_no_difference_of_a_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its code: it is reported once, as the error."""

    def refuse(checkpoint: object) -> None:
        raise InputError("QC-CKPT-999", "is refused")

    monkeypatch.setattr(resolve_model, "detect_quantization", refuse)
    folder = write_sparse_checkpoint(tmp_path, small_config(), small_shapes())
    ended = here(capsys, "inspect", folder, "--json")
    assert ended.code == 65
    assert ended.json["error"]["code"] == "QC-CKPT-999"
    assert (ended.json["unaccounted"], ended.json["differences"]) == ([], [])

"""A run and its data files: kept tokens, and files that change while a run trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.e2e_kit import write_stock
from support.sinks import Heard

import qcore.data.dataset
from qcore.config.settings import Settings
from qcore.errors import InputError
from qcore.io.artifact import read_manifest, verify
from qcore.reporting import Step
from qcore.training.train import train

FAST: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "r": 4,
    "lora_alpha": 8, "learning_rate": 5e-3, "dtype": "fp32", "quantization": "none",
    "save_steps": 0, "gradient_checkpointing": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("small"), "vl", dtype=torch.bfloat16)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of kept tokens."""
    monkeypatch.setenv("QCORE_DATA_CACHE", str(tmp_path / "kept"))
    monkeypatch.delenv("QCORE_DATA_CACHE_GB")
    return tmp_path / "kept"


def run(model: Path, rows: Path, output: Path, heard: Heard | None = None, **more: Any) -> Any:
    settings = Settings(**(FAST | more.pop("settings", {})))
    reporter = heard and heard.reporter
    return train(str(model), rows, output, settings, device="cpu", reporter=reporter, **more)


def raw(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_data_file_that_changes_during_a_run(
    small: Path, rows: Path, tmp_path: Path, kept: Path
) -> None:
    data = Path(shutil.copy(rows, tmp_path / "rows.jsonl"))
    content = data.read_bytes()
    run(small, data, tmp_path / "whole")
    heard = Heard(at=1, do=lambda: data.write_bytes(content + b"\n"))
    with pytest.raises(InputError, match="changed after its rows were read") as caught:
        run(small, data, tmp_path / "out", heard)
    assert (caught.value.code, caught.value.file) == ("QC-DATA-081", str(data))
    assert "--resume" in str(caught.value.fix)
    assert not (tmp_path / "out").exists()
    assert verify(tmp_path / "out.run" / "checkpoint-2").ok
    data.write_bytes(content)
    report = run(small, data, tmp_path / "out", resume=True)
    assert report.steps == 2
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")
    first, again = (read_manifest(tmp_path / name).meta for name in ("whole", "out"))
    assert first["data"] == again["data"]
    assert first["result"]["last_loss"] == again["result"]["last_loss"]
    assert len([path for path in kept.iterdir() if path.name[0] != "."]) == 1


@pytest.mark.slow
def test_a_second_run_is_the_same_run(
    small: Path, rows: Path, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"settings": {"max_steps": 12, "eval_fraction": 0.25}}
    one, two = Heard(), Heard()
    run(small, rows, tmp_path / "one", one, **settings)
    monkeypatch.setattr(qcore.data.dataset, "Renderer", None)
    run(small, rows, tmp_path / "two", two, verify_data=True, **settings)
    assert raw(tmp_path / "one") == raw(tmp_path / "two")
    losses = [[e.loss for e in heard.events if isinstance(e, Step)] for heard in (one, two)]
    assert losses[0] == losses[1]
    assert kept.is_dir()

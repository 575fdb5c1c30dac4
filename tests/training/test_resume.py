"""A run that was stopped goes on to the same bytes, or is refused by name."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.e2e_kit import command, resave, signalled, tiny_folder
from support.faults import Faults, count
from support.run_kit import SHORT, raw, start, stop_at, words
from support.sinks import Heard
from support.tiers import fast

from qcore.errors import InputError, Interrupted, QcoreError, UsageError, WriteError
from qcore.io.artifact import MANIFEST, read_manifest, verify

pytestmark = pytest.mark.usefixtures("one_thread")
BASE: dict[str, Any] = SHORT | {
    "max_steps": 10, "learning_rate": 5e-3, "chat_template_kwargs": {"enable_thinking": True},
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "lora_dropout": 0.2, "eval_fraction": 0.25, "eval_steps": 3, "dtype": "bf16",
        "gradient_accumulation_steps": 2, "weight_decay": 0.1, "save_steps": 4,
    },
    "16 bit, over an epoch's end": {
        "quantization": "none", "per_device_train_batch_size": 5, "warmup_ratio": 0.5,
        "gradient_checkpointing": False,
    },
}  # fmt: skip


def run(
    rows: Path, output: Path, *, model: Path | None = None, resume: bool = False, **settings: Any
) -> None:
    start(model or tiny_folder(), rows, output, BASE | settings, resume=resume)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows less what a clock or the process says."""
    measured = ("seconds", "tokens_per_second", "memory_gb")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in row if key not in measured} for row in lines]


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`stop_at` for this test; the last call counts."""
    return partial(stop_at, monkeypatch)


# -- the same bytes


@pytest.mark.parametrize("recipe", fast(RECIPES, "plain"))
def test_stopped_at_step_7(
    rows: Path, tmp_path: Path, stop: Callable[..., None], recipe: str
) -> None:
    options = RECIPES[recipe]
    run(rows, tmp_path / "whole", **options)
    stop(7)
    with pytest.raises(Interrupted, match="SIGTERM after step 7 of 10") as error:
        run(rows, tmp_path / "out", **options)
    assert error.value.exit_code == 75
    assert not (tmp_path / "out").exists()
    assert verify(tmp_path / "out.run" / "checkpoint-7").ok
    stop(99)
    run(rows, tmp_path / "out", resume=True, **options)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_stopped_at_every_step(rows: Path, tmp_path: Path, stop: Callable[..., None]) -> None:
    """One run, stopped after each of its steps: it ends where the uninterrupted one does."""
    options: dict[str, Any] = {"max_steps": 4, "lora_dropout": 0.1, "save_total_limit": 1}
    run(rows, tmp_path / "whole", **options)
    for at in range(1, 4):
        stop(at)
        with pytest.raises(Interrupted):
            run(rows, tmp_path / "out", resume=at > 1, **options)
        # The one before stays until a step after the newest has a finite loss.
        assert folders(tmp_path / "out.run") == [f"checkpoint-{n}" for n in (at - 1, at) if n]
    run(rows, tmp_path / "out", resume=True, **options)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")


def arguments(rows: Path, output: Path, *more: str, **settings: Any) -> list[object]:
    return [*words(tiny_folder(), rows, output, BASE | settings), *more]


@pytest.mark.slow
def test_the_command_line_stopped_and_killed(rows: Path, tmp_path: Path) -> None:
    whole = command(*arguments(rows, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "out"
    stopped = signalled(7, signal.SIGINT, *arguments(rows, out))
    assert stopped.returncode == 75, stopped.stderr
    last = stopped.stderr.strip().splitlines()[-1]
    assert last.startswith("error[QC-TRAIN-006]")
    assert "--resume" in last
    assert "Traceback" not in stopped.stderr
    again = command(*arguments(rows, out, "--resume"))
    assert again.returncode == 0, again.stderr
    assert raw(out) == raw(tmp_path / "whole")

    killed = tmp_path / "killed"
    ended = signalled(8, signal.SIGKILL, *arguments(rows, killed, save_steps=3))
    assert ended.returncode == -signal.SIGKILL
    assert folders(tmp_path / "killed.run") == ["checkpoint-3", "checkpoint-6"]
    assert not killed.exists()
    again = command(*arguments(rows, killed, "--resume", save_steps=3))
    assert again.returncode == 0, again.stderr
    assert raw(killed) == raw(tmp_path / "whole")
    assert metrics(killed) == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_is_full_while_a_checkpoint_is_written(rows: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2}
    calls = count(lambda: run(rows, tmp_path / "whole", **options))
    assert calls > 20
    seen = set()
    for n, at in enumerate(range(calls // 8, calls, calls // 4)):
        out = tmp_path / f"out{n}"
        with Faults(at=at, action=errno.ENOSPC, onwards=True), pytest.raises(WriteError) as error:
            run(rows, out, **options)
        assert error.value.exit_code == 73
        assert not out.exists()
        left = tmp_path / f"out{n}.run"  # stays where nothing can be deleted either
        seen.add(any(left.glob("checkpoint-*")))
        run(rows, out, resume=left.is_dir(), **options)
        assert raw(out) == raw(tmp_path / "whole")
    assert seen == {True, False}  # before the first checkpoint, and after it


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    rows: Path, tmp_path: Path, stop: Callable[..., None]
) -> None:
    run(rows, tmp_path / "whole", max_steps=5, save_steps=2)
    stop(4)
    with pytest.raises(Interrupted):
        run(rows, tmp_path / "out", max_steps=5, save_steps=2)
    stop(99)
    path = tmp_path / "out.run" / "checkpoint-4" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    run(rows, tmp_path / "out", max_steps=5, save_steps=2, resume=True)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")


@pytest.mark.slow
def test_only_the_newest_checkpoints_are_kept(
    rows: Path, tmp_path: Path, stop: Callable[..., None]
) -> None:
    stop(7)
    with pytest.raises(Interrupted):
        run(rows, tmp_path / "out", save_steps=2, save_total_limit=2)
    assert folders(tmp_path / "out.run") == ["checkpoint-6", "checkpoint-7"]
    for name in ("checkpoint-6", "checkpoint-7"):
        assert verify(tmp_path / "out.run" / name).ok


# -- another run under the same name


@pytest.fixture(scope="module")
def halted(rows: Path, once: Callable[..., Path]) -> Path:
    """A folder with base, data and a run that was stopped after its first step."""

    def write(home: Path) -> None:
        shutil.copytree(tiny_folder(), home / "base")
        shutil.copyfile(rows, home / "rows.jsonl")
        run(home / "rows.jsonl", home / "out", model=home / "base", save_steps=1, max_steps=2)
        shutil.rmtree(home / "out")  # as if it had been stopped before its last step

    return once("halted-run", write)


def change_rows(home: Path) -> None:
    lines = (home / "rows.jsonl").read_text().splitlines(keepends=True)
    (home / "rows.jsonl").write_text("".join([*lines[1:], lines[0]]))


def change_base(home: Path) -> None:
    tensors = load_file(home / "base" / "model.safetensors")
    tensors["model.language_model.layers.3.self_attn.k_norm.weight"][7] += 0.5
    resave(home / "base", tensors)


def change_template(home: Path) -> None:
    path = home / "base" / "chat_template.jinja"
    path.write_text(path.read_text() + "{#- the same text, another template -#}\n")


def change_config(home: Path) -> None:
    """No tensor and no token depends on it; each layer computes other numbers."""
    path = home / "base" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    path.write_text(json.dumps(config))


def change_unused_token(home: Path) -> None:
    """A row becomes the same ids; the adapter folder gets another tokenizer."""
    path = home / "base" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))


def add_processor(home: Path) -> None:
    (home / "base" / "preprocessor_config.json").write_text("{}")


def change_tokenizer(home: Path) -> None:
    """The same tokens, other merges: a row becomes other ids."""
    path = home / "base" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:10]
    path.write_text(json.dumps(tokenizer))


CHANGES: dict[str, tuple[Callable[[Path], object] | None, dict[str, Any], str]] = {
    "data": (change_rows, {}, "data"),
    "base": (change_base, {}, "base.text"),
    "template": (change_template, {}, "template"),
    "config.json": (change_config, {}, "config.text_config.rms_norm_eps"),
    "tokenizer": (change_tokenizer, {}, "files.tokenizer.json"),
    "tokenizer config": (change_unused_token, {}, "files.tokenizer_config.json"),
    "processor": (add_processor, {}, "files.preprocessor_config.json"),
    "learning rate": (None, {"learning_rate": 4e-3}, "settings.learning_rate"),
    "length of the run": (None, {"max_steps": 3}, "settings.max_steps"),
    "seed": (None, {"seed": 1}, "settings.seed"),
    "rank": (None, {"r": 8}, "settings.r"),
    "groups": (None, {"target_groups": ("attn",)}, "settings.target_groups"),
    "dtype": (None, {"dtype": "bf16"}, "settings.dtype"),
    "storage": (None, {"quantization": "none"}, "settings.quantization"),
    "template variable gone": (
        None,
        {"chat_template_kwargs": {}},
        "settings.chat_template_kwargs.enable_thinking",
    ),
}


@pytest.mark.parametrize("changed", fast(CHANGES, *[*CHANGES][::4]))
def test_what_changed_is_named(halted: Path, tmp_path: Path, changed: str) -> None:
    home = shutil.copytree(halted, tmp_path / "home")
    edit, settings, field = CHANGES[changed]
    if edit is not None:
        edit(home)
    options = {"save_steps": 1, "max_steps": 2} | settings
    with pytest.raises(InputError) as error:
        run(home / "rows.jsonl", home / "out", model=home / "base", resume=True, **options)
    assert (error.value.code, error.value.field) == ("QC-RESUME-002", field), error.value
    assert error.value.exit_code == 65
    assert not (home / "out").exists()
    assert folders(home / "out.run") == ["checkpoint-1"]


def test_rows_that_were_not_evaluated_before_are_named(halted: Path, tmp_path: Path) -> None:
    home = shutil.copytree(halted, tmp_path / "home")
    shutil.copyfile(home / "rows.jsonl", home / "held-out.jsonl")
    with pytest.raises(InputError) as error:
        start(
            home / "base", home / "rows.jsonl", home / "out",
            BASE | {"save_steps": 1, "max_steps": 2}, resume=True,
            eval_data=[home / "held-out.jsonl"],
        )  # fmt: skip
    assert (error.value.code, error.value.field) == ("QC-RESUME-002", "eval_data")
    assert error.value.expected == "unset"


def test_nothing_changed(halted: Path, tmp_path: Path) -> None:
    home = shutil.copytree(halted, tmp_path / "home")
    run(home / "rows.jsonl", home / "out", model=home / "base", resume=True, save_steps=1,
        max_steps=2)  # fmt: skip
    assert verify(home / "out").ok


@pytest.mark.parametrize(
    ("resume", "code"), [(False, "QC-RESUME-003"), (True, "QC-RESUME-001")], ids=["new", "resume"]
)
def test_a_run_that_is_there_and_one_that_is_not(
    halted: Path, tmp_path: Path, resume: bool, code: str
) -> None:
    home = shutil.copytree(halted, tmp_path / "home")
    output = home / ("other" if resume else "out")
    before = sorted(home.rglob("*"))
    with pytest.raises(UsageError) as error:
        run(home / "rows.jsonl", output, model=home / "base", resume=resume)
    assert error.value.code == code
    assert isinstance(error.value, QcoreError)
    assert sorted(home.rglob("*")) == before


def test_a_wrong_setting_goes_before_a_run_that_is_there(halted: Path, tmp_path: Path) -> None:
    """The fix of the second deletes checkpoints, which a typing error must not ask for."""
    home = shutil.copytree(halted, tmp_path / "home")
    with pytest.raises(QcoreError) as error:
        run(home / "rows.jsonl", home / "out", model=home / "base", target_groups=("atn",))
    assert error.value.code == "QC-LORA-001"


def test_a_plugin_whose_code_changed_is_named(
    halted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version of a plugin that is edited in place stays the same."""
    monkeypatch.setattr(
        "qcore.checkpoint.identity.package_digest", lambda package: f"edited {package}"
    )
    home = shutil.copytree(halted, tmp_path / "home")
    with pytest.raises(InputError) as error:
        run(home / "rows.jsonl", home / "out", model=home / "base", resume=True, save_steps=1,
            max_steps=2)  # fmt: skip
    assert (error.value.code, error.value.field) == ("QC-RESUME-002", "code.qcore")


def test_a_checkpoint_of_an_earlier_build_is_resumed(halted: Path, tmp_path: Path) -> None:
    """It has no record of config, files and code: these are not compared, which a line says."""
    home = shutil.copytree(halted, tmp_path / "home")
    manifest = home / "out.run" / "checkpoint-1" / MANIFEST
    content = read_manifest(manifest.parent)
    kept = {
        key: value
        for key, value in content.meta["identity"].items()
        if key not in ("config", "files", "code", "versions")
    }
    older = dataclasses.replace(content, meta={**content.meta, "identity": kept})
    manifest.write_bytes(older.to_bytes())
    change_config(home)
    sink = Heard()
    start(
        home / "base", home / "rows.jsonl", home / "out",
        BASE | {"save_steps": 1, "max_steps": 2}, resume=True, reporter=sink.reporter,
    )  # fmt: skip
    assert any("config, files, code, versions: these are not" in line for line in sink.notes)
    assert verify(home / "out").ok

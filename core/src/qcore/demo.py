"""`qcore demo`: train, merge and verify a tiny checkpoint, with every step checked.

This file decides what must hold: the loss falls by a margin, the merge verifies, and the merged
checkpoint answers as base + adapter does and not as the base does.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from .api.records import Architecture
from .config.settings import Settings
from .errors import Interrupted, NumericError, PluginError, UsageError
from .inference.generate import Generator
from .io.artifact import check_target, verify
from .io.atomic import make_folders, writing
from .merging.merge import MergeReport, merge
from .plugins.manager import Plugins
from .reporting import Reporter
from .training.train import TrainReport, train

PROMPT = "What is the capital of France?"
SETTINGS = Settings(
    max_steps=120,
    max_length=512,
    per_device_train_batch_size=7,
    gradient_accumulation_steps=1,
    learning_rate=1e-2,
    warmup_ratio=0.05,
    r=16,
    lora_alpha=32,
    dtype="fp32",
    save_steps=0,
    gradient_checkpointing=False,
)
_BYTES = 32 * 2**20  # more than the demo writes
#: The loss must fall to this share of its first value.
MARGIN = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What the demo showed.

    Attributes:
        folder: holds ``base``, ``data.jsonl``, ``adapter`` and ``merged``.
        trained: the training.
        merged: the merge.
        prompt: the question.
        before: the base's answer.
        after: the merged checkpoint's answer.
    """

    folder: Path
    trained: TrainReport
    merged: MergeReport
    prompt: str
    before: str
    after: str


def demo(
    folder: str | Path, *, architecture: str = "", reporter: Reporter | None = None
) -> DemoReport:
    """Write a tiny checkpoint, train, merge, verify, reload, and compare the answers.

    Args:
        folder: where everything is written; absent or empty.
        architecture: whose tiny checkpoint; the first by name when empty.
        reporter: receives events; silent by default.

    Raises:
        PluginError: ``QC-DEMO-001`` when no plugin brings a tiny checkpoint.
        UsageError: ``QC-DEMO-003`` when none brings that of `architecture`.
        NumericError: ``QC-DEMO-002`` when a station does not show its effect.
    """
    reporter = reporter or Reporter()
    home = check_target(folder, need_bytes=_BYTES)
    chosen = _architecture(architecture)
    with writing(home):
        make_folders(home)
    base, data = home / "base", home / "data.jsonl"
    assert chosen.tiny is not None
    chosen.tiny(base)
    with as_file(files("qcore.data").joinpath("demo.jsonl")) as bundled:
        shutil.copyfile(bundled, data)
    reporter.note(f"1/5 a tiny {chosen.name} checkpoint: {base}")
    try:
        trained = train(
            str(base), data, home / "adapter", SETTINGS, device="cpu", reporter=reporter
        )
    except Interrupted as stopped:
        raise Interrupted(stopped.code, "the demo was stopped", fix="run it again") from None
    _check(
        trained.last_loss < MARGIN * trained.first_loss,
        "the loss did not fall",
        f"{trained.first_loss:.3f} -> {trained.last_loss:.3f}",
        f"below {MARGIN:.0%} of its first value",
    )
    reporter.note(f"2/5 trained: loss {trained.first_loss:.3f} -> {trained.last_loss:.3f}")
    merged = merge(str(base), home / "adapter", home / "merged", reporter=reporter)
    reporter.note(f"3/5 merged: {merged.changed} of {merged.tensors} tensors changed")
    for name in ("adapter", "merged"):
        report = verify(home / name)
        _check(report.ok, f"{name} does not verify", str(report.problems[:1]), "no problem")
    reporter.note("4/5 verified: adapter and merged checkpoint hold what their manifests say")
    before = _answer(base, None)
    adapted = _answer(base, home / "adapter")
    after = _answer(home / "merged", None)
    _check(after != before, "the merged checkpoint answers as the base does", after, "a change")
    _check(after == adapted, "the merge answers unlike base + adapter", after, adapted)
    reporter.note("5/5 reloaded: the merged checkpoint answers as base + adapter does")
    return DemoReport(
        folder=home, trained=trained, merged=merged, prompt=PROMPT, before=before, after=after
    )


def _architecture(name: str) -> Architecture:
    described = Plugins.discover().load_all().describe()
    tiny = {
        key: owned.record
        for key, owned in sorted(described.architectures.items())
        if owned.record.tiny is not None
    }
    if name and tiny and name not in tiny:
        raise UsageError(
            "QC-DEMO-003",
            "is not an architecture with a tiny checkpoint",
            field="--architecture",
            found=name,
            expected=", ".join(tiny),
            fix=f"name one of {', '.join(tiny)}",
        )
    if tiny:
        return tiny[name] if name else next(iter(tiny.values()))
    raise PluginError(
        "QC-DEMO-001",
        "no installed plugin brings a tiny checkpoint",
        found=", ".join(sorted(described.architectures)) or "no plugin",
        fix="install a model plugin",
    )


def _answer(model: Path, adapter: Path | None) -> str:
    generator = Generator(str(model), adapter=adapter, device="cpu", dtype="fp32")
    return generator.prompt(PROMPT, max_new_tokens=24).text


def _check(holds: bool, what: str, found: str, expected: str) -> None:
    if not holds:
        raise NumericError(
            "QC-DEMO-002", what, found=found, expected=expected, fix="report this with --debug"
        )

"""Commands that must fail: the error code of each is taken from docs/errors.md.

This file decides which errors a record holds. Each case is recorded twice, with ``--json`` and
without.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from goldens.case import FAST, Case, Chain

_TRAIN = "train --model inputs/dense --data inputs/rows.jsonl --output @out --device cpu"
_MERGE = "merge --output @out"


def _edit_adapter(scratch: Path) -> None:
    """A copy of the trained adapter whose config was edited."""
    folder = scratch / "dense" / "edited"
    shutil.copytree(scratch / "dense" / "adapter", folder, dirs_exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}), encoding="utf-8")


def _edit_manifest(scratch: Path) -> None:
    """A copy of the trained adapter whose manifest was edited."""
    folder = scratch / "dense" / "forged"
    shutil.copytree(scratch / "dense" / "adapter", folder, dirs_exist_ok=True)
    path = folder / "MANIFEST.json"
    path.write_text(path.read_text().replace('"kind": "adapter"', '"kind": "model"'))


def _write_folder(scratch: Path) -> None:
    """A folder that holds a file of the user's."""
    (scratch / "taken").mkdir(exist_ok=True)
    (scratch / "taken" / "notes.txt").write_text("mine")


#: Errors about an adapter that a case of this chain's start trained.
_ADAPTER_ERRORS: tuple[tuple[str, str, str], ...] = (
    ("merge-other-base", f"{_MERGE} --model inputs/bad/other-values --adapter dense/adapter",
     "QC-MERGE-001"),
    ("merge-twice", f"{_MERGE} --model dense/merged --adapter dense/adapter", "QC-MERGE-002"),
    ("merge-into-output", "merge --model inputs/dense --adapter dense/adapter "
     "--output dense/merged", "QC-WRITE-001"),
    ("generate-other-base", "generate inputs/bad/other-values --adapter dense/adapter "
     "--prompt hi --max-new-tokens 1", "QC-GENERATE-001"),
)  # fmt: skip

ADAPTER_ERRORS: Chain = (
    *(
        Case(name=name, command=command, code=code)
        for name, command, code in _ADAPTER_ERRORS
    ),
    Case(
        name="merge-edited-adapter",
        command=f"{_MERGE} --model inputs/dense --adapter dense/edited",
        code="QC-ADAPTER-008",
        prepare=_edit_adapter,
    ),
    Case(
        name="verify-edited",
        command="verify dense/edited",
        code="QC-VERIFY-001",
        prepare=_edit_adapter,
    ),
    Case(
        name="verify-forged",
        command="verify dense/forged",
        code="QC-VERIFY-001",
        prepare=_edit_manifest,
    ),
)  # fmt: skip

#: Name, command and code of cases that need nothing but the inputs.
_CHEAP: tuple[tuple[str, str, str], ...] = (
    # The command line.
    ("unknown-verb", "trian", "QC-CLI-001"),
    ("unknown-flag", f"{_TRAIN} --steps 3", "QC-CLI-001"),
    ("missing-option", "merge --model inputs/dense", "QC-CLI-001"),
    ("bad-choice", f"{_TRAIN.replace('cpu', 'tpu')}", "QC-CLI-001"),
    ("no-model", "train --data inputs/rows.jsonl --output @out", "QC-CLI-002"),
    ("option-twice", f"{_TRAIN} --output out2", "QC-CLI-004"),
    # Settings.
    ("unknown-setting", f"{_TRAIN} --set lr=1", "QC-CONFIG-001"),
    ("setting-type", f"{_TRAIN} --set max_steps=ten", "QC-CONFIG-002"),
    ("setting-range", f"{_TRAIN} --set learning_rate=7", "QC-CONFIG-003"),
    ("setting-fp16", f"{_TRAIN} --set dtype=fp16", "QC-CONFIG-004"),
    ("setting-twice", f"{_TRAIN} --set r=4 --set r=8", "QC-CONFIG-005"),
    ("setting-without-value", f"{_TRAIN} --set max_steps", "QC-CONFIG-006"),
    ("settings-contradict", f"{_TRAIN} --set eval_steps=2", "QC-CONFIG-007"),
    ("template-variable", f"{_TRAIN} --set chat_template_kwargs.depth=2", "QC-CONFIG-008"),
    ("template-reserved", f"{_TRAIN} --set chat_template_kwargs.messages=2", "QC-CONFIG-009"),
    ("unknown-preset", f"{_TRAIN} --preset qiuck", "QC-PRESET-001"),
    ("show-unknown-preset", "presets show qiuck", "QC-PRESET-001"),
    ("config-absent", f"{_TRAIN} --config nowhere.yaml", "QC-YAML-001"),
    ("config-duplicate", f"{_TRAIN} --config inputs/bad/duplicate.yaml", "QC-YAML-002"),
    ("config-unknown-key", f"{_TRAIN} --config inputs/bad/unknown.yaml", "QC-CONFIG-001"),
    ("config-list", f"{_TRAIN} --config inputs/bad/list.yaml", "QC-CONFIG-006"),
    ("unknown-group", f"{_TRAIN} --set target_groups=[attn,ears]", "QC-LORA-001"),
    ("router-of-dense", f"{_TRAIN} --set router_aux_loss_coef=0.1", "QC-TRAIN-007"),
    ("tower-without-media", f"{_TRAIN.replace('dense', 'vision')} --set target_groups=[vision]",
     "QC-TRAIN-008"),
    ("unknown-op", f"{_TRAIN} --kernels no_such_op=reference", "QC-KERNEL-001"),
    ("unknown-class", f"{_TRAIN} --adapter-class audio", "QC-ADAPTER-001"),
    ("resume-nothing", f"{_TRAIN} --resume", "QC-RESUME-001"),
    ("other-generation", "inspect inputs/dense --generation 3.6", "QC-DETECT-007"),
    # Model folders.
    ("model-absent", _TRAIN.replace("inputs/dense", "./nowhere"), "QC-HUB-001"),
    ("model-is-a-file", "inspect inputs/rows.jsonl", "QC-HUB-002"),
    ("inspect-no-config", "inspect inputs/bad/no-config", "QC-CKPT-001"),
    ("inspect-config-not-json", "inspect inputs/bad/config-not-json", "QC-CKPT-002"),
    ("inspect-truncated", "inspect inputs/bad/truncated", "QC-CKPT-005"),
    ("inspect-pickled", "inspect inputs/bad/pickled", "QC-CKPT-007"),
    ("inspect-fp8-claimed", "inspect inputs/bad/fp8-claimed", "QC-CKPT-010"),
    ("inspect-unknown-type", "inspect inputs/bad/unknown-type", "QC-DETECT-001"),
    ("inspect-layers-short", "inspect inputs/bad/layers-short", "QC-QWEN35-002"),
    ("inspect-missing-tensor", "inspect inputs/bad/missing-tensor", "QC-KEY-001"),
    ("inspect-extra-tensor", "inspect inputs/bad/extra-tensor", "QC-KEY-002"),
    ("inspect-wrong-shape", "inspect inputs/bad/wrong-shape", "QC-KEY-003"),
    ("inspect-two-faults", "inspect inputs/bad/two-faults", "QC-KEY-003"),
    ("train-two-faults", _TRAIN.replace("inputs/dense", "inputs/bad/two-faults"), "QC-KEY-003"),
    ("train-no-class", _TRAIN.replace("inputs/dense", "inputs/bad/no-class"), "QC-ADAPTER-002"),
    ("train-no-template", _TRAIN.replace("inputs/dense", "inputs/bad/no-template"),
     "QC-PRE-001"),
    ("train-no-tokenizer", _TRAIN.replace("inputs/dense", "inputs/bad/no-tokenizer"),
     "QC-TOKENIZER-001"),
    # Rows.
    ("rows-absent", _TRAIN.replace("inputs/rows", "nowhere"), "QC-DATA-001"),
    *(
        (f"rows-{name}", _TRAIN.replace("inputs/rows", f"inputs/bad/{name}") + more, code)
        for name, more, code in (
            ("empty", "", "QC-DATA-002"),
            ("not-json", "", "QC-DATA-004"),
            ("no-messages", "", "QC-DATA-023"),
            ("wrong-role", "", "QC-DATA-006"),
            ("no-answer", "", "QC-DATA-010"),
            ("control-string", "", "QC-DATA-008"),
            ("too-long", " --set max_length=64", "QC-DATA-011"),
            ("reasoning-twice", "", "QC-DATA-016"),
            ("several", "", "QC-DATA-004"),
            ("image-missing", "", "QC-DATA-009"),
        )
    ),
    *(
        (
            f"vision-{name}",
            f"train --model inputs/vision --data inputs/bad/{name}.jsonl --output @out "
            "--device cpu",
            code,
        )
        for name, code in (("image-missing", "QC-MEDIA-002"), ("image-damaged", "QC-VISION-028"))
    ),
    # Adapters, merges, manifests.
    ("merge-no-adapter", f"{_MERGE} --model inputs/dense --adapter nowhere", "QC-ADAPTER-003"),
    ("merge-no-fingerprint", f"{_MERGE} --model inputs/dense --adapter inputs/foreign",
     "QC-ADAPTER-009"),
    ("merge-not-quantized", f"{_MERGE} --model inputs/dense --adapter inputs/foreign "
     "--trust-base --dequantize", "QC-MERGE-009"),
    ("adapter-show-absent", "adapter show nowhere", "QC-ADAPTER-003"),
    ("adapter-extract-equal", "adapter extract --base inputs/dense --model inputs/dense --rank 2 "
     "--output @out", "QC-EXTRACT-003"),
    ("verify-absent", "verify nowhere", "QC-MANIFEST-001"),
    ("verify-no-manifest", "verify inputs/dense", "QC-VERIFY-001"),
    # Generation.
    ("generate-temperature", "generate inputs/dense --prompt hi --temperature 0.001",
     "QC-GENERATE-003"),
    ("generate-image-for-text", "generate inputs/dense --prompt hi --image inputs/media/0.png",
     "QC-GENERATE-005"),
    # Plans, records, the demo.
    ("plan-unknown-gpu", "plan inputs/dense --gpu H200x", "QC-PLAN-002"),
    ("plan-bad-budget", "plan inputs/dense --budget much", "QC-PLAN-003"),
    ("plan-media-of-text", "plan inputs/dense --gpu H100-80 --media 16", "QC-PLAN-007"),
    ("plan-media-zero", "plan inputs/vision --gpu H100-80 --media 0", "QC-PLAN-008"),
    ("show-unknown-sku", "skus show Qwen/Qwen3.5-5B", "QC-SKU-001"),
    ("demo-unknown-architecture", "demo --architecture acme --output @out", "QC-DEMO-003"),
)  # fmt: skip

ERRORS: tuple[Chain, ...] = (
    *(
        (Case(name=name, command=command, code=code, cheap=True),)
        for name, command, code in _CHEAP
    ),
    (
        Case(
            name="plugin-disabled",
            command="inspect inputs/dense",
            code="QC-DETECT-001",
            env={"QCORE_DISABLE_PLUGINS": "qwen35"},
            cheap=True,
        ),
    ),
    (
        Case(
            name="output-taken",
            command=_TRAIN.replace("@out", "taken"),
            code="QC-WRITE-001",
            cheap=True,
            prepare=_write_folder,
        ),
    ),
    (
        Case(
            name="output-under-a-file",
            command=_TRAIN.replace("@out", "inputs/rows.jsonl/out"),
            code="QC-WRITE-002",
            cheap=True,
        ),
    ),
    (
        Case(
            name="nan-in-base",
            command=f"{_TRAIN.replace('inputs/dense', 'inputs/bad/nan')} "
            f"{FAST.removeprefix('--device cpu ')}",
            code="QC-LOAD-003",
        ),
    ),
)  # fmt: skip

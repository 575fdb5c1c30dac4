"""A checkpoint of the 0.8B's real shape, 1.7 GB: inspected, and merged beside stock PEFT.

Memory and time are measured in processes of their own, both tools on the same adapter, each
once: figures, with a bound that noise does not reach.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.child import in_child
from support.e2e_kit import LINEARS, ROOT, command, figure, one_thread
from support.real_shapes import write_real
from torch import Tensor

pytestmark = pytest.mark.slow
RANK, ALPHA = 16, 32

#: Not ru_maxrss: that one survives exec, so a child would report the peak of pytest.
_PEAK = """
import re
def peak():
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1])
"""
_OURS = (
    _PEAK
    + """
import json, sys, time
import torch
import qcore.merging.merge, qcore.merging.verify, qcore.plugins, qcore_qwen35.model
imported, began = peak(), time.perf_counter()
prove = sys.argv[4] == "prove"
report = qcore.merging.merge.merge(*sys.argv[1:4], trust_base=True, prove=prove)
took = time.perf_counter() - began
print(json.dumps({"imported": imported, "peak": peak(), "seconds": took,
                  "changed": report.changed, "proof": report.proof}))
"""
)
_PEFT = (
    _PEAK
    + """
import json, sys, time
import torch, peft
from transformers import Qwen3_5ForCausalLM
began = time.perf_counter()
model = Qwen3_5ForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3])
took = time.perf_counter() - began
print(json.dumps({"peak": peak(), "seconds": took}))
"""
)


@pytest.fixture(scope="module")
def base(shared: Path, once: Callable[..., Path]) -> Path:
    return once("real-shape", lambda home: in_child(write_real)(shared, home / "base")) / "base"


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """name -> dtype, shape, file, as safetensors itself reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                view = file.get_slice(name)
                found[name] = (view.get_dtype(), tuple(view.get_shape()), path.name)
    return found


def targets(base: Path) -> dict[str, tuple[int, ...]]:
    """The ten linear maps of the language model's layers."""
    return {
        name: shape
        for name, (_, shape, _) in headers(base).items()
        if name.startswith(f"{ROOT}layers.") and name.split(".")[-2] in LINEARS
    }


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As stock PEFT writes one for the text class; every B of the size that training gives."""
    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for name, (out, into) in targets(base).items():
        stem = "base_model.model.model." + name.removeprefix(ROOT).removesuffix(".weight")
        a = torch.randn(RANK, into, generator=generator) / into**0.5
        b = 0.02 * torch.randn(out, RANK, generator=generator)
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "target_modules": list(LINEARS), "base_model_name_or_path": None, "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def measured(script: str, *arguments: object) -> dict[str, Any]:
    """The figures of one run in a process of its own; ``process`` is its whole time.

    One thread: on a machine with other work, threads that wait for each other measure that.
    """
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=240, check=False, env=one_thread(),
    )  # fmt: skip
    took = time.perf_counter() - began
    assert ended.returncode == 0, ended.stderr[-2000:]
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result | {"process": took}


def test_inspect(base: Path) -> None:
    ended = command("inspect", base, "--json")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    found = headers(base)
    assert (told["architecture"], told["generation"]) == ("qwen3_5", "3.5")
    assert told["tensors"] == len(found)
    assert told["differences"] == []
    figure(f"parameters {told['parameters']:,} in {told['tensors']} tensors")
    numel = sum(int(torch.Size(shape).numel()) for _, shape, _ in found.values())
    assert told["parameters"] == numel


@pytest.mark.timing
def test_merge_beside_stock_peft(base: Path, adapter: Path, tmp_path: Path) -> None:
    largest = max(2 * torch.Size(shape).numel() for _, shape, _ in headers(base).values())
    theirs = measured(_PEFT, base, adapter, tmp_path / "theirs")
    plain = measured(_OURS, base, adapter, tmp_path / "plain", "plain")
    shutil.rmtree(tmp_path / "plain")
    ours = measured(_OURS, base, adapter, tmp_path / "ours", "prove")
    extra = (ours["peak"] - ours["imported"]) / largest
    for name, run in {"proved": ours, "unproved": plain, "PEFT": theirs}.items():
        figure(f"{name}: {run['seconds']:.1f} s, process {run['process']:.1f} s, "
               f"peak {run['peak'] / 1e9:.2f} GB")  # fmt: skip
    figure(f"peak: imports {ours['imported'] / 1e9:.2f} GB + {extra:.2f} x the largest tensor")
    figure(f"proof {ours['proof']}")
    # Both would hold of a peak that was measured in another process.
    assert ours["imported"] < largest
    assert ours["peak"] > ours["imported"]
    assert ours["peak"] <= ours["imported"] + 3 * largest
    # Float32 rounding of both forward passes, as a share of what the adapter changes.
    assert ours["proof"]["difference"] <= 1e-4 * ours["proof"]["effect"]
    assert ours["proof"]["effect"] > 0.1
    # PEFT proves nothing, hashes nothing and syncs nothing; like is measured against like.
    assert plain["process"] <= 1.5 * theirs["process"]
    assert ours["process"] <= 3 * theirs["process"]
    check_contract(base, tmp_path / "ours", set(targets(base)))
    check_closeness(base, adapter, tmp_path / "ours", tmp_path / "theirs")


def check_contract(base: Path, out: Path, touched: set[str]) -> None:
    """Names, shapes, dtypes, files, sidecars; bytes where untouched, other ones where touched."""
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"MANIFEST.json"}
    assert headers(out) == headers(base)
    for name in names:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (base / name).read_bytes(), name
            continue
        with safe_open(base / name, "pt") as before, safe_open(out / name, "pt") as after:
            for tensor in before.keys():  # noqa: SIM118 - not a mapping
                old, new = before.get_tensor(tensor), after.get_tensor(tensor)
                same = torch.equal(old.view(torch.uint8), new.view(torch.uint8))
                assert same == (tensor not in touched), tensor
    for root in ("model.visual.", "mtp."):
        assert any(tensor.startswith(root) for tensor in headers(base).keys() - touched)


def check_closeness(base: Path, adapter: Path, ours: Path, theirs: Path) -> None:
    """On every touched tensor at least as close to float64 as PEFT's own merge."""
    files = {name: file for name, (_, _, file) in headers(base).items()}
    peer = headers(theirs)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as lora:
        for name in targets(base):
            short = name.removeprefix(ROOT)
            stem = f"base_model.model.model.{short.removesuffix('.weight')}"
            a, b = (lora.get_tensor(f"{stem}.lora_{side}.weight").double() for side in "AB")
            with safe_open(base / files[name], "pt") as file:
                value = file.get_tensor(name).double().addmm_(b, a, alpha=ALPHA / RANK)
            with safe_open(ours / files[name], "pt") as file:
                mine = (file.get_tensor(name).double() - value).abs()
            other = name if name in peer else f"model.{short}"
            with safe_open(theirs / peer[other][2], "pt") as file:
                their = (file.get_tensor(other).double() - value).abs()
            assert float(mine.max()) <= float(their.max()), name
            assert float(mine.mean()) <= float(their.mean()), name

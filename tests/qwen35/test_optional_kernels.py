"""Other projects' kernels: how they are called, when they are refused, that they are measured.

None of them is installed where this runs: their functions stand in as transformers' torch code
with their signatures, so what is tested is the translation of arguments, and that a project
that computes something else does not pass.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from qcore.api.records import Kernel, Op
from qcore.errors import UsageError
from qcore.nn.kernels import cache as kernel_cache
from qcore.nn.kernels.registry import Listed, choose
from qcore_qwen35.ops import optional

CPU = torch.device("cpu")
KERNELS = {kernel.backend: kernel for kernel in optional.kernels()}


def listed(backend: str) -> list[Listed]:
    kernel = KERNELS[backend]
    return [Listed(owner="plugin 'qwen35'", kernel=kernel, op=Op(name=kernel.op))]


def rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    initial_state: Tensor | None, output_final_state: bool, use_qk_l2norm_in_kernel: bool,
    cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None, swap: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fla's and FlashQLA's signature over transformers' function, document by document."""
    assert all(x.is_contiguous() for x in (q, k, v, g, beta))
    assert (q.shape[0], g.dtype, cu_seqlens.dtype) == (1, torch.float32, torch.int64)
    assert cu_seqlens_cpu is None or cu_seqlens_cpu.device.type == "cpu"
    repeat = v.shape[2] // k.shape[2]
    outs, states = [], []
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        here = [x[:, start:end] for x in (q, k, v, g, beta)]
        here[:2] = [
            x.repeat(1, 1, repeat, 1) if swap else x.repeat_interleave(repeat, 2) for x in here[:2]
        ]
        o, state = modeling_qwen3_5.torch_chunk_gated_delta_rule(
            *here, initial_state=None if initial_state is None else initial_state[n : n + 1],
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )  # fmt: skip
        outs.append(o)
        states.append(state)
    return torch.cat(outs, 1), torch.cat(states)


def conv(x: Tensor, weight: Tensor, *, seq_idx: Tensor, activation: str) -> Tensor:
    """causal_conv1d_fn's signature: ``x [1, C, T]`` channels last, ``weight [C, K]``."""
    assert (x.stride(1), x.stride(2) % 8, activation) == (1, 0, "silu")
    assert (seq_idx.dtype, seq_idx.shape) == (torch.int32, (1, x.shape[2]))
    pieces, start = [], 0
    for length in torch.unique_consecutive(seq_idx[0], return_counts=True)[1].tolist():
        here = x[..., start : start + length]
        made = F.conv1d(here, weight[:, None], padding=weight.shape[1] - 1, groups=weight.shape[0])
        pieces.append(F.silu(made[..., :length]))
        start += length
    return torch.cat(pieces, 2)


@pytest.fixture
def projects(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins where the three projects would be imported from."""
    optional._ends.cache_clear()
    functions = {
        "fla.ops.gated_delta_rule": "chunk_gated_delta_rule",
        "flash_qla": "chunk_gated_delta_rule",
        "causal_conv1d": "causal_conv1d_fn",
    }
    for name, function in functions.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            full = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, full, ModuleType(full))
        stand_in = conv if name == "causal_conv1d" else rule
        monkeypatch.setattr(sys.modules[name], function, stand_in, raising=False)
    return {name: sys.modules[name] for name in functions}


def test_the_list_is_torch_free_and_below_our_own() -> None:
    code = (
        "import sys; from qcore_qwen35.kernels import kernels\n"
        "found = [k for k in kernels() if k.op in ('qwen35::delta_rule', 'qwen35::delta_inputs')]\n"
        "print('torch' in sys.modules, *(f'{k.op}={k.backend}' for k in"
        " sorted(found, key=lambda k: (k.op, -k.priority))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "False", "qwen35::delta_inputs=triton", "qwen35::delta_inputs=causal_conv1d",
        "qwen35::delta_rule=triton", "qwen35::delta_rule=flash_qla", "qwen35::delta_rule=fla",
    ]  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS)
def test_one_that_is_not_installed_is_refused_with_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(kernel_cache, "version_of", lambda name: None)
    kernel = KERNELS[backend]
    with pytest.raises(UsageError) as caught:
        choose(listed(backend), CPU, {kernel.op: backend})
    assert caught.value.code == "QC-KERNEL-003"
    assert caught.value.fix == f"pip install '{kernel.requires[0]}'"
    assert choose(listed(backend), CPU, {}).backends == {kernel.op: "reference"}


@pytest.mark.parametrize("backend", KERNELS)
def test_cpus_are_refused(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(kernel_cache, "version_of", lambda name: "99")
    with pytest.raises(UsageError, match="CUDA device"):
        choose(listed(backend), CPU, {KERNELS[backend].op: backend})


@pytest.mark.parametrize(
    ("triton", "capability", "tilelang", "refused"),
    [
        ("3.6.0", (9, 0), None, True),
        ("3.7.1", (9, 0), None, False),
        ("3.6.0", (9, 0), "0.1.12", False),
        ("3.6.0", (8, 0), None, False),
    ],
)
def test_what_triton_miscompiles_on_hopper(
    monkeypatch: pytest.MonkeyPatch, triton: str, capability: tuple[int, int],
    tilelang: str | None, refused: bool,
) -> None:  # fmt: skip
    told = {"triton": triton, "fla-core": "0.6.0", "tilelang": tilelang}
    monkeypatch.setattr(kernel_cache, "version_of", told.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernel_cache, "_card", lambda device: None)
    gpu = torch.device("cuda:0")
    if refused:
        with pytest.raises(UsageError, match="flash-linear-attention/issues/640"):
            choose(listed("fla"), gpu, {"delta_rule": "fla"})
        return
    from qcore.nn.kernels.judge import _refusal

    assert _refusal(KERNELS["fla"], gpu, None) is None


def test_flash_qla_needs_its_cards_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "8.0" in str(KERNELS["flash_qla"].refuse(gpu))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(optional.shutil, "which", lambda name, path=None: None)
    assert "nvcc" in str(KERNELS["flash_qla"].refuse(gpu))
    monkeypatch.setattr(optional.shutil, "which", lambda name, path=None: "/usr/bin/nvcc")
    assert KERNELS["flash_qla"].refuse(gpu) is None


def judged(kernel: Kernel) -> Any:
    return kernel.verify(CPU)


@pytest.mark.parametrize("backend", KERNELS)
def test_arguments_are_translated(projects: dict[str, Any], backend: str) -> None:
    """Packed documents of odd lengths, grouped heads, slices: outputs, states and gradients."""
    verdict = judged(KERNELS[backend])
    assert verdict.good, verdict.text
    assert verdict.output > 1e-4, "bfloat16 is not exact"
    assert verdict.gradient > 1e-4


@pytest.mark.parametrize(
    ("backend", "change"),
    [
        ("fla", lambda *a, **k: rule(*a, **k, swap=True)),
        ("flash_qla", lambda *a, **k: rule(*a, **{**k, "use_qk_l2norm_in_kernel": False})),
        ("fla", lambda *a, **k: tuple(x.transpose(-1, -2) for x in rule(*a, **k))),
        (
            "causal_conv1d",
            lambda *a, **k: conv(*a, **{**k, "seq_idx": torch.zeros_like(k["seq_idx"])}),
        ),
        ("causal_conv1d", lambda x, w, **k: conv(x, w.flip(1), **k)),
    ],
)
def test_a_project_that_computes_something_else_does_not_pass(
    projects: dict[str, Any], backend: str, change: Any
) -> None:
    module, name = {
        "fla": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
        "flash_qla": ("flash_qla", "chunk_gated_delta_rule"),
        "causal_conv1d": ("causal_conv1d", "causal_conv1d_fn"),
    }[backend]
    setattr(projects[module], name, change)
    assert not judged(KERNELS[backend]).good


def test_a_state_is_carried_and_every_layer_gives_the_same_lengths(
    projects: dict[str, Any],
) -> None:
    given = []

    def record(*args: Any, **more: Any) -> Any:
        given.append(more["cu_seqlens"])
        return rule(*args, **more)

    projects["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = record
    function = KERNELS["fla"].load()
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(70, 2, 16, generator=draw) for _ in range(2))
    v = torch.randn(70, 4, 16, generator=draw)
    g = -torch.rand(70, 4, generator=draw)
    beta = torch.rand(70, 4, generator=draw)
    whole, state = function(q, k, v, g, beta, (0, 70))
    again, _ = function(q, k, v, g, beta, [0, 70])
    assert given[0] is given[1]
    assert torch.equal(whole, again)
    parts = [x.split([33, 37]) for x in (q, k, v, g, beta)]
    first, middle = function(*(x[0] for x in parts), (0, 33))
    second, last = function(*(x[1] for x in parts), (0, 37), middle)
    assert torch.allclose(torch.cat([first, second]), whole, atol=1e-5)
    assert torch.allclose(last, state, atol=1e-5)
    assert (state.shape, state.dtype) == ((1, 4, 16, 16), torch.float32)

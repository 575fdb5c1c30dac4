"""Backends from other installed packages: flash-linear-attention, FlashQLA, causal-conv1d.

This file decides how their functions are called with our arguments: a pack has no batch dimension,
lengths are on the host, q and k are not yet normalized, and the state after each document is
returned. The packages are imported by `load` only; their results are verified like those of any
backend (`verify`). They rank below this plugin's Triton kernels: each is used if that kernel is
unavailable, or on request.

| op | backend | project |
|---|---|---|
| delta_rule | flash_qla | FlashQLA, TileLang: compiles with nvcc when it first runs |
| delta_rule | fla | flash-linear-attention, Triton; autotunes when it first runs |
| delta_inputs | causal_conv1d | Dao-AILab's CUDA convolution; decays and gates stay in torch |

Shapes: T tokens, N documents, Hk key heads of dk, Hv value heads of dv, C channels.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from qcore.api import Kernel, KnownBad, Verdict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .delta_inputs.reference import DeltaInputs, Documents, Heads
    from .delta_rule import Chunks

_HOPPER = KnownBad(
    package="triton",
    versions=">=3.4.0,<3.7.1",
    capability=(9, 0),
    reason="it miscompiles the backward of fla's gated delta rule on Hopper",
    issue="https://github.com/fla-org/flash-linear-attention/issues/640",
    unless="tilelang",
)
#: Compute capabilities that FlashQLA 0.1.3 supports, including backward.
_QLA_CARDS = ((9, 0), (10, 0), (10, 3))
_CHANNELS = 8  # the convolution needs strides that are multiples of this


def kernels() -> Iterator[Kernel]:
    """Records of the optional backends."""
    yield Kernel(
        op="qwen35::delta_rule",
        backend="flash_qla",
        load=_flash_qla,
        verify=partial(_verify, "delta_rule", _flash_qla),
        refuse=_qla_refuses,
        priority=6,
        requires=("flash-qla>=0.1.3", "tilelang>=0.1.12"),
    )
    yield Kernel(
        op="qwen35::delta_rule",
        backend="fla",
        load=_fla,
        verify=partial(_verify, "delta_rule", _fla),
        refuse=_needs_cuda,
        priority=5,
        requires=("fla-core>=0.6", "triton>=3.3"),
        depends_on=("tilelang", "flash-qla"),
        known_bad=(_HOPPER,),
    )
    yield Kernel(
        op="qwen35::delta_inputs",
        backend="causal_conv1d",
        load=_causal_conv1d,
        verify=partial(_verify, "delta_inputs", _causal_conv1d),
        refuse=_needs_cuda,
        priority=5,
        requires=("causal-conv1d>=1.5",),
    )


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "it needs a CUDA device"


def _qla_refuses(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    import torch

    capability = torch.cuda.get_device_capability(device)
    if capability not in _QLA_CARDS:
        return f"it has no kernels for cards of compute capability {capability[0]}.{capability[1]}"
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [os.path.join(home, "bin") for home in homes if home]
    if not any(shutil.which("nvcc", path=path) for path in (None, *folders)):
        return "it compiles at run time and nvcc is not installed"
    return None


def _verify(op: str, load: Callable[[], Callable[..., Any]], device: torch.device) -> Verdict:
    from .verify import verify

    return verify(op, device, load())


# The delta rule.


def _fla() -> Callable[..., Any]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return partial(_rule, _fla_call, chunk_gated_delta_rule)


def _flash_qla() -> Callable[..., Any]:
    from flash_qla import chunk_gated_delta_rule

    return partial(_rule, _qla_call, chunk_gated_delta_rule)


def _rule(
    call: Callable[..., Any],
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Sequence[int],
    initial_state: Tensor | None = None,
    layout: Chunks | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `delta_rule.chunked_delta_rule`; `layout` is ignored."""
    batch = [x.contiguous().unsqueeze(0) for x in (q, k, v, g.float(), beta)]
    first = None if initial_state is None else initial_state.float().contiguous()
    ends = _ends(tuple(cu_seqlens), v.device)
    o, last = call(function, *batch, initial_state=first, ends=ends)
    return o.squeeze(0).to(v.dtype), last.float()


def _fla_call(
    function: Callable[..., Any], *batch: Tensor, initial_state: Tensor | None, ends: Any
) -> Any:
    return function(
        *batch,
        initial_state=initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=ends[0],
        cu_seqlens_cpu=ends[1],
    )


def _qla_call(
    function: Callable[..., Any], *batch: Tensor, initial_state: Tensor | None, ends: Any
) -> Any:
    return function(
        *batch,
        initial_state=initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=ends[0],
    )


@lru_cache(maxsize=2)
def _ends(cu_seqlens: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cumulative lengths on the device and on the host, int64.

    Both projects cache derived values by tensor identity, so every layer of a batch must pass the
    same tensors: the last two batches' are cached.
    """
    import torch

    host = torch.tensor(cu_seqlens, dtype=torch.int64)
    return host.to(device), host


# Inputs of the delta rule.


def _causal_conv1d() -> Callable[..., Any]:
    from causal_conv1d import causal_conv1d_fn

    return partial(_inputs, causal_conv1d_fn)


def _inputs(
    function: Callable[..., Any],
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    documents: Documents,
    heads: Heads,
) -> DeltaInputs:
    """Arguments and results of `delta_inputs.reference.delta_inputs`."""
    import torch

    from .delta_inputs.reference import DeltaInputs, log_decay

    # Its channels-last kernel, which supports documents, reads eight channels at a time.
    if qkv.stride(1) != 1 or qkv.stride(0) % _CHANNELS or qkv.storage_offset() % _CHANNELS:
        qkv = qkv.contiguous()
    mixed = function(
        qkv.t().unsqueeze(0),
        conv_weight.squeeze(1).to(qkv.dtype),
        seq_idx=documents.starts.unsqueeze(0),  # any number that is unique per document
        activation="silu",
    )
    g, beta = log_decay(a, a_log, dt_bias), torch.sigmoid(b)
    return DeltaInputs(*heads.split(mixed.squeeze(0).t()), g, beta, z)

"""Sorts kernel names of a profile by purpose (matmul, attention, LoRA, ...), by patterns."""

from __future__ import annotations

import re

_PATTERNS = (
    ("copy", r"^Memcpy|^Memset|copy_kernel|CatArrayBatchedCopy|FillFunctor"),
    ("loss", r"cross_entropy|softmax|nll_loss|_cce_|linear_xent|_logits|^_rows$"),
    ("optimizer", r"adam|multi_tensor|lpnorm|foreach"),
    ("dequant", r"dequant|kDequantize|nf4|^_fill$"),
    ("lora", r"^_thin$|^_outer$"),
    (
        "experts",
        r"grouped|GroupProblem|moe|routing|radixSort|sort|^outer$|^thin$|gather_sum|^_up$|^_route",
    ),
    ("attention", r"flash_(fwd|bwd)|fmha|attention|sdpa|flash::"),
    (
        "delta rule",
        r"delta|chunk_|kkt|recompute_w_u|solve_tril|fwd_h|bwd_dhu|dqkwg|wy_|_scan|main_kernel"
        r"|trsm|trtri|triangular|cumsum|group_reduce|state|^_prepare$|^_outputs$|^_pairs$"
        r"|^_gradients$",
    ),
    ("gemm", r"nvjet|gemm|cutlass|xmma|cublas|splitK|gemv|Kernel2|wgmma"),
    (
        "elementwise",
        r"elementwise|vectorized|reduce|norm|conv|swiglu|silu|rope|rotary|gate|triton_|index|where"
        r"|gather|scatter|l2|embedding|depthwise|^_forward$|^_backward$",
    ),
)


def group_of(name: str) -> str:
    """``gemm``, ``dequant``, ``delta rule``, ... or ``other``."""
    return next((group for group, pattern in _PATTERNS if re.search(pattern, name)), "other")

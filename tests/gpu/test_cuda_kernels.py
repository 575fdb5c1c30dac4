"""The chosen kernels in whole models on a card: gradients of every LoRA tensor, policies, repeats.

The reference is the same model in float32 with the references in torch, on the same 4-bit
weights; the bound is what bfloat16 with the references in torch errs. Experts are those that the
float32 model picks, in all three: where scores are close bfloat16 picks others, and what differs
then is the function, not its gradient. `test_gradients` compares with transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.gradient_cases import Routes
from support.gradient_slices import routed
from torch import Tensor

from qcore.adapter.targets import targets
from qcore.api.blocks import Packed
from qcore.nn.device import DTYPES
from qcore.nn.kernels.registry import choose, installed
from qcore.nn.load import load
from qcore.nn.model import Model, ops_of
from qcore.nn.offload import OffloadedInput
from qcore.nn.qlora.lora_layer import Lora
from qcore.nn.recompute import POLICIES
from qcore.plugins.resolve_model import identify
from qcore_qwen35.tiny import write as write_tiny

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
#: Head sizes of the published models, few of everything else; an odd number of key heads' share.
WIDE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "head_dim": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
SPARSE: dict[str, Any] = {
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "num_experts": 16,
    "num_experts_per_tok": 4,
}  # fmt: skip
LENGTHS = {"packed": (1, 63, 517, 130, 65), "one row": (1027,), "equal rows": (256, 256, 256)}


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="module", params=["dense", "moe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "base"
    moe = request.param == "moe"
    text = {key: n for key, n in WIDE.items() if not (moe and key == "intermediate_size")}
    write_tiny(folder, moe=moe, **text, **(SPARSE if moe else {}))
    return folder


def _model(folder: Path, dtype: str, *, kernels: bool) -> Model:
    found = identify(str(folder))
    architecture, config = found.decision.architecture, found.checkpoint.config
    chosen = None
    if kernels:
        used = ops_of(architecture, config, found.layout)
        chosen = choose(installed(found.plugins), CUDA, {}, used)
        assert "reference" not in chosen.backends.values(), chosen.lines()
    lora = targets(found.layout, (), Lora(r=8, lora_alpha=16))
    model = Model(architecture, config, found.layout, DTYPES[dtype], lora, chosen)
    load(model, found.layout, found.checkpoint, device=CUDA, quantize=True)
    draw = torch.Generator().manual_seed(3)
    for name, module in model.adapters():
        module.reset_lora(name, 0, CUDA)
        assert module.lora_B is not None
        module.lora_B.data.copy_(0.05 * torch.randn(module.lora_B.shape, generator=draw))
    return model.train()


def _gradients(
    model: Model, lengths: tuple[int, ...], policy: str = "none", routes: Routes | None = None
) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 500, (n,), generator=draw) for n in lengths]
    batch = Packed.of(ids, [torch.roll(row, -1) for row in ids]).to(CUDA)
    model.zero_grad(set_to_none=True)
    with routed(model, routes):
        (model.loss(batch, recompute=policy) / sum(lengths)).backward()
    return {name: p.grad.float() for name, p in model.trainable() if p.grad is not None}


def _error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    one, two = (torch.cat([g[name].flatten() for name in expected]) for g in (found, expected))
    return float((one - two).norm() / two.norm())


def _worst_cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    cosine = torch.nn.functional.cosine_similarity
    return min(float(cosine(found[n].flatten(), g.flatten(), 0)) for n, g in expected.items())


@pytest.mark.parametrize("case", LENGTHS)
def test_gradients_err_no_more_than_torchs_bf16(base: Path, case: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    free = Routes()
    expected = _gradients(_model(base, "fp32", kernels=False), LENGTHS[case], routes=free)
    plain, found = (
        _gradients(
            _model(base, "bf16", kernels=kernels), LENGTHS[case],
            routes=Routes(forced=free.by_layer()) if free.taken else None,
        )
        for kernels in (False, True)
    )  # fmt: skip
    assert found.keys() == expected.keys()
    ours, torchs = _error(found, expected), _error(plain, expected)
    cosine, theirs = _worst_cosine(found, expected), _worst_cosine(plain, expected)
    print(
        f"\n{base.parent.name} {case}: relative error {ours:.4f} (torch {torchs:.4f}), "
        f"worst cosine {cosine:.5f} (torch {theirs:.5f})"
    )
    assert ours <= 1.1 * torchs
    assert cosine >= min(0.999, theirs - 5e-4)


def test_policies_agree(base: Path) -> None:
    model = _model(base, "bf16", kernels=True)
    expected = _gradients(model, LENGTHS["packed"])
    again = _error(_gradients(model, LENGTHS["packed"]), expected)
    for policy in POLICIES[1:]:
        error = _error(_gradients(model, LENGTHS["packed"], policy), expected)
        print(f"\n{policy}: {error:.2e} from none; none from itself {again:.2e}")
        # Attention's backward adds in any order; all else is the same, bit for bit.
        assert error <= 3 * again + 1e-6


def test_pinned_memory_is_asked_for_once(base: Path) -> None:
    """Pinning a layer's input takes longer than the layer: a second step finds its places."""
    model = _model(base, "bf16", kernels=True)
    pool = OffloadedInput.pool(torch.device("cuda", torch.cuda.current_device()))
    _gradients(model, LENGTHS["packed"], "offload")
    ask, pool.make = pool.make, refuse
    try:
        for lengths in (LENGTHS["packed"], (sum(LENGTHS["packed"]) - 1,)):
            _gradients(model, lengths, "offload")
    finally:
        pool.make = ask


def refuse(nbytes: int) -> Tensor:
    """No place is made."""
    raise AssertionError(f"{nbytes} bytes of pinned memory were asked for again")


def test_only_attention_differs_between_two_runs(base: Path) -> None:
    """The last layer's attention is the first op of the backward that may differ."""
    model = _model(base, "bf16", kernels=True)
    one, two = (_gradients(model, LENGTHS["packed"]) for _ in range(2))
    differing = [name for name in one if not torch.equal(one[name], two[name])]
    print(f"\n{len(differing)} of {len(one)} gradients differ between two runs")
    last = max(int(name.split("layers.")[1].split(".")[0]) for name in one)
    for name in differing:
        after = f"layers.{last}." in name and ("o_proj" in name or ".mlp." in name)
        assert not after, name

"""The tower on a CUDA device: near to float32, and memory that is linear in a picture's patches."""

from __future__ import annotations

import pytest
import torch
from support.vision_kit import Grid, Towers, run, towers

pytestmark = pytest.mark.gpu

#: Heads of 64 and of 72, as the published towers have.
WIDTHS = {
    64: {"hidden_size": 768, "intermediate_size": 3072, "num_heads": 12},
    72: {"hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16},
}
GRIDS: list[Grid] = [(1, 8, 6), (3, 4, 4), (1, 6, 8), (1, 22, 34)]


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def on_gpu(head: int, dtype: torch.dtype) -> Towers:
    both = towers(dtype=dtype, out_hidden_size=1024, num_position_embeddings=2304, **WIDTHS[head])
    both.ours.cuda()
    return both


@pytest.mark.parametrize("head", WIDTHS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-3), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
def test_outputs_and_gradients(head: int, dtype: torch.dtype, bound: float) -> None:
    both, exact = on_gpu(head, dtype), towers(
        out_hidden_size=1024, num_position_embeddings=2304, **WIDTHS[head]
    )  # fmt: skip
    exact.theirs.load_state_dict(both.theirs.state_dict())
    media = exact.media(GRIDS)
    wanted = torch.randn(len(media.where), 1024, generator=torch.Generator().manual_seed(0))
    for parameter in (*exact.theirs.parameters(), *both.ours.parameters()):
        parameter.requires_grad_(True)
    theirs, mine = exact.reference(media), run(both.ours, media.to(torch.device("cuda")))
    (theirs * wanted).sum().backward()
    (mine * wanted.cuda()).sum().backward()
    assert float((mine.detach().cpu() - theirs).norm() / theirs.norm()) <= bound
    for name, parameter in exact.theirs.named_parameters():
        gradient = both.ours.get_parameter(name).grad
        assert gradient is not None, name
        assert parameter.grad is not None, name
        assert float((gradient.cpu() - parameter.grad).norm() / parameter.grad.norm()) <= 2 * bound


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_largest_picture(dtype: torch.dtype, trained: bool) -> None:
    """65,536 patches in one frame: scores of one head alone would take 8 GB in 16 bit."""
    both = on_gpu(72, dtype)
    for parameter in both.ours.parameters():
        parameter.requires_grad_(trained)
    peaks = []
    for units in (16384, 65536):
        media = both.ours.sample(units, torch.device("cuda"), torch.Generator().manual_seed(0))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = run(both.ours, media)
        if trained:
            out.sum().backward()
        assert bool(out.isfinite().all())
        peaks.append((torch.cuda.max_memory_allocated() - before) / units)
        del out
    assert peaks[1] < 1.2 * peaks[0]

"""The elementwise kernels on a card: bfloat16 against the references, small odd and real sizes."""

from __future__ import annotations

import pytest
import torch
from support.elementwise_kit import cases, error, gradients, outputs, poisoned

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

NAMES = list(cases((1,), device="cpu", dtype=torch.float32))
SIZES = {"small": ((1, 40, 2, 0, 7), False), "one": ((1,), False), "real": ((513, 1, 2, 490), True)}


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_errs_no_more_than_the_reference(name: str, size: str) -> None:
    lengths, big = SIZES[size]
    case = cases(lengths, device="cuda", dtype=torch.bfloat16, big=big)[name]
    exact = gradients(case, case.reference, [one.float() for one in case.tensors], 1)
    theirs = gradients(case, case.reference, case.tensors, 1)
    with poisoned():
        mine = gradients(case, case.kernel(), case.tensors, 1)
    for kind, (found, half, single) in enumerate(zip(mine, theirs, exact, strict=True)):
        for number, (one, two, three) in enumerate(zip(found, half, single, strict=True)):
            assert one.dtype == two.dtype
            assert error(one, three) <= 1.05 * error(two, three) + 1e-6, (kind, number)


@pytest.mark.parametrize("size", ["small", "real"])
@pytest.mark.parametrize("name", NAMES)
def test_rounds_where_the_reference_does(name: str, size: str) -> None:
    lengths, big = SIZES[size]
    case = cases(lengths, device="cuda", dtype=torch.bfloat16, big=big)[name]
    found = outputs(case, case.kernel(), case.tensors)
    for one, other in zip(found, outputs(case, case.reference, case.tensors), strict=True):
        if one.dtype == torch.bfloat16:
            assert float((one == other).float().mean()) > 0.995


@pytest.mark.parametrize("name", NAMES)
def test_float32(name: str) -> None:
    case = cases((65, 3, 130), device="cuda", dtype=torch.float32)[name]
    wanted = gradients(case, case.reference, case.tensors, 1)
    with poisoned():
        found = gradients(case, case.kernel(), case.tensors, 1)
    for mine, theirs in zip(found, wanted, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert error(one, other) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_twice_the_same_bits(name: str) -> None:
    case = cases((700, 324), device="cuda", dtype=torch.bfloat16, big=True)[name]
    one, two = (gradients(case, case.kernel(), case.tensors, 1) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

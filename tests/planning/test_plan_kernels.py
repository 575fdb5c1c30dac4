"""``qcore plan`` with kernels of a plugin that raise when the plan loads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import wide_arch
from support.cli_kit import here

from qcore import hookimpl
from qcore.api import Kernel, Op, Verdict


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(wide_arch.install(tmp_path_factory.mktemp("site"))))
        yield wide_arch.checkpoint(tmp_path_factory.mktemp("wide"))


def broken() -> Callable[..., Any]:
    raise RuntimeError("no compiler")


def verify(device: object) -> Verdict:
    raise AssertionError("a plan verifies nothing")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(op: str, **functions: Any) -> None:
        def hook() -> Iterator[Op | Kernel]:
            yield Kernel(op=op, backend="fused", verify=verify, priority=99, **functions)

        hook.__name__ = "qcore_kernels"
        monkeypatch.setattr(wide_arch, "qcore_kernels", hookimpl(hook), raising=False)

    return install


@pytest.mark.parametrize("functions", [{"load": broken}, {"load": lambda: abs, "plan": broken}])
def test_a_kernel_that_raises_is_named_with_its_plugin(
    folder: Path,
    kernel: Callable[..., None],
    functions: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernel("qlora_linear", **functions)
    ended = here(capsys, "plan", folder, "--max-length", 64)
    line = ended.err.splitlines()[-1]
    assert ended.code == 69, ended.err
    assert line.startswith("error[QC-KERNEL-005] kernels.qlora_linear: "), line
    assert "plugin 'wide' (qcore-wide 1.0)" in line
    assert "fused: RuntimeError: no compiler (test_plan_kernels.py:" in line
    assert "Traceback" not in ended.err


def test_the_fix_of_the_error_works(
    folder: Path, kernel: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    kernel("qlora_linear", load=broken)
    words = ("plan", folder, "--max-length", 64, "--set", "kernels.qlora_linear=reference")
    assert here(capsys, *words).code == 0


def test_a_kernel_of_an_op_that_the_model_does_not_use_is_not_loaded(
    folder: Path, kernel: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    kernel("wide::unused", load=broken)
    assert here(capsys, "plan", folder, "--max-length", 64).code == 0

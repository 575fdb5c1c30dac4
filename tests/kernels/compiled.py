"""Every Triton kernel compiled for Hopper, without a card: run by `test_compiled`, alone.

A launch becomes a compilation for ``sm_90`` of the kernel with the types of its arguments; the
checks of the registry's backends are what launches. Prints a line an op, and what failed: what
does not compile, and every kernel of the source that no check launched. The interpreter, which
runs the kernels elsewhere in these tests, takes what the compiler does not.

Arguments are ops: their checks alone are run, the kernels of all others told as not launched.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction

import qcore.nn
import qcore_qwen35.ops
from qcore.nn.kernels import launch as launching

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
    torch.float64: "*fp64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
seen: set[Any] = set()
failed: list[str] = []


def compile_only(
    kernel: Any,
    grid: Any,
    *args: Any,
    flops: float = 0,
    share: float = 1,
    also: Any = (),
    **meta: Any,
) -> None:
    """In place of `launch`: nothing runs, outputs stay as they were allocated."""
    options = {name: meta.pop(name) for name in OPTIONS if meta.get(name) is not None}
    meta = {name: value for name, value in meta.items() if name not in OPTIONS}
    given = dict(zip(kernel.arg_names, args, strict=False)) | meta
    constants = {p.name for p in kernel.params if p.is_constexpr}
    unspecialized = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constexprs, aligned = {}, {}, {}
    for number, name in enumerate(kernel.arg_names):
        value = given[name] if name in given else kernel.params[number].default
        if name in constants or value is None:
            signature[name], constexprs[number,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned[number,] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in unspecialized:
            signature[name], constexprs[number,] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(int(value)) < 2**31 else "i64"
            if int(value) % 16 == 0 and name not in unspecialized:
                aligned[number,] = [["tt.divisibility", 16]]
    key = (kernel, *signature.items(), *constexprs.items(), *options.items())
    if key in seen:
        return
    seen.add(key)
    try:
        triton.compile(
            ASTSource(kernel, signature, constexprs, aligned), target=HOPPER, options=options
        )
    except (CompilationError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        failed.append(f"{name_of(kernel)}: {error}")


def name_of(kernel: Any) -> str:
    return f"{kernel.__module__}.{kernel.__name__}"


def modules(package: ModuleType) -> Iterator[ModuleType]:
    """Every module of a package, at any depth, whose name says Triton."""
    for root in map(Path, package.__path__):
        for path in sorted(root.rglob("*triton*.py")):
            inner = ".".join(path.relative_to(root).with_suffix("").parts)
            yield import_module(f"{package.__name__}.{inner}")


def entries() -> set[Any]:
    """Every kernel of core and the plugin that no other kernel calls: the host launches it."""
    found: set[Any] = set()
    for package in (qcore.nn, qcore_qwen35.ops):
        for module in modules(package):
            found |= {
                one
                for one in vars(module).values()
                if isinstance(one, JITFunction) and one.__module__ == module.__name__
            }
    called = {
        value
        for kernel in found
        for name in kernel.fn.__code__.co_names
        if isinstance(value := kernel.fn.__globals__.get(name), JITFunction)
    }
    return found - called


def say(*lines: str) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()


def main(ops: list[str]) -> int:
    """Compile what each check launches; the number of kernels that were not, or cannot be."""
    launching.launch = compile_only
    from qcore.nn.kernels.builtin import core_kernels
    from qcore_qwen35.kernels import kernels

    for record in (*core_kernels(), *kernels()):
        if record.backend != "triton" or (ops and record.op not in ops):
            continue
        before, began = len(seen), time.perf_counter()
        try:
            record.verify(torch.device("cpu"))
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            # Of numbers that no kernel wrote; what it would have launched next is missed below.
            say(f"  {record.op}: the check ended with {type(error).__name__}: {error}")
        say(f"{record.op}: {len(seen) - before} in {time.perf_counter() - began:.1f} s")
    wanted = entries()
    launched = {kernel for kernel, *_ in seen}
    failed.extend(sorted(f"{name_of(one)}: no check launches it" for one in wanted - launched))
    say(f"{len(wanted & launched)} of {len(wanted)} kernels", *failed)
    return len(failed)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 100))

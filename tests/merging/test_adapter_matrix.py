"""Adapters x bases: each cell equals PEFT's float32 merge within one bf16 step, or is refused.

The table says what a cell must be, from what PEFT computes: its own merge, for a tied base that of
a copy with two weights, for the names of other trainers that of the same values. The installed PEFT
makes the adapters; ``make test-matrix`` adds older ones, whose folders ``QCORE_PEFT`` names
(`tests/versions/matrix.sh`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import peft_recipes
from support.change_kit import step
from support.e2e_kit import ROOT, one_thread, write_stock
from support.fp8_kit import write_bf16, write_fp8
from support.moe_kit import canonical, rewrite, tensors_of
from support.peft_recipes import RECIPES
from torch import Tensor

from qcore.errors import QcoreError
from qcore.merging.merge import merge

pytestmark = pytest.mark.slow

BASES = ("dense", "tied", "MoE", "per expert", "FP8")
#: One line a recipe, one word a base: ``=`` equal, ``-`` no such weights, else the code.
TABLE = """
                     dense            tied             MoE              per-expert       FP8
q and v              =                =                =                =                =
linear               =                =                =                =                =
gates                =                =                =                =                =
all-linear           =                =                =                =                =
expression           =                =                =                =                =
some layers          =                =                =                =                =
excluded             =                =                =                =                =
rslora               =                =                =                =                =
patterns             =                =                =                =                =
regex patterns       =                =                =                =                =
bfloat16             =                =                =                =                =
float16              =                =                =                =                =
dora                 =                =                =                =                =
dora patterns        =                =                =                =                =
experts              -                -                =                =                -
gate_up              -                -                =                =                -
down                 -                -                =                =                -
experts rslora       -                -                =                =                -
experts patterns     -                -                =                =                -
router               -                -                =                =                -
head                 =                =                =                =                =
embedding            =                =                =                =                =
head and embedding   =                =                =                =                =
saved head           =                =                =                =                =
saved embedding      =                =                =                =                =
saved both           =                =                =                =                =
token rows           =                =                =                =                =
unchanged embedding  =                =                =                =                =
pissa                QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004
lora_bias            QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004
biases               QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004
ia3                  QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004
loha                 QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004   QC-ADAPTER-004
Unsloth              =                =                =                =                =
LLaMA-Factory        =                =                =                =                =
Axolotl              =                =                =                =                =
FSDP                 =                =                =                =                =
compiled             =                =                =                =                =
state dict           =                =                =                =                =
shards               =                =                =                =                =
Tinker               =                =                =                =                =
Tinker experts       -                -                =                =                -
per expert           -                -                =                =                -
"""  # noqa: E501
#: Recipes whose adapters differ between versions of PEFT, or may.
OLD = [
    "linear", "rslora", "regex patterns", "dora", "experts", "gate_up", "down", "experts patterns",
    "head", "saved both", "token rows", "unchanged embedding",
]  # fmt: skip


def cells() -> Iterator[tuple[str, str, str]]:
    """Recipe, base and what the table says of both."""
    for line in TABLE.splitlines()[2:]:
        for base, word in zip(BASES, line[21:].split(), strict=True):
            if word != "-":
                yield line[:21].strip(), base, word


CELLS = list(cells())


def versions() -> list[str]:
    """Folders with other versions of PEFT."""
    return [name for name in os.environ.get("QCORE_PEFT", "").split(os.pathsep) if name]


@pytest.fixture(scope="module")
def bases(once: Callable[..., Path]) -> Callable[[str], Path]:
    """The folder of a base; beside FP8 its decoded copy."""

    def write(home: Path) -> None:
        for name in ("dense", "tied"):
            write_stock(home / name, tied=name == "tied", dtype=torch.bfloat16)
        write_fp8(home / "dense", home / "FP8")
        write_bf16(home / "FP8", home / "decoded")
        stock = write_stock(home / "stock", tied=False, moe=True, dtype=torch.bfloat16)
        rewrite(stock, home / "MoE", "fused")
        rewrite(stock, home / "per expert", "apart")

    return lambda name: once("matrix-bases", write) / name


@pytest.fixture(scope="module")
def made(
    bases: Callable[[str], Path], once: Callable[..., Path]
) -> Callable[[str, str, str], Path]:
    """The folder of a recipe on a base, made by a version of PEFT in a process of its own."""

    def write(out: Path, base: str, peft: str) -> None:
        moe = base == "MoE"
        wanted = [name for name, on, _ in CELLS if on == base and (not peft or name in OLD)]
        job = {"base": str(bases("decoded" if base == "FP8" else base)), "moe": moe,
               "out": str(out), "recipes": wanted}  # fmt: skip
        ended = subprocess.run(
            [sys.executable, peft_recipes.__file__, json.dumps(job)],
            capture_output=True, text=True, timeout=600, check=False,
            env=one_thread() | ({"PYTHONPATH": peft} if peft else {}),
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr[-3000:]

    def folder(recipe: str, base: str, peft: str = "") -> Path:
        base = "MoE" if base == "per expert" else base  # transformers has one class for both
        name = f"matrix-{base}-{Path(peft).name}"
        return once(name, lambda home: write(home, base, peft)) / recipe

    return folder


@pytest.mark.parametrize(
    ("recipe", "base", "word"), CELLS, ids=[f"{recipe} on {base}" for recipe, base, _ in CELLS]
)
def test_a_cell(
    bases: Callable[[str], Path], made: Any, tmp_path: Path, recipe: str, base: str, word: str
) -> None:
    check(made(recipe, base), bases(base), tmp_path / "out", word)


@pytest.mark.parametrize("peft", versions(), ids=[Path(name).name for name in versions()])
@pytest.mark.parametrize("base", BASES)
def test_other_versions_of_peft(
    bases: Callable[[str], Path], made: Any, tmp_path: Path, peft: str, base: str
) -> None:
    seen: Counter[str] = Counter()
    for recipe, of, word in CELLS:
        if of != base or recipe not in OLD:
            continue
        folder = made(recipe, base, peft)
        if not (folder / "merged.safetensors").exists():
            seen["not made"] += 1  # by that version
            continue
        config = json.loads((folder / "adapter/adapter_config.json").read_text())
        assert config.get("peft_version", "").split("@")[0] == Path(peft).name
        check(folder, bases(base), tmp_path / recipe, word)
        seen[word] += 1
    assert seen["="] >= 6, seen


def check(made: Path, base: Path, out: Path, word: str) -> None:
    """Merge, and compare with what the table says."""
    adapter = made / "adapter"
    if word != "=":
        with pytest.raises(QcoreError) as caught:
            run(base, adapter, out)
        errors = [caught.value, *getattr(caught.value, "errors", ())]
        assert word in {error.code for error in errors}, caught.value.message
        for error in errors:
            assert "\n" not in error.message or len(errors) > 1
            assert error.fix, error.message
            assert str(adapter) in error.message
        assert not out.exists()
        return
    run(base, adapter, out)
    theirs = load_file(made / "merged.safetensors")
    assert equal(canonical(tensors_of(out)), before(base), theirs) > 0


def run(base: Path, adapter: Path, out: Path) -> None:
    """Merge; a base in FP8 is written in bfloat16."""
    merge(
        str(base), adapter, out, trust_base=True, dequantize=base.name == "FP8",
        prove=base.name in ("dense", "MoE"),
    )  # fmt: skip


def before(base: Path) -> dict[str, Tensor]:
    """The tensors of a base, fused, of FP8 those of its decoded copy."""
    return canonical(tensors_of(base.parent / "decoded" if base.name == "FP8" else base))


def equal(mine: dict[str, Tensor], base: dict[str, Tensor], theirs: dict[str, Tensor]) -> int:
    """Compare every tensor of a merge with PEFT's; the number of those that changed."""
    head, embedding = "lm_head.weight", f"{ROOT}embed_tokens.weight"
    changed = 0
    for name, value in mine.items():
        if name not in theirs:  # what the class does not have, such as the tower of the text class
            assert torch.equal(value, base[name]), name
            continue
        of_base = base.get(name, base[embedding])  # a head of its own in place of a tied one
        assert value.dtype == of_base.dtype
        wanted = theirs[name].reshape(value.shape)
        if torch.equal(wanted, of_base.float()):
            assert torch.equal(value, of_base), name
            continue
        changed += 1
        # Where weight and delta cancel out, PEFT's sum has the float32 error of its terms.
        allowed = step(wanted) + 2**-22 * of_base.float().abs()
        off = (value.float() - wanted).abs() / allowed
        assert bool((off <= 1).all()), f"{name}: off by {float(off.max()):.2f} of what is allowed"
    assert base.keys() <= mine.keys()
    if head not in mine:  # still tied
        assert torch.equal(theirs.get(head, theirs[embedding]), theirs[embedding])
    return changed


def test_the_table_is_whole() -> None:
    """Every recipe is in it; the counts that are reported are those of the table."""
    assert {recipe for recipe, _, _ in CELLS} == RECIPES.keys()
    assert all(base in ("MoE", "per expert") for recipe, base, _ in CELLS if RECIPES[recipe].moe)
    words = Counter("=" if word == "=" else "refused" for _, _, word in CELLS)
    assert words == {"=": 166, "refused": 25}

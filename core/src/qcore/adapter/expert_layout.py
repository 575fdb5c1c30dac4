"""Which of PEFT's two layouts the expert matrices of an adapter have.

PEFT before 0.19.1 takes the dims of a stack ``[E, out, in]`` the other way round: its A has
``out`` columns, its B has ``in`` rows, and the delta of expert e is ``A_e^T B_e^T`` (PEFT pull
request 3165; ``tuners/lora/layer.py``, ``ParamWrapper``). This file decides which layout an adapter
has: the shapes show it, except for a square stack, where both layouts have the same shapes and the
version of PEFT in the adapter's files decides. An adapter has one layout. Without certain evidence
for a square stack it is refused, because the other reading merges an unrelated delta.

Code: ``QC-ADAPTER-014`` the evidence contradicts itself or is missing.

Shapes: E experts, r rank of one LoRA pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..api.parameters import Tensor as TableTensor
from ..checkpoint.checkpoint import Header, read_json, safe_file
from ..errors import InputError

#: The first release with today's layout. Of development versions of it, either may be.
_CHANGED = (0, 19, 1)
#: NVIDIA NeMo Automodel writes the layout into this file, and no version of PEFT anywhere.
_AUTOMODEL = "automodel_peft_config.json"
_AUTOMODEL_KEY = "paramwrapper_layout"
OLDER, NEWER = "PEFT before 0.19.1", "PEFT 0.19.1 and later"


class Stack(NamedTuple):
    """A stack of experts that has LoRA, and its two matrices in the file."""

    tensor: TableTensor
    a: Header
    b: Header

    def layout(self) -> str | None:
        """Return the layout that its shapes prove; ``None`` for a square stack or a bad shape."""
        _, out, into = self.tensor.shape
        if out == into or len(self.a.shape) != 2 or len(self.b.shape) != 2:
            return None
        found = (self.a.shape[1], self.b.shape[0])
        return {(into, out): NEWER, (out, into): OLDER}.get(found)

    @property
    def square(self) -> bool:
        """Whether both layouts have the same shapes."""
        return self.tensor.shape[1] == self.tensor.shape[2]


@dataclass(frozen=True, slots=True)
class Statement:
    """What a file of the adapter says about the layout.

    Attributes:
        source: file, field and value, for reports.
        layout: the layout that follows from it; ``None`` if either is possible.
    """

    source: str
    layout: str | None


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The layout of an adapter's expert matrices.

    Attributes:
        older: whether it is that of PEFT before 0.19.1.
        note: one line for the report; empty for today's layout.
    """

    older: bool = False
    note: str = ""


def statements(folder: Path, config: Mapping[str, Any]) -> list[Statement]:
    """Return what the files of an adapter say about the layout of its experts.

    Args:
        folder: the adapter folder.
        config: content of adapter_config.json.

    Raises:
        InputError: a file of NeMo Automodel that is not JSON.
    """
    said = []
    version = config.get("peft_version")
    if isinstance(version, str) and version:
        said.append(Statement(f"peft_version {version}", _layout_of(version)))
    if (folder / _AUTOMODEL).is_file():
        stamp = read_json(safe_file(folder, _AUTOMODEL)).get(_AUTOMODEL_KEY)
        if isinstance(stamp, str):
            layout = _layout_of(stamp.removeprefix("peft-"))
            said.append(Statement(f"{_AUTOMODEL_KEY} {stamp} in {_AUTOMODEL}", layout))
    return said


def _layout_of(version: str) -> str | None:
    """Return the layout that a version of PEFT writes; ``None`` if it is not known."""
    match = re.match(r"v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", version)
    if match is None:
        return None
    release = tuple(int(part or 0) for part in match.groups())
    if release == _CHANGED and re.match(r"[.\-_]?(dev|a|b|rc)", version[match.end() :]):
        return None
    return NEWER if release >= _CHANGED else OLDER


def expert_layout(
    path: Path, stacks: Iterable[Stack], said: Sequence[Statement]
) -> ExpertLayout | InputError:
    """Decide which layout the expert matrices of an adapter have.

    Args:
        path: file of the matrices, for errors.
        stacks: all stacks that have both matrices.
        said: what the adapter's files say (`statements`).

    Returns:
        The layout, or the error ``QC-ADAPTER-014``.
    """
    every = list(stacks)
    shown = {stack.layout(): stack for stack in every if stack.layout() is not None}
    square = next((stack for stack in every if stack.square), None)
    if len(shown) > 1:
        return _uncertain(
            path,
            shown[OLDER],
            "has the shapes of PEFT before 0.19.1, and other experts have those of later versions",
            found=f"{list(shown[OLDER].a.shape)} here, {list(shown[NEWER].a.shape)} in "
            f"{shown[NEWER].a.name}",
        )
    proved = next(iter(shown), None)
    claimed = {statement.layout for statement in said} - {None}
    sources = [statement.source for statement in said]
    if square is None:
        if proved is not None and claimed - {proved}:
            return ExpertLayout(older=proved == OLDER, note=_against(proved, " and ".join(sources)))
        return _decided(proved, "by their shapes")
    if proved is not None:
        claimed.add(proved)
        sources.append("the shapes of the other experts")
    if len(claimed) != 1:
        return _uncertain(
            path,
            square,
            "is square, so its shape does not show which version of PEFT laid it out, and the "
            "other evidence contradicts itself"
            if claimed
            else "is square, so its shape does not show which version of PEFT laid it out",
            found=" and ".join(sources) or "no peft_version",
        )
    return _decided(claimed.pop(), f"by {' and '.join(sources)}")


def _decided(layout: str | None, sources: str) -> ExpertLayout:
    if layout != OLDER:
        return ExpertLayout()
    return ExpertLayout(
        older=True,
        note=f"the adapter's experts are read in the layout of {OLDER}, {sources}",
    )


def _against(layout: str, sources: str) -> str:
    return (
        f"warning: the shapes of the adapter's experts are those of {layout}, against {sources}: "
        "they are read by their shapes"
    )


def _uncertain(path: Path, stack: Stack, what: str, *, found: str) -> InputError:
    return InputError(
        "QC-ADAPTER-014",
        what,
        file=path,
        field=stack.a.name,
        found=found,
        expected=f"evidence of {OLDER} or of {NEWER}",
        fix="set peft_version in adapter_config.json to the version of PEFT that saved the adapter",
    )

"""Non-finite values in a run: the checks before tensors are written, and what an error adds.

This file decides that no checkpoint or adapter with a NaN or an infinity is published, and that
an error which stops a run names the newest checkpoint that is intact, after it was read again.
`step` checks the loss, the gradient and the parameters of each step.

Code: ``QC-TRAIN-015`` a parameter or a moment of the optimizer is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import NumericError
from ..io.artifact import verify
from ..nn.value_range import is_finite

#: Errors of values that a run computed: their fix names the checkpoint to return to.
_OF_VALUES: Final = frozenset(f"QC-TRAIN-{number:03}" for number in (3, 12, 15, 16, 17))


def check_written(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Refuse to write a tensor that is not finite.

    Args:
        tensors: names and values.
        what: of which they are, for the error.

    Raises:
        NumericError: ``QC-TRAIN-015``.
    """
    for name, value in tensors:
        if not is_finite(value):
            raise NumericError(
                "QC-TRAIN-015",
                f"holds a value that is not finite, so the {what} is not written",
                field=name,
                found=_found(value),
                fix="lower learning_rate",
            )


def _found(value: Tensor) -> str:
    """How many values are not finite."""
    return f"{int((~torch.isfinite(value)).sum())} of {value.numel()} values NaN or infinite"


def checkpoint_words(paths: Iterable[Path]) -> str:
    """Name the newest checkpoint that is intact and finite; each is read again for that.

    Args:
        paths: checkpoints, oldest first.
    """
    damaged: list[str] = []
    for path in reversed([*paths]):
        report = verify(path)
        problem = "" if report.ok else str(report.problems[0])
        if not problem:
            files = sorted(path.glob("*.safetensors"))
            wrong = [n for file in files for n, v in load_file(file).items() if not is_finite(v)]
            problem = f"{wrong[0]} is not finite" if wrong else ""
        if not problem:
            return "; ".join([*damaged, f"{path} is intact (verified now)"])
        damaged.append(f"{path.name} is damaged: {problem}")
    none = "no checkpoint is intact" if damaged else "no checkpoint was written"
    return "; ".join([*damaged, none])


@contextmanager
def naming_checkpoint(listed: Callable[[], Iterable[Path]]) -> Iterator[None]:
    """Add to an error about the values of a run which checkpoint is intact.

    Args:
        listed: returns the checkpoints, oldest first; called when an error occurs.
    """
    try:
        yield
    except NumericError as error:
        if error.code not in _OF_VALUES:
            raise
        words = checkpoint_words(listed())
        raise error.replace(fix=f"{error.fix}; {words}" if error.fix else words) from None

"""What an adapter changes: one record for each weight, from headers alone.

This file decides the kinds of change: a LoRA pair, also with the magnitude of DoRA, and values that
replace a weight or some of its rows. `qcore.adapter.reader` matches the tensors of an adapter with
these records, and `qcore.adapter.delta` computes them. It imports no torch.

DoRA: Liu et al. 2024. Shapes: E experts, r rank of one LoRA pair, V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..api.parameters import Tensor as TableTensor
from ..checkpoint.checkpoint import Header


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """Values that take the place of a weight, or of some of its rows.

    PEFT writes them for ``modules_to_save`` and ``trainable_token_indices``.

    Attributes:
        tensor: the weight.
        values: the new values: in the shape of the weight, or ``[n, ...]`` for n rows.
        rows: the row of the weight that each row of `values` replaces; ``None``: all of them.
        shared: whether a head that is tied to the weight gets the values too. PEFT gives it trained
            rows, and copies that ``modules_to_save`` does not name, which it loads into the weight.
    """

    tensor: TableTensor
    values: Header
    rows: tuple[int, ...] | None = None
    shared: bool = False

    @property
    def headers(self) -> tuple[Header, ...]:
        """The tensors of the adapter that make this change."""
        return (self.values,)

    @property
    def is_lora(self) -> bool:
        """Never: the values are put into the weight before it is used."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Headers of the two matrices that change one weight to ``W + scaling * B A``.

    Attributes:
        tensor: the weight; for a stack of experts, the formula holds for each expert.
        a: ``[r, in]``; for experts ``[E r, in]``, where row ``e r + k`` belongs to expert e.
        b: ``[out, r]``; for experts ``[out, r E]``, where column ``k E + e`` belongs to expert e.
        r: rank; for experts, the rank of each expert.
        scaling: factor of the product.
        older: whether the file has the layout of PEFT before 0.19.1 for this stack of experts: a is
            ``[E r, out]`` and b ``[in, r E]``, and the delta of an expert ``A^T B^T``.
        magnitude: DoRA's vector m ``[out]``: each row of the sum is scaled to this length; ``None``
            for plain LoRA.
        embedding: whether the file has the layout of PEFT's LoRA on an embedding ``[V, H]``: a is
            ``[r, V]`` and b ``[H, r]``, and the delta ``A^T B^T``.
        under: values that replace the weight, or rows of it, before the product is added.
    """

    tensor: TableTensor
    a: Header
    b: Header
    r: int
    scaling: float
    older: bool = False
    magnitude: Header | None = None
    embedding: bool = False
    under: Replacement | None = None

    @property
    def headers(self) -> tuple[Header, ...]:
        """The tensors of the adapter that make this change."""
        others = () if self.magnitude is None else (self.magnitude,)
        below = () if self.under is None else self.under.headers
        return (self.a, self.b, *others, *below)

    @property
    def is_lora(self) -> bool:
        """Whether `qcore.nn.qlora` computes the change beside the frozen weight, as in training."""
        plain = self.magnitude is None and self.under is None
        return plain and self.tensor.row.kind is not None


Change = Pair | Replacement

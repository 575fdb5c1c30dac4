"""What an adapter changes: one record for each weight, from headers alone.

This file decides the kinds of change: a LoRA pair, also with the magnitude of DoRA, and values that
replace a weight or some of its rows. A pair consists of pieces, because other layouts than PEFT's
have modules for a part of a weight, for one expert, or for several weights at once.
`qcore.adapter.matching` matches the tensors of an adapter with these records, and
`qcore.adapter.delta` computes them. It imports no torch.

DoRA: Liu et al. 2024. Shapes: E experts, r rank of one LoRA pair, n rows, V vocabulary, H hidden
size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..api.parameters import Kind
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
        under: values that replace the weight before its rows are replaced.
    """

    tensor: TableTensor
    values: Header
    rows: tuple[int, ...] | None = None
    shared: bool = False
    under: Replacement | None = None

    @property
    def headers(self) -> tuple[Header, ...]:
        """The tensors of the adapter that make this change."""
        return (self.values, *(() if self.under is None else self.under.headers))

    def lacks(self, rows: range) -> tuple[int, int | None]:
        """Count the rows of the weight among `rows` that no value replaces; also the first.

        The ids come from a file: work is bounded by the number of values, not by the range.
        """
        below = self if self.rows is None else self.under
        whole = 0 if below is None else below.values.shape[0]
        rest = range(min(max(rows.start, whole), rows.stop), rows.stop)
        own = {row for row in self.rows or () if row in rest}
        first = next((row for row in rest if row not in own), None)
        return rest.stop - rest.start - len(own), first

    @property
    def is_lora(self) -> bool:
        """Never: the values are put into the weight before it is used."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Headers of two matrices that add ``scaling * B A`` to some rows of a weight.

    Attributes:
        a: ``[r, in]``. For a stack of experts ``[E r, in]``, where row ``e r + k`` belongs to
            expert e; or ``[E, r, in]``; or ``[1, r, in]``, which all experts share.
        b: ``[n, r]``. For a stack of experts ``[n, r E]``, where column ``k E + e`` belongs to
            expert e; or ``[E, n, r]``; or ``[1, n, r]``, which all experts share.
        r: rank; for experts, the rank of each expert.
        scaling: factor of the product.
        rows: rows of the weight, or of each expert, that change; ``None`` for all.
        source: rows of b that change them; ``None`` for all. A module that covers several weights
            has rows for each of them.
        expert: the only expert that changes, for which a and b have two dimensions; ``None`` for a
            whole stack and for other weights.
        older: whether the file has the layout of PEFT before 0.19.1 for this stack of experts: a is
            ``[E r, out]`` and b ``[in, r E]``, and the delta of an expert ``A^T B^T``.
        magnitude: DoRA's vector m ``[n]``: each row of the sum is scaled to this length; ``None``
            for plain LoRA. It has the rows of b.
        embedding: whether the file has the layout of PEFT's LoRA on an embedding ``[V, H]``: a is
            ``[r, V]`` and b ``[H, r]``, and the delta ``A^T B^T``.
    """

    a: Header
    b: Header
    r: int
    scaling: float
    rows: slice | None = None
    source: slice | None = None
    expert: int | None = None
    older: bool = False
    magnitude: Header | None = None
    embedding: bool = False

    @property
    def headers(self) -> tuple[Header, ...]:
        """The tensors of the adapter that make this change."""
        own = (self.a, self.b)
        return own if self.magnitude is None else (*own, self.magnitude)

    @property
    def is_peft(self) -> bool:
        """Whether the matrices have PEFT's layout for the whole weight."""
        whole = self.rows is None and self.source is None and self.expert is None
        return whole and len(self.a.shape) == 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The pieces that change one weight to ``W + scaling * B A``.

    Attributes:
        tensor: the weight; for a stack of experts, the formula holds for each expert.
        pieces: at least one. A of the pair has the rows of each A, and B has each B in the rows and
            columns where it acts.
        under: values that replace the weight, or rows of it, before the product is added.
    """

    tensor: TableTensor
    pieces: tuple[Piece, ...]
    under: Replacement | None = None

    @property
    def r(self) -> int:
        """Rank of the assembled pair; for experts, of each expert, padded to the largest."""
        if self.tensor.row.kind is not Kind.EXPERTS:
            return sum(piece.r for piece in self.pieces)
        every, own = 0, Counter[int]()
        for piece in self.pieces:
            if piece.expert is None:
                every += piece.r
            else:
                own[piece.expert] += piece.r
        return every + max(own.values(), default=0)

    @property
    def scaling(self) -> float:
        """Factor of the product: that of all pieces, or 1 where the assembled B contains them."""
        first = self.pieces[0].scaling
        return first if all(piece.scaling == first for piece in self.pieces) else 1.0

    @property
    def is_peft(self) -> bool:
        """Whether the pair is a single piece in PEFT's layout."""
        return len(self.pieces) == 1 and self.pieces[0].is_peft

    @property
    def older(self) -> bool:
        """Whether the file has the layout of PEFT before 0.19.1."""
        return any(piece.older for piece in self.pieces)

    @property
    def has_magnitude(self) -> bool:
        """Whether the pair is DoRA."""
        return any(piece.magnitude is not None for piece in self.pieces)

    @property
    def headers(self) -> Iterator[Header]:
        """The tensors of the adapter that make this change."""
        yield from (header for piece in self.pieces for header in piece.headers)
        yield from () if self.under is None else self.under.headers

    @property
    def is_lora(self) -> bool:
        """Whether `qcore.nn.qlora` computes the change beside the frozen weight, as in training."""
        plain = not self.has_magnitude and self.under is None
        return plain and self.tensor.row.kind is not None


Change = Pair | Replacement

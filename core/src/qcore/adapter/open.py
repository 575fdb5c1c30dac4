"""`open_model` and `open_adapter` for scripts: tensors and LoRA deltas by canonical name.

This file decides the public, read-only view of both: mappings that read a tensor on access. Names
are canonical, independent of the layout of the files; experts are one stack. It writes nothing;
`publish` does.

Shapes: E experts, r rank of one LoRA pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api.parameters import Kind
from ..errors import InputError
from ..nn.load import read_tensor
from ..plugins.resolve_model import Identified, identify
from .changes import Pair
from .delta import Deltas
from .evidence import read_for
from .peft_names import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel(Mapping[str, Tensor]):
    """The tensors of a model, by canonical name.

    ``model[name]`` reads a tensor from disk to the CPU, in its dtype on disk; block FP8 is
    decoded to bfloat16. It raises `KeyError` for an unknown name and a `QcoreError` if the
    file cannot be read. Optional parts that the checkpoint lacks have no names. A tied tensor
    that is not on disk reads the tensor that it is tied to.

    Attributes:
        identified: the checkpoint, its plugins, the architecture decision and the layout.
    """

    identified: Identified

    @property
    def path(self) -> Path:
        """The model folder."""
        return self.identified.checkpoint.path

    @property
    def architecture(self) -> str:
        """Name of the architecture."""
        return self.identified.decision.architecture.name

    @property
    def generation(self) -> str:
        """Name of the generation."""
        return self.identified.decision.generation.name

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""
        return self.identified.checkpoint.config

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self.identified.layout.located[name].tensor.shape

    def __getitem__(self, name: str) -> Tensor:
        located = self.identified.layout.located[name]
        if located.tied is not None:
            located = self.identified.layout.located[located.tied]
        return read_tensor(self.identified.checkpoint, located)

    def __iter__(self) -> Iterator[str]:
        return iter(self.identified.layout.located)

    def __len__(self) -> int:
        return len(self.identified.layout.located)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraDelta:
    """The LoRA delta of one weight: ``scaling * b @ a``.

    Attributes:
        name: canonical name of the weight.
        a: ``[r, in]`` float32; for a stack of experts ``[E, r, in]``.
        b: ``[out, r]`` float32; for a stack of experts ``[E, out, r]``.
        r: rank; for experts, the rank of each expert.
        scaling: factor of the product.
    """

    name: str
    a: Tensor
    b: Tensor
    r: int
    scaling: float

    def dense(self) -> Tensor:
        """Return the delta in the shape of the weight, float32, computed in float64."""
        return (self.scaling * (self.b.double() @ self.a.double())).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAdapter(Mapping[str, LoraDelta]):
    """The LoRA deltas of an adapter, by canonical name of the weight that they change.

    Attributes:
        adapter: the adapter's pairs, matched with the layout of its base; `adapter.meta` is what
            qcore recorded in the manifest.
        deltas: the matrices, in memory.
    """

    adapter: Adapter
    deltas: Deltas

    @property
    def path(self) -> Path:
        """The adapter folder."""
        return self.adapter.path

    def __getitem__(self, name: str) -> LoraDelta:
        pair = self.adapter.pairs[name]
        a, b = _by_expert(pair, *self.deltas.sides(name))
        return LoraDelta(name=name, a=a, b=b, r=pair.r, scaling=pair.scaling)

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapter.pairs)

    def __len__(self) -> int:
        return len(self.adapter.pairs)


def _by_expert(pair: Pair, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Move the experts of a stack to dim 0; `Pair` describes how PEFT interleaves them."""
    if pair.tensor.row.kind is not Kind.EXPERTS:
        return a, b
    experts = pair.tensor.shape[0]
    by_rank = b.view(b.shape[0], pair.r, experts)
    return a.view(experts, pair.r, a.shape[1]), by_rank.permute(2, 0, 1).contiguous()


def open_model(model: str | Path, *, generation: str = "") -> OpenModel:
    """Open a model to read its tensors.

    Args:
        model: a folder or a hub id.
        generation: generation to assume if the checkpoint has no evidence of it; it never
            overrides evidence.

    Returns:
        The model; no weight has been read.

    Raises:
        QcoreError: no plugin claims the model, or not every tensor is accounted for.
    """
    return OpenModel(identified=identify(str(model), generation=generation))


def open_adapter(
    adapter: str | Path,
    model: OpenModel | str | Path,
    *,
    trust_base: bool = False,
    trust_generation: bool = False,
) -> OpenAdapter:
    """Open an adapter to read its deltas.

    The weights of the base are not read, so their fingerprint is not compared with the one that
    training recorded; `merge` and `generate` compare it.

    Args:
        adapter: the adapter folder.
        model: the base of the adapter.
        trust_base: accept an adapter without a fingerprint of its base.
        trust_generation: accept such an adapter if it names a base of another generation.

    Returns:
        The adapter; its matrices are in memory.

    Raises:
        QcoreError: the adapter does not fit the base, or is damaged.
    """
    base = (model if isinstance(model, OpenModel) else open_model(model)).identified
    matched = read_for(base, adapter, trust_base=trust_base, trust_generation=trust_generation)
    if matched.folded:
        raise InputError(
            "QC-ADAPTER-016",
            "has changes that are not LoRA deltas",
            file=matched.path,
            field=min(matched.folded),
            found=f"DoRA or saved weights at {len(matched.folded)} weights",
            expected="plain LoRA",
            fix="merge the adapter, and compare the tensors of the merge with those of the base",
        )
    with torch.no_grad():
        return OpenAdapter(adapter=matched, deltas=Deltas(matched))

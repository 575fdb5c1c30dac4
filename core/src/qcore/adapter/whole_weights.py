"""Adapter tensors that are no LoRA on a linear map: heads, embeddings, saved modules, token rows.

This file decides which weight of the base such a tensor belongs to, that a saved weight with the
values of the base changes nothing, and what the refusal of the others says: the cause in the
adapter and an exact way. `qcore.adapter.reader` reports both. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..api.parameters import Namespace
from ..api.parameters import Tensor as TableTensor
from ..checkpoint.checkpoint import Header
from .peft_names import spell

#: Whether a tensor of the adapter has the values of a weight of the base, by canonical name.
Equal = Callable[[Header, str], bool]

_PREFIX = "base_model.model."
WITH_PEFT = (
    "merge it with stock transformers and PEFT (PeftModel.from_pretrained, merge_and_unload, "
    "save_pretrained)"
)
_UNTIE = (
    "store lm_head.weight in the base as a copy of the embedding, set tie_word_embeddings to false "
    "in config.json and its text_config, and then "
)
#: Ends of names -> what the tensor is.
_ENDS = {
    ".lora_A.weight": "is LoRA",
    ".lora_B.weight": "is LoRA",
    ".lora_embedding_A": "is LoRA",
    ".lora_embedding_B": "is LoRA",
    ".lora_magnitude_vector": "is a magnitude of DoRA",
    ".token_adapter.trainable_tokens_delta": "holds trained rows (trainable_token_indices)",
    ".trainable_tokens_delta": "holds trained rows (trainable_token_indices)",
    ".base_layer.weight": "is a saved copy",
    ".weight": "is a saved copy (modules_to_save or save_embedding_layers)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A tensor of an adapter that belongs to a weight without being LoRA on a linear map.

    Attributes:
        tensor: the weight.
        is_copy: whether it holds the whole weight.
        what: what the tensor is.
    """

    tensor: TableTensor
    is_copy: bool
    what: str

    def cause(self, header: Header) -> str:
        """Return why it is refused."""
        rows = self.tensor.shape[0]
        where = f"of {self.tensor.name}" if self.is_copy else f"on {self.tensor.name}"
        if self.is_copy and header.shape[1:] == self.tensor.shape[1:] and header.shape[0] > rows:
            return f"{self.what} {where} with {header.shape[0] - rows} rows that the base lacks"
        if self.is_copy:
            return f"{self.what} {where} with other values than the base"
        return f"{self.what} {where}, which qcore does not merge"

    def fix(self, header: Header, tied: bool) -> str:
        """Return an exact way to use the adapter.

        Args:
            header: the tensor.
            tied: whether the base has one weight for the embedding and the head.
        """
        if self.is_copy and header.shape[0] > self.tensor.shape[0]:
            return (
                f"add the rows to the base (model.resize_token_embeddings({header.shape[0]}) of "
                f"stock transformers), and {WITH_PEFT}"
            )
        if tied and self.tensor.row.group in ("head", "embed"):
            return _UNTIE + WITH_PEFT
        return WITH_PEFT


def whole_of(name: str, tensors: Iterable[TableTensor], namespace: Namespace) -> Whole | None:
    """Return the weight that a tensor of an adapter belongs to; ``None`` if it fits no weight.

    Args:
        name: name of the tensor in the adapter.
        tensors: the weights of the base.
        namespace: the class that the adapter is written for.
    """
    end = next((end for end in _ENDS if name.endswith(end)), None)
    if end is None or not name.startswith(_PREFIX):
        return None
    weight = name.removeprefix(_PREFIX).removesuffix(end) + ".weight"
    for tensor in tensors:
        if spell(tensor, namespace) == weight:
            return Whole(tensor=tensor, is_copy=end.endswith(".weight") and "lora" not in end,
                         what=_ENDS[end])  # fmt: skip
    return None

"""Protocols of the checkpoint, its files, the tensor layout and the settings that hooks receive.

This file decides which attributes of a checkpoint, a chat template, a tokenizer, a layout and a
run's settings a hook may use. Core passes its own objects, which have more; what is not here may
change in any version. It holds no behavior and imports nothing of core but the parameter table,
so that records and hook specifications point at no internal class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .parameters import Namespace, Part, Region, Store, Table, Tensor
from .parameters import Row as TableRow

Plain = bool | int | float | str


class Header(Protocol):
    """One tensor of a safetensors file, as its header describes it."""

    @property
    def name(self) -> str:
        """Name on disk."""
        ...

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype: ``BF16``, ``F8_E4M3``."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dimensions."""
        ...

    @property
    def file(self) -> str:
        """The safetensors file that holds it."""
        ...

    @property
    def numel(self) -> int:
        """Number of elements."""
        ...

    @property
    def start(self) -> int:
        """Offset of its first byte in the file."""
        ...

    @property
    def end(self) -> int:
        """Offset after its last byte in the file."""
        ...


class TemplateView(Protocol):
    """A chat template. It runs in a bounded process that core starts and ends."""

    @property
    def text(self) -> str:
        """The Jinja source."""
        ...

    @property
    def source(self) -> str:
        """The file it came from, for errors."""
        ...

    @property
    def sha256(self) -> str:
        """Hex digest of the text without trailing newlines, which files gain and lose."""
        ...

    def inputs(self) -> frozenset[str]:
        """Variables that the template reads from its caller.

        Raises:
            InputError: ``QC-TEMPLATE-001`` does not parse, and the limits, as in `render`.
        """
        ...

    def switches(self) -> frozenset[str]:
        """Variables of its own that the template reads: `inputs` without what all templates get.

        Raises:
            InputError: as `inputs`.
        """
        ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text, exactly as transformers' ``apply_chat_template`` gives it.

        Args:
            messages: JSON values only.
            tools: function descriptions, JSON values only.
            add_generation_prompt: end with what opens the assistant's next turn.
            variables: further inputs of the template, e.g. ``enable_thinking``.

        Raises:
            InputError: ``QC-TEMPLATE-001`` to ``-007``: the template does not parse, raises,
                fails, or exceeds its limits.
        """
        ...


class TokenizerView(Protocol):
    """A tokenizer of the ``tokenizers`` library, as far as a plugin uses it."""

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Ids by token."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id of one token; ``None`` where it is not in the vocabulary."""
        ...


class CheckpointView(Protocol):
    """A model folder before any weight is read."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...

    @property
    def source(self) -> str:
        """What the user named: a folder or a hub id."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """config.json; not to be changed."""
        ...

    @property
    def headers(self) -> Mapping[str, Header]:
        """Tensors by name on disk, over all shards."""
        ...

    @property
    def sidecars(self) -> tuple[str, ...]:
        """Names of the other files of the folder: tokenizer, template, processor files."""
        ...

    @property
    def template(self) -> TemplateView | None:
        """The chat template; ``None`` where the folder has none.

        Raises:
            InputError: ``QC-CKPT-002`` a file that holds it cannot be read as it should.
        """
        ...

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json, or empty. Raises `InputError` ``QC-CKPT-002``."""
        ...

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or empty. Raises `InputError` ``QC-CKPT-002``."""
        ...

    def file(self, name: str) -> Path:
        """A file of the folder, proved to lie inside it.

        Raises:
            InputError: ``QC-CKPT-003`` an unsafe path, ``-006`` no such file.
        """
        ...

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object from a file of the folder; duplicate keys are refused.

        Raises:
            InputError: as `file`; ``QC-CKPT-002`` not one JSON object.
        """
        ...

    def load_tokenizer(self) -> TokenizerView:
        """The tokenizer of tokenizer.json; reads the file at each call.

        Raises:
            InputError: ``QC-TOKENIZER-001`` no tokenizer.json, or one that does not load.
        """
        ...


class LayoutView(Protocol):
    """A checkpoint's tensors explained by the parameter table."""

    @property
    def table(self) -> Table:
        """The table, with the parts of all plugins."""
        ...

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of optional parts of which the checkpoint has no tensor."""
        ...

    @property
    def namespaces(self) -> Mapping[str, Namespace]:
        """The namespace that the files use, by part."""
        ...

    @property
    def by_disk(self) -> Mapping[str, tuple[Tensor, Region]]:
        """Name on disk -> canonical tensor, and the region of it that lies there."""
        ...

    def loads(self, part: Part) -> bool:
        """Whether this run holds the part's tensors in memory."""
        ...

    def store(self, row: TableRow) -> Store:
        """How this run holds a row in training."""
        ...


class SettingsView(Protocol):
    """The settings of a training run that a preflight check may judge.

    Names, types and defaults are those of `qcore train`; see docs/training.md. A plugin that
    needs another setting asks for it to be added here: adding one is a minor version.
    """

    @property
    def max_length(self) -> int:
        """Most tokens of a row."""
        ...

    @property
    def per_device_train_batch_size(self) -> int:
        """Rows packed into a micro-step."""
        ...

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        ...

    @property
    def r(self) -> int:
        """Rank of the LoRA matrices."""
        ...

    @property
    def target_groups(self) -> tuple[str, ...]:
        """LoRA groups to train; empty: those that the architecture has on."""
        ...

    @property
    def dtype(self) -> str:
        """Compute dtype: ``bf16`` or ``fp32``."""
        ...

    @property
    def quantization(self) -> str:
        """Storage of frozen weights: ``nf4`` or ``none``."""
        ...

    @property
    def quantize_groups(self) -> tuple[str, ...]:
        """LoRA groups held in 4 bit beside those that the table has so."""
        ...

    @property
    def recompute(self) -> str:
        """Activation checkpointing policy."""
        ...

    @property
    def router_aux_loss_coef(self) -> float:
        """Weight of the load-balancing loss; 0: off."""
        ...

    @property
    def adapter_class(self) -> str:
        """Class whose names the adapter carries; empty: the checkpoint's."""
        ...

    @property
    def chat_template_kwargs(self) -> Mapping[str, Plain]:
        """Variables that the chat template is rendered with."""
        ...

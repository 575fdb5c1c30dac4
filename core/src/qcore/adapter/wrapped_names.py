"""Names of an adapter's tensors that wrappers changed, rewritten to those of PEFT.

Trainers save the names of the modules that they hold, and wrappers add words to them. This file
decides which words are removed, and that two tensors never get one name:

- ``_orig_mod`` (torch.compile), ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module``, and a
  leading ``module`` (DistributedDataParallel);
- the name of the adapter (``lora_A.default.weight``, ``lora_magnitude_vector.default``,
  ``modules_to_save.default.weight``), which a state dict has and an adapter file has not;
- a ``base_model.model`` that is repeated; one that is missing is added;
- ``unembed_tokens`` is the head (Tinker);
- the prefix of another model class (``language_model.model.layers`` of transformers 4, ``layers``
  of AutoModel): if the name of a module, or of a module that contains it, differs from that in the
  model only in words of class prefixes, it is that module. A prefix with any other word matches no
  weight.

Names that are already PEFT's stay as they are, and so do those that match nothing.
`qcore.adapter.reader` matches the result with the base.

Code: ``QC-ADAPTER-017`` two tensors have one name without their wrappers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.checkpoint import Header
from ..checkpoint.layout import Layout
from ..errors import InputError
from .peft_names import namespace_of, spell, trunk_part

_PREFIX = "base_model.model."
_HEAD = "unembed_tokens"
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
#: What follows a module: in PEFT's files -> the same with the name of an adapter, as a state dict
#: has it.
_ENDS = {
    ".lora_A.weight": r"\.lora_A(\.[^.]+)?\.weight",
    ".lora_B.weight": r"\.lora_B(\.[^.]+)?\.weight",
    ".lora_embedding_A": r"\.lora_embedding_A(\.[^.]+)?",
    ".lora_embedding_B": r"\.lora_embedding_B(\.[^.]+)?",
    ".lora_magnitude_vector": r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?",
    ".token_adapter.trainable_tokens_delta": r"\.token_adapter\.trainable_tokens_delta(\.[^.]+)?",
    ".trainable_tokens_delta": r"\.trainable_tokens_delta(\.[^.]+)?",
    ".weight": r"\.modules_to_save\.[^.]+\.weight",
    ".base_layer.weight": r"\.original_module\.weight|\.base_layer\.weight",
}
_NAMES = {end: re.compile(rf"(?P<module>.+?)({tail})") for end, tail in _ENDS.items()}


class _Name(NamedTuple):
    """A tensor's name: its module without wrappers and prefix, and what follows."""

    module: str
    end: str

    def __str__(self) -> str:
        return f"{_PREFIX}{self.module}{self.end}"


def without_wrappers(
    path: Path, headers: Mapping[str, Header], layout: Layout
) -> tuple[dict[str, Header], list[str]]:
    """Rewrite the names that wrappers changed.

    Args:
        path: the file, for errors.
        headers: the tensors by their name in the file.
        layout: the base.

    Returns:
        The tensors by PEFT's names, in the same order, and a line for the report if any name was
        rewritten.

    Raises:
        InputError: ``QC-ADAPTER-017`` two tensors have one name without their wrappers.
    """
    classes = _Classes(layout)
    parsed = {name: _parsed(name) for name in headers}
    namespace = classes.most_named(own.module for own in parsed.values() if own)
    rewritten: dict[str, Header] = {}
    sources: dict[str, str] = {}
    for name, header in headers.items():
        own = parsed[name]
        new = name if own is None else classes.respelled(name, own, namespace)
        if new in rewritten:
            raise InputError(
                "QC-ADAPTER-017",
                "has the name of another tensor without its wrappers",
                file=path,
                field=name,
                found=f"{sources[new]} and this, both {new}",
                expected="one tensor for each side of a weight",
                fix="save one adapter with PEFT's save_pretrained",
            )
        rewritten[new], sources[new] = header, name
    changed = [(old, new) for new, old in sources.items() if old != new]
    if not changed:
        return rewritten, []
    old, new = changed[0]
    return rewritten, [
        f"{len(changed)} names of the adapter are read without wrappers: {old} as {new}"
    ]


def plain_name(name: str) -> str:
    """Return a tensor's name without wrappers and adapter name, with PEFT's prefix once.

    Names that an adapter does not have, and those of saved weights, stay as they are.
    """
    own = _parsed(name)
    return name if own is None or not own.end else str(own)


def _parsed(name: str) -> _Name | None:
    """Return the parts of a name; ``None`` if the tensor is not one that an adapter saves."""
    for end, pattern in _NAMES.items():
        if match := pattern.fullmatch(name):
            return _Name(_module(match["module"]), end)
    return _Name(_module(name.removesuffix(".weight")), "") if name.endswith(".weight") else None


def _module(path: str) -> str:
    """Return a module without wrappers and PEFT's prefix."""
    module = ".".join(word for word in path.split(".") if word not in _WRAPPERS)
    module = module.removeprefix("module.")
    while module.startswith(_PREFIX):
        module = module.removeprefix(_PREFIX)
    return module


class _Classes:
    """The modules of a model, as its classes name them."""

    def __init__(self, layout: Layout) -> None:
        self._namespaces = trunk_part(layout.table).namespaces
        pairs = [pair for n in self._namespaces for pair in n.prefixes]
        self._words = {word for pair in pairs for prefix in pair for word in prefix.split(".")}
        self._words.discard("")
        self._spelled: dict[str, dict[str, str]] = {n.name: {} for n in self._namespaces}
        self._weights: set[str] = set()
        heads = [t.name.removesuffix(".weight") for t in layout.table if t.row.group == "head"]
        self._head = heads[0] if heads else ""
        for tensor in layout.table:
            if not tensor.part.loaded:
                continue
            for namespace in self._namespaces:
                if namespace_of(tensor.part, namespace.name) is not None:
                    weight = spell(tensor, namespace)
                    module = weight.removesuffix(".weight")
                    if module == weight:  # a parameter: LoRA is on the module that holds it
                        module = module.rpartition(".")[0]
                    else:
                        self._weights.add(self._tail(module))
                    self._put(namespace.name, module)

    def _put(self, namespace: str, module: str) -> None:
        """Note a module and those that contain it, down to a layer."""
        spelled = self._spelled[namespace]
        while module and (tail := self._tail(module)) and tail not in spelled:
            spelled[tail] = module
            module = module.rpartition(".")[0]
            if not any(word.isdigit() for word in module.split(".")):
                return

    def most_named(self, modules: Iterable[str]) -> str:
        """Return the namespace that spells most modules as they are; the first if none does."""
        own = {_without_base(module) for module in modules}
        return max(self._spelled, key=lambda n: len(own & set(self._spelled[n].values())))

    def respelled(self, name: str, own: _Name, namespace: str) -> str:
        """Return `name` as PEFT has it, with the class prefix of `namespace` if that differs."""
        if own.end and self._head and own.module.rpartition(".")[2] == _HEAD:
            return str(_Name(self._head, own.end))
        module = _without_base(own.module)
        tail = self._tail(module)
        if not own.end:  # a saved weight: PEFT's prefix is added to the name of a weight alone
            if tail not in self._weights:
                return name
            own = _Name(own.module, ".weight")
        inner, below = tail, ""
        while inner and not any(inner in spelled for spelled in self._spelled.values()):
            inner, _, word = inner.rpartition(".")
            below = f".{word}{below}"
        if any(f"{s[inner]}{below}" == module for s in self._spelled.values() if inner in s):
            return str(own)
        known = self._spelled[namespace].get(inner)
        if not inner or known is None:
            return str(own)
        rest = own.module.removeprefix(module)
        return str(_Name(f"{known}{below}{rest}", own.end))

    def _tail(self, module: str) -> str:
        """Return the path of a module without the leading words of class prefixes."""
        words = module.split(".")
        while words and words[0] in self._words:
            words.pop(0)
        return ".".join(words)


def _without_base(module: str) -> str:
    """Return a module without the ``base_layer`` of the wrappers around it."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module

"""Names of LoRA tensors that wrappers changed, rewritten to those of PEFT.

Trainers save the names of the modules that they hold, and wrappers add words to them. This file
decides which words are removed, and that two tensors never get one name:

- ``_orig_mod`` (torch.compile), ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module``, and a
  leading ``module`` (DistributedDataParallel);
- the name of the adapter after ``lora_A`` and ``lora_B`` (``lora_A.default.weight``), which a state
  dict has and an adapter file has not;
- a ``base_model.model`` that is repeated; one that is missing is added;
- the prefix of another model class (``language_model.model.layers`` of transformers 4, ``layers``
  of AutoModel): if a name differs from that of a weight only in words of class prefixes, it is the
  name of that weight. A prefix with any other word matches no weight.

Names that are already PEFT's stay as they are, and so do those that match nothing.
`qcore.adapter.reader` matches the result with the base.

Code: ``QC-ADAPTER-017`` two tensors have one name without their wrappers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..api.parameters import Kind
from ..checkpoint.checkpoint import Header
from ..checkpoint.layout import Layout
from ..errors import InputError
from .peft_names import namespace_of, spell, trunk_part

_PREFIX = "base_model.model."
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
#: The module of a LoRA tensor, its side, and the name of the adapter where a state dict has one.
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight")


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
    plain = {name: plain_name(name) for name in headers}
    namespace = classes.most_named(plain.values())
    rewritten: dict[str, Header] = {}
    sources: dict[str, str] = {}
    for name, header in headers.items():
        new = classes.respelled(plain[name], namespace)
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
    """Return a LoRA tensor's name without wrappers and adapter name, with PEFT's prefix once."""
    match = _LORA.fullmatch(name)
    if match is None:
        return name
    words = [word for word in match["module"].split(".") if word not in _WRAPPERS]
    module = ".".join(words).removeprefix("module.")
    while module.startswith(_PREFIX):
        module = module.removeprefix(_PREFIX)
    return f"{_PREFIX}{module}.lora_{match['side']}.weight"


class _Classes:
    """The modules that can have LoRA, as the classes of a model name them."""

    def __init__(self, layout: Layout) -> None:
        self._namespaces = trunk_part(layout.table).namespaces
        pairs = [pair for n in self._namespaces for pair in n.prefixes]
        self._words = {word for pair in pairs for prefix in pair for word in prefix.split(".")}
        self._words.discard("")
        self._spelled: dict[str, dict[str, str]] = {n.name: {} for n in self._namespaces}
        for tensor in layout.table:
            if tensor.row.kind is None or not tensor.part.loaded:
                continue
            for namespace in self._namespaces:
                if namespace_of(tensor.part, namespace.name) is not None:
                    module = spell(tensor, namespace).removesuffix(".weight")
                    if tensor.row.kind is Kind.EXPERTS:
                        module = module.rpartition(".")[0]
                    self._spelled[namespace.name][self._tail(module)] = module

    def most_named(self, names: Iterable[str]) -> str:
        """Return the namespace that spells most modules as `names` do; the first if none does."""
        modules = {_module(name) for name in names}
        return max(self._spelled, key=lambda n: len(modules & set(self._spelled[n].values())))

    def respelled(self, name: str, namespace: str) -> str:
        """Return `name` with the class prefix of `namespace`, if only that differs."""
        module = _module(name)
        tail = self._tail(module)
        if module is None or any(module == own.get(tail) for own in self._spelled.values()):
            return name
        known = self._spelled[namespace].get(tail)
        return (
            name if known is None else name.replace(f"{_PREFIX}{module}.", f"{_PREFIX}{known}.", 1)
        )

    def _tail(self, module: str | None) -> str:
        """Return the path of a module without the leading words of class prefixes."""
        words = (module or "").split(".")
        while words and words[0] in self._words:
            words.pop(0)
        return ".".join(words)


def _module(name: str) -> str | None:
    """Return the module of a LoRA tensor without ``base_layer``; ``None`` for other names."""
    match = _LORA.fullmatch(name)
    if match is None or not name.startswith(_PREFIX):
        return None
    module = match["module"].removeprefix(_PREFIX)
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module

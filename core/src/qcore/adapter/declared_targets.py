"""Checks that the targets which adapter_config.json declares are those that have tensors.

This file decides which modules and parameters a config declares (PEFT's rule for names, layers and
exclusions), and that each of them has tensors and no other weight has. `qcore.adapter.matching`
decides which tensors belong to which weight. It imports no torch.

Code: ``QC-ADAPTER-006`` a declared target has no tensors, or tensors have no declared target.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ..api.parameters import Kind
from ..api.parameters import Tensor as TableTensor
from .findings import Findings
from .number_patterns import matches
from .peft_config import layers_of
from .peft_names import CONFIG


class DeclaredTargets:
    """The declarations of one config, and the weights of a base that they may name.

    Args:
        config: content of adapter_config.json.
        modules: PEFT's name of each weight that can have LoRA, with the weight.
        headers: names of the adapter's tensors.
        claimed: whether a plugin claims the layout, so that the config need not declare targets.
        findings: receives the problems.
        parts: modules that are parts of a weight, by canonical name of the weight. What the config
            declares of such weights is not PEFT's rule: it may name the parts or the weight.
        vocabulary: PEFT's names of the embedding and the head.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        modules: Mapping[str, TableTensor],
        headers: Collection[str],
        claimed: bool,
        findings: Findings,
        parts: Mapping[str, Sequence[str]] = MappingProxyType({}),
        vocabulary: Sequence[str] = (),
    ) -> None:
        self._config = config
        self._modules = modules
        self._headers = headers
        self._claimed = claimed
        self._findings = findings
        self._parts = parts
        self._vocabulary = vocabulary

    def check(self, changed: Collection[str]) -> None:
        """Check all declarations.

        Args:
            changed: canonical names of the weights that have LoRA.
        """
        for field in ("target_modules", "target_parameters"):
            self._check_targets(field, changed)
        self._check_saved()

    def _check_targets(self, field: str, changed: Collection[str]) -> None:
        declared = self._config.get(field)
        linear = field == "target_modules"
        if declared is None and self._claimed:
            return  # the layout is not PEFT's, so its config declares no targets
        if linear and isinstance(declared, str) and changed:
            self._check_expression(declared)
        # Which weights an expression selects is not compared: every match is accepted.
        is_list = isinstance(declared, list) or declared is None
        declared = declared if isinstance(declared, list) else []
        # PEFT applies exclude_modules to modules only.
        excluded = (self._config.get("exclude_modules") or []) if linear else []
        layers = linear and bool(layers_of(self._config))
        of_field = {
            module: tensor
            for module, tensor in self._modules.items()
            if (tensor.row.kind is Kind.LINEAR) == linear
        }
        parts = [module for own in self._parts.values() for module in own]
        unmet = [name for name in declared if not any(named(module, [name]) for module in parts)]
        for module, tensor in of_field.items():
            is_excluded = named(module, excluded) or (
                layers and not self._transformed(module, tensor)
            )
            wanted = named(module, declared) and isinstance(excluded, list) and not is_excluded
            if wanted and tensor.name not in changed and not named(module, unmet):
                self._findings.notes.append(
                    f"warning: {field}: {module} has no tensors, which parts of other weights have"
                )
            elif wanted and tensor.name not in changed:
                self._findings.problem(
                    "QC-ADAPTER-006",
                    "is a declared target without tensors",
                    module,
                    fix="train or export again",
                )
            undeclared = is_excluded or (is_list and not named(module, declared))
            if tensor.name in changed and tensor.name not in self._parts and undeclared:
                self._findings.problem(
                    "QC-ADAPTER-006",
                    "has tensors and is not a declared target",
                    module,
                    fix=f"declare it in {field}, or export again",
                )
        for name in declared:
            hit = any(named(module, [name]) for module in of_field)
            if hit or (linear and any(f".{name}.lora_" in key for key in self._headers)):
                continue
            own = linear and any(named(module, [name]) for module in self._vocabulary)
            if changed and not self._findings.problems and not own:
                self._findings.notes.append(
                    f"warning: {field}: {name} matches no weight of this base"
                )
                continue
            another = "name the base that the adapter was trained on"
            what = "without tensors" if own else "that matches no weight"
            self._findings.problem(
                "QC-ADAPTER-006", f"is a declared target {what}", f"{field}: {name}",
                fix="train or export again" if own else another,
            )  # fmt: skip

    def _check_expression(self, expression: str) -> None:
        """Warn if ``target_modules`` is an expression that selects no weight of the base."""
        parts = [module for own in self._parts.values() for module in own]
        names = [*self._modules, *self._vocabulary, *parts]
        path = self._findings.path.parent / CONFIG
        hits = matches(path, "target_modules", [expression], names)
        if expression != "all-linear" and not hits[expression]:
            self._findings.notes.append(
                f"warning: target_modules: the expression '{expression[:100]}' matches no weight "
                "of this base"
            )

    def _check_saved(self) -> None:
        """Check that what modules_to_save and trainable_token_indices name has tensors."""
        ends = [f".{name}." for name in self._config.get("modules_to_save") or []]
        if self._config.get("trainable_token_indices"):
            ends.append(".trainable_tokens_delta")
        for end in ends:
            if not any(end in header for header in self._headers):
                what = "is declared (saved modules, trainable tokens) and has no tensors"
                self._findings.problem(
                    "QC-ADAPTER-006", what, end.strip("."), fix="train or export again"
                )

    def _transformed(self, module: str, tensor: TableTensor) -> bool:
        """Whether PEFT's ``layers_to_transform`` and ``layers_pattern`` select the weight."""
        pattern = self._config.get("layers_pattern") or []
        words = [pattern] if isinstance(pattern, str) else pattern
        # A downloaded expression is not evaluated: every layer is accepted.
        plain = isinstance(words, list) and all(re.fullmatch(r"[\w.]+", str(w)) for w in words)
        paths = [f".{word}.{tensor.index}." for word in words] if plain else []
        if paths and not any(path in module for path in paths):
            return False
        return tensor.index in layers_of(self._config)


def named(module: str, names: object) -> bool:
    """Whether a name in the list equals the module's name or its end after a dot (PEFT's rule)."""
    return isinstance(names, list) and any(
        isinstance(name, str) and (module == name or module.endswith(f".{name}")) for name in names
    )

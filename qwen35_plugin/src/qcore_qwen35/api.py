"""Public API of qcore-qwen35 for plugins of later Qwen generations.

This file decides which names another plugin may import: everything else in the package may change
in any version. Names are imported on first use, so only the blocks import torch.

======================  ==========================================================================
claims                  `ARCHITECTURE`, `MOE`, `architecture_of`, `bos_of`,
                        `as_published_without_bos`, `ENDOFTEXT`
template probes         `probe_template`, `TemplateBehavior`, the probe's texts (`EARLIER`,
                        `LATER`, `HEADER`, `THINK`, `NO_THINK`), `TEMPLATE_INPUTS` of 3.5
chat rules              `QWEN35`, `switch_findings`, `ReplyParser`, `parse_reply`
table rows              `parts`, `delta_rows`, `attention_rows`, `mlp_rows`, `moe_rows`, `ROOT`,
                        `GROUPS`, `MOE_GROUPS`, `text_config`, `layer_types`
preflight checks        `config_findings`
blocks (torch)          `Attention` (norms and gate as arguments), `GatedDeltaNet` (gated norm as
                        argument), `Mlp`, `Moe`, `RmsNorm`, `GatedNorm`, `Rope`, `Weight`,
                        `Trunk`, `build`, `balance_loss`
======================  ==========================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention import Attention
    from .chat import QWEN35, switch_findings
    from .delta import GatedDeltaNet
    from .detect import ARCHITECTURE, MOE, architecture_of
    from .guards import config_findings
    from .mlp import Mlp
    from .model import Trunk, build
    from .moe import Moe, balance_loss
    from .norm import GatedNorm, RmsNorm, Weight
    from .reply import ReplyParser, parse_reply
    from .rope import Rope
    from .table import (
        GROUPS,
        MOE_GROUPS,
        ROOT,
        attention_rows,
        delta_rows,
        layer_types,
        mlp_rows,
        moe_rows,
        parts,
        text_config,
    )
    from .template_probe import (
        EARLIER,
        ENDOFTEXT,
        HEADER,
        LATER,
        NO_THINK,
        TEMPLATE_INPUTS,
        THINK,
        TemplateBehavior,
        as_published_without_bos,
        bos_of,
        probe_template,
    )

__all__ = [
    "ARCHITECTURE", "EARLIER", "ENDOFTEXT", "GROUPS", "HEADER", "LATER", "MOE", "MOE_GROUPS",
    "NO_THINK", "QWEN35", "ROOT", "TEMPLATE_INPUTS", "THINK", "Attention", "GatedDeltaNet",
    "GatedNorm", "Mlp", "Moe", "ReplyParser", "RmsNorm", "Rope", "TemplateBehavior", "Trunk",
    "Weight", "architecture_of", "as_published_without_bos", "attention_rows", "balance_loss",
    "bos_of", "build", "config_findings", "delta_rows", "layer_types", "mlp_rows", "moe_rows",
    "parse_reply", "parts", "probe_template", "switch_findings", "text_config",
]  # fmt: skip

#: Modules searched for a name, in this order; from `attention` on they import torch.
_MODULES = (
    "detect", "template_probe", "reply", "chat", "table", "guards",
    "attention", "delta", "mlp", "moe", "norm", "rope", "model",
)  # fmt: skip


def __getattr__(name: str) -> object:
    """Import the module of a public name on first use."""
    if name in __all__:
        from importlib import import_module

        for module in _MODULES:
            names = vars(import_module(f".{module}", __package__))
            if name in names:
                globals()[name] = names[name]
                return names[name]
    raise AttributeError(f"module 'qcore_qwen35.api' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The public names."""
    return __all__

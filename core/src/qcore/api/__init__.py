"""Public API for plugins: hooks, records, parameter table, and protocols of core's objects.

This file decides which names are public; a plugin imports them from here: ``from qcore.api
import Claim, Part, Row``. A name is looked up on first use, so that only those of `blocks` import
torch. What blocks and kernels call at run time is `qcore.ops`; errors are `qcore.errors`. Adding a
name is a minor version, removing one a major version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter_claims import AdapterClaim, AdapterPiece
    from .blocks import (
        BuildContext,
        DecodeCache,
        ExpertsLayer,
        Layer,
        LinearLayer,
        Media,
        Packed,
        Shared,
        Tower,
        TowerLayer,
        Trunk,
    )
    from .files import user_cache, write_error, writing
    from .hookspecs import hookimpl
    from .media import MediaReader, Medium, Payload, Placed, RowError
    from .parameters import (
        BASE,
        EXPERTS,
        FP32,
        LINEAR,
        NF4,
        PARAMETER,
        Aim,
        Kind,
        Namespace,
        Part,
        Region,
        Row,
        Spelling,
        Store,
        Table,
        Tensor,
        at,
        cat,
        stack,
    )
    from .records import (
        Architecture,
        ChatFormat,
        Claim,
        DataFormat,
        Evidence,
        Finding,
        Generation,
        Kernel,
        KnownBad,
        Modality,
        Op,
        ParseReply,
        PreflightRequest,
        Severity,
        Verdict,
    )
    from .views import CheckpointView, Header, LayoutView, SettingsView, TemplateView, TokenizerView

__all__ = [
    "BASE",
    "EXPERTS",
    "FP32",
    "LINEAR",
    "NF4",
    "PARAMETER",
    "AdapterClaim",
    "AdapterPiece",
    "Aim",
    "Architecture",
    "BuildContext",
    "ChatFormat",
    "CheckpointView",
    "Claim",
    "DataFormat",
    "DecodeCache",
    "Evidence",
    "ExpertsLayer",
    "Finding",
    "Generation",
    "Header",
    "Kernel",
    "Kind",
    "KnownBad",
    "Layer",
    "LayoutView",
    "LinearLayer",
    "Media",
    "MediaReader",
    "Medium",
    "Modality",
    "Namespace",
    "Op",
    "Packed",
    "ParseReply",
    "Part",
    "Payload",
    "Placed",
    "PreflightRequest",
    "Region",
    "Row",
    "RowError",
    "SettingsView",
    "Severity",
    "Shared",
    "Spelling",
    "Store",
    "Table",
    "TemplateView",
    "Tensor",
    "TokenizerView",
    "Tower",
    "TowerLayer",
    "Trunk",
    "Verdict",
    "at",
    "cat",
    "hookimpl",
    "stack",
    "user_cache",
    "write_error",
    "writing",
]

#: Where names are looked for, in this order: `blocks` imports torch and comes last.
_MODULES = (
    "records",
    "adapter_claims",
    "parameters",
    "views",
    "media",
    "files",
    "hookspecs",
    "blocks",
)


def __getattr__(name: str) -> object:
    """Import the module of a public name on first use."""
    if name in __all__:
        from importlib import import_module

        for module in _MODULES:
            names = vars(import_module(f".{module}", __name__))
            if name in names:
                globals()[name] = names[name]
                return names[name]
    raise AttributeError(f"module 'qcore.api' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The public names."""
    return __all__

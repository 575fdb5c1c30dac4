"""qcore: fine-tune and merge language models through plugins.

The verbs are functions: `inspect`, `plan`, `train`, `merge`, `generate`, `verify`. `open_model` and
`open_adapter` read tensors, `publish` writes a folder, a `Reporter` receives the events of a verb.

Other public modules: `api`, `errors`, `ops`, `testing`, and the marker `hookimpl`. Everything
else is internal and may change in a minor version. Importing qcore imports no torch and no plugin:
each name is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .io.version import __version__

if TYPE_CHECKING:
    from .adapter.open import open_adapter, open_model
    from .api.hookspecs import hookimpl
    from .inference.generate import generate
    from .io.artifact import publish
    from .io.folder_check import verify
    from .merging.merge import merge
    from .preflight.inspect import inspect
    from .preflight.plan import plan
    from .reporting import Reporter
    from .training.train import train

__all__ = [
    "Reporter",
    "__version__",
    "generate",
    "hookimpl",
    "inspect",
    "merge",
    "open_adapter",
    "open_model",
    "plan",
    "publish",
    "train",
    "verify",
]

_MODULES = {
    "Reporter": "reporting",
    "generate": "inference.generate",
    "hookimpl": "api.hookspecs",
    "inspect": "preflight.inspect",
    "merge": "merging.merge",
    "open_adapter": "adapter.open",
    "open_model": "adapter.open",
    "plan": "preflight.plan",
    "publish": "io.artifact",
    "train": "training.train",
    "verify": "io.folder_check",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'qcore' has no attribute '{name}'")
    value: object = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

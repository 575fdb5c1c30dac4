"""Row formats: rows as other tools write them, converted to the canonical row."""

from .canonical import SCHEMA_VERSION, schema
from .registry import BUILTIN_NAMES, IGNORED, Converted, Formats, load_formats

__all__ = [
    "BUILTIN_NAMES",
    "IGNORED",
    "SCHEMA_VERSION",
    "Converted",
    "Formats",
    "load_formats",
    "schema",
]

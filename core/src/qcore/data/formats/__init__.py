"""Row formats: rows as other tools write them, converted to the canonical row."""

from .canonical import SCHEMA_VERSION, schema
from .registry import BUILTIN_NAMES, IGNORED_COLUMN, Converted, Formats, load_formats

__all__ = [
    "BUILTIN_NAMES",
    "IGNORED_COLUMN",
    "SCHEMA_VERSION",
    "Converted",
    "Formats",
    "load_formats",
    "schema",
]

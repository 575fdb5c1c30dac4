"""Op of the gated delta rule: token by token (`reference`) and in chunks (`chunked`)."""

from .chunked import CHUNK, chunked_delta_rule
from .layout import Chunks
from .reference import recurrent_delta_rule

__all__ = ["CHUNK", "Chunks", "chunked_delta_rule", "recurrent_delta_rule"]

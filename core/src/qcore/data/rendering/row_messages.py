"""Messages between `qcore.data.rendering.row_pool` and its processes.

This file decides how values are written: eight bytes of length, little endian, then a pickle. Both
ends are this program; nothing that was downloaded, and no file, is ever unpickled.
"""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO


def pack(value: Any) -> bytes:
    """A value as the body of a message."""
    return pickle.dumps(value, protocol=5)


def unpack(body: bytes) -> Any:
    """The value of a message of another process of this program."""
    return pickle.loads(body)


def send(stream: BinaryIO, body: bytes) -> None:
    """Write one message."""
    stream.write(len(body).to_bytes(8, "little"))
    stream.write(body)
    stream.flush()

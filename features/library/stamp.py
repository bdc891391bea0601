"""The stamp of a chunk, which tells a page that was written whole for this key from any other content of a file."""

from __future__ import annotations

import hashlib

MAGIC = b"starling page 1\n"
DIGEST_BYTES = 32
STAMP_BYTES = len(MAGIC) + DIGEST_BYTES


def stamp_of(key: bytes, content: memoryview) -> bytes:
    """Return the stamp of a page: STAMP_BYTES bytes, MAGIC and then a digest of its key and its content (BLAKE2b)."""
    digest = hashlib.blake2b(key, digest_size=DIGEST_BYTES)
    digest.update(content)
    return MAGIC + digest.digest()


def write_stamp(chunk: memoryview, key: bytes) -> None:
    """Write the stamp of a page into the last bytes of its chunk, which hold nothing else."""
    chunk[-STAMP_BYTES:] = stamp_of(key, chunk[:-STAMP_BYTES])


def has_stamp(chunk: memoryview, key: bytes) -> bool:
    """Return whether a chunk has the stamp of its content under this key."""
    return chunk[-STAMP_BYTES:] == stamp_of(key, chunk[:-STAMP_BYTES])

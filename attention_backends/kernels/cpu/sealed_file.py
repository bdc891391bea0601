"""Files that end with a digest of their content, so that a file that is cut off or damaged is recognised.

The loader of shared libraries ignores what follows them in a file. A library that is cut off ends the process with
SIGBUS when it is loaded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def seal(path: Path) -> None:
    """Append the digest of a file's content to the file."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    with path.open("ab") as file:
        file.write(digest)


def is_intact(path: Path) -> bool:
    """Return whether a file exists, can be read, and has the content that it was sealed with."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]

"""The LoRA adapter of a server (``--star-adapter``): what `starling distil` writes beside PEFT's files."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

DISTILLED, PEFT_CONFIG, WEIGHTS = "distil.json", "adapter_config.json", "adapter_model.safetensors"
VERSION = 1
Purpose = Literal["documents", "star"]
PURPOSES: tuple[Purpose, ...] = ("documents", "star")
DIGEST_LENGTH = 16
MAX_JSON_BYTES = 1 << 20
CHUNK_BYTES = 1 << 20


class AdapterError(ValueError):
    """A folder that is no adapter of `starling distil`."""


class Distilled(BaseModel):
    """Description in an adapter's folder of how it was made; the file's other fields are for people.

    Attributes:
        purposes: plans that it was trained for.
        model: name of the base model, as it was given.
        checkpoint: digest of the base model's weights, or None if it had none.
    """

    model_config = ConfigDict(frozen=True)

    version: Literal[1]
    purposes: tuple[Purpose, ...] = Field(min_length=1)
    model: str
    checkpoint: str | None = None


class PeftConfig(BaseModel):
    """The needed fields of PEFT's adapter_config.json."""

    model_config = ConfigDict(frozen=True)

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    target_modules: tuple[str, ...] = Field(min_length=1)


class StarAdapter(BaseModel):
    """An adapter for prompts with a star plan.

    Attributes:
        folder: absolute path of the folder with its files.
        rank: rank of its matrices.
        target_modules: names of the layers that it changes.
        digest: digest of its weights and of how they are used.
    """

    model_config = ConfigDict(frozen=True)

    folder: str
    distilled: Distilled
    rank: int
    target_modules: tuple[str, ...]
    digest: str

    @property
    def described(self) -> str:
        """Return the adapter in a line."""
        return f"{self.folder}, for {' and '.join(self.purposes)}, rank {self.rank}, of {self.distilled.model}"

    @property
    def purposes(self) -> tuple[Purpose, ...]:
        return self.distilled.purposes


@functools.cache
def read_adapter(folder: str) -> StarAdapter:
    """Read the adapter in a folder, as it is when a process first asks for it.

    Raises:
        AdapterError: the folder has none, or one that `starling distil` has not made.
    """
    path = Path(folder).absolute()
    if not path.is_dir():
        raise AdapterError("it is no folder")
    digest = hashlib.sha256()
    try:
        distilled = Distilled.model_validate(_json(path / DISTILLED, digest))
        peft = PeftConfig.model_validate(_json(path / PEFT_CONFIG, digest))
        with _open(path / WEIGHTS) as weights:
            while chunk := weights.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise AdapterError(f"it has no {Path(error.filename or folder).name} that can be read") from None
    except ValidationError as error:
        first = error.errors()[0]
        where, wrong = ".".join(map(str, first["loc"])), f"{first['msg']}, and it is {first['input']!r:.80}"
        raise AdapterError(f"{error.title}: {where}: {wrong}") from None
    return StarAdapter(
        folder=str(path),
        distilled=distilled,
        rank=peft.r,
        target_modules=tuple(sorted(peft.target_modules)),
        digest=digest.hexdigest()[:DIGEST_LENGTH],
    )


def _json(path: Path, digest: Any) -> Any:
    with _open(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise AdapterError(f"{path.name} has more than {MAX_JSON_BYTES} bytes")
    digest.update(content)
    try:
        return json.loads(content)
    except ValueError as error:
        raise AdapterError(f"{path.name} is not JSON: {error}") from None


def _open(path: Path) -> BinaryIO:
    """Open a regular file: a pipe would be waited for, and a device never ends (raises OSError)."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no regular file", str(path))
    return path.open("rb")

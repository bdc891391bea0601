"""The scores of the KV heads of an engine's model: where they come from, and which heads a worker's layers have."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from starling.config.entry import ENTRY, STAR_HEADS, config_of
from starling.config.head_scores import HeadScores, ScoresError, read_scores
from starling.config.parsing import OptionError
from starling.vllm_compat.models import attention_blocks

logger = init_logger("vllm.starling")

KNOWN = Path(__file__).parent / "scores"
"""The folder of the scores that come with Starling."""

SAMPLES, SAMPLE_BYTES = 64, 4096
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model*.safetensors", "*.safetensors", "*.bin", "*.gguf", "*.pt")


def checkpoint_digest(folder: Path) -> str | None:
    """Return a digest of the size and some bytes of each file of a model's weights, or None if there is no such file.

    Training changes nearly all weights, so a few bytes at equal distances tell two checkpoints apart. A change between
    these bytes alone is not seen. No more is read, whatever the model's size.
    """
    files = next((found for pattern in WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
    if (folder / INDEX).is_file():  # beside the files that it names, there may be others with the same weights
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(named))]
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(size - SAMPLE_BYTES, 0) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32] if files else None


def checkpoint_folder(model: str, revision: str | None) -> Path | None:
    """Return the folder of a model's files, or None if ``model`` is no folder and not in the cache of the hub."""
    if Path(model).is_dir():
        return Path(model)
    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # no name of a repository
        return None
    return Path(config).parent if isinstance(config, str) else None


@functools.cache
def _scores_of(path: str | None, model: str, revision: str | None) -> HeadScores | None:
    folder = checkpoint_folder(model, revision)
    own = None if folder is None else checkpoint_digest(folder)
    if path is None:
        known = (read_scores(str(file)) for file in sorted(KNOWN.glob("*.json")))
        return next((scores for scores in known if own is not None and scores.checkpoint == own), None)
    scores = read_scores(path)
    if scores.checkpoint is not None and own is None:
        logger.warning("%s: no weights of %s are found on this machine to compare the scores with", path, model)
    if scores.checkpoint is not None and own is not None and scores.checkpoint != own:
        raise ScoresError(f"the scores are those of {scores.model or 'another model'}, with other weights than {model}")
    return scores


def scores_of(vllm_config: Any) -> HeadScores | None:
    """Return the scores of the KV heads of an engine's model, or None if they are not known.

    Raises:
        OptionError: the file that the options name can't be read, or is not of this model.
    """
    config, model = config_of(vllm_config), vllm_config.model_config
    if config is None:
        return None
    path = config.star_heads
    try:
        scores = _scores_of(path, model.model, model.revision)
        if scores is not None:
            check_shape(scores, model.get_total_num_hidden_layers(), model.get_total_num_kv_heads())
        return scores
    except ScoresError as error:
        allowed = "a file that `starling calibrate` made of this model, or one of DuoAttention's"
        raise OptionError(f"{ENTRY}.{STAR_HEADS}", path, str(error), allowed) from None


def check_shape(scores: HeadScores, num_layers: int, num_kv_heads: int) -> None:
    """Refuse scores that are not of so many layers and heads (raises ScoresError)."""
    if len(scores.scores) != num_layers:
        raise ScoresError(f"it has scores of {len(scores.scores)} layers, and the model has {num_layers}")
    for layer, row in enumerate(scores.scores):
        if row and len(row) != num_kv_heads:
            raise ScoresError(f"layer {layer} has {len(row)} scores, and the model has {num_kv_heads} KV heads a layer")


def ranks_of_layers(
    scores: HeadScores, model: torch.nn.Module, layer_names: Sequence[str], other_names: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], str | None]:
    """Layer name -> (KV heads,) int64, the places of this rank's heads in the order of scores; and why there are none.

    Layers of a drafter, which are not the model's own, are left out.

    Args:
        layer_names: the layers of the engine that are full attention.
        other_names: its other layers that have a KV cache, such as those with a window.
    """
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    blocks, ranks = attention_blocks(model), {}
    full = set(layer_names)
    for name in filter(blocks.__contains__, (*layer_names, *other_names)):
        index = extract_layer_index(name)
        of_layer = scores.ranks[index] if index < len(scores.ranks) else ()
        if bool(of_layer) != (name in full):
            is_full, has = ("is", "no") if name in full else ("is not", "its own")
            return {}, f"layer {name} {is_full} full attention, and has {has} scores"
        if not of_layer:
            continue
        heads, total = blocks[name].attention.num_kv_heads, len(of_layer)
        if heads != max(1, total // size):
            return {}, f"layer {name} has {heads} KV heads on each of {size} ranks, and {total} scores"
        first = rank * total // size
        ranks[name] = np.asarray(of_layer[first : first + heads], dtype=np.int64)
    return ranks, None

"""B, A and O of a prompt: what was asked for, or what the length of the prompt says."""

from __future__ import annotations

from collections.abc import Mapping

from starling.config.star import StarOptions, num_blocks

BLOCKS_OF_PROMPT = {"fast": 16, "balanced": 8, "careful": 4}
"""Into how many blocks a prompt of each quality is cut at most (docs/dense-heads.md has what they lose)."""


DEFAULT_QUALITY = "balanced"


MIN_BLOCK_SIZE = 1024


DOCUMENT_BLOCK_SIZE = 8192
"""B by default where blocks are documents, so that it does not depend on the prompt."""


ANCHOR_TOKENS = 128


ANCHORS_OF_BLOCK = 8


def default_block_size(num_prompt_tokens: int, page_size: int, quality: str = DEFAULT_QUALITY) -> int:
    """B of a prompt whose options name none: a share of it, rounded up to a power of two and to whole pages.

    So a prompt has more than 4 and at most 8 star blocks, or twice or half as many. B, and with it the borders of the
    blocks, changes only where the prompt grows beyond a power of two: the next turn of a chat finds its pages in the
    prefix cache.

    Args:
        quality: which share.
    """
    share = max(-(-num_prompt_tokens // BLOCKS_OF_PROMPT[quality]), MIN_BLOCK_SIZE)
    return _whole_pages(1 << (share - 1).bit_length(), page_size)


def default_anchor_size(block_size: int, page_size: int) -> int:
    """Return A of blocks with an overlap: 128 tokens, at most an eighth of the block, at least one page.

    The overlap carries on what the earlier blocks say, so the anchor has to be no more than the attention sink
    (arXiv 2411.17116, section 3.4).
    """
    return min(_whole_pages(min(ANCHOR_TOKENS, block_size // ANCHORS_OF_BLOCK) or 1, page_size), block_size)


def has_default_overlap(options: StarOptions, *, independent: bool) -> bool:
    """Return whether blocks see the block before them although no option says so."""
    return options.overlap_size is None and options.anchor_size is None and not independent


def measured_number(options: StarOptions, quality_sizes: Mapping[str, int] | None) -> int | None:
    """Into how many star blocks the word of the options cuts a prompt on this server, 1: dense.

    None: a size is given, or the server has none for the words.
    """
    if options.block_size is not None or quality_sizes is None:
        return None
    return quality_sizes[options.quality or DEFAULT_QUALITY]


def find_block_size(
    options: StarOptions,
    num_prompt_tokens: int,
    page_size: int,
    documents: bool,
    quality_sizes: Mapping[str, int] | None,
) -> int:
    """B of a prompt; of documents, which no one block size fits, the longest that one may be: no share of a prompt.

    Args:
        quality_sizes: word of ``star_quality`` -> the number of star blocks, 1: dense; None: those of the study.
    """
    share = num_blocks(options) or measured_number(options, quality_sizes)
    if share is not None and not documents:
        return max(-(-num_prompt_tokens // (share * page_size)), 1) * page_size
    if isinstance(options.block_size, int):
        return options.block_size
    if documents:
        return _whole_pages(DOCUMENT_BLOCK_SIZE, page_size)
    return default_block_size(num_prompt_tokens, page_size, options.quality or DEFAULT_QUALITY)


def find_anchor_and_overlap(
    options: StarOptions, block_size: int, page_size: int, documents: bool, *, independent: bool
) -> tuple[int, int]:
    """Find A and O of blocks of ``block_size`` tokens.

    By default they have B tokens together, as many as the paper's anchor. Where blocks have to be independent these are
    the paper's anchor, A = B; else they are a small anchor and the end of the block before, which lose less at the same
    number of keys (docs/star-accuracy.md). Documents never see the document before.

    Args:
        independent: whether a block's KV has to do without the block before it, unless an overlap is asked for.
    """
    anchor, overlap = options.anchor_size, 0 if documents else options.overlap_size
    if overlap is None:
        by_default = has_default_overlap(options, independent=independent)
        overlap = block_size - default_anchor_size(block_size, page_size) if by_default else 0
    overlap = min(overlap, block_size)
    if anchor is None:
        anchor = max(block_size - overlap, default_anchor_size(block_size, page_size))
    return min(anchor, block_size), overlap


def _whole_pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size) * page_size

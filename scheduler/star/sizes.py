"""B, A and O of a prompt: what was asked for, or what the length of the prompt says."""

from __future__ import annotations

from starling.scheduler.star.options import StarOptions, flat_name
from starling.scheduler.star.parsing import OptionError

BLOCKS_OF_PROMPT = 8
MIN_BLOCK_SIZE = 1024
SEGMENT_BLOCK_SIZE = 8192
"""B by default where blocks are segments with positions of their own, so that it does not depend on the prompt."""
ANCHOR_TOKENS = 128
ANCHORS_OF_BLOCK = 8


def default_block_size(num_prompt_tokens: int, page_size: int) -> int:
    """B of a prompt whose options name none: an eighth of it, rounded up to a power of two and to whole pages.

    So a prompt has more than 4 and at most 8 star blocks. B, and with it the borders of the blocks, changes only where
    the prompt grows beyond a power of two: the next turn of a chat finds its pages in the prefix cache.
    """
    eighth = max(-(-num_prompt_tokens // BLOCKS_OF_PROMPT), MIN_BLOCK_SIZE)
    return _whole_pages(1 << (eighth - 1).bit_length(), page_size)


def default_anchor_size(block_size: int, page_size: int) -> int:
    """A of blocks that see an overlap: 128 tokens, and at most an eighth of the block; at least one page.

    The overlap carries on what the earlier blocks say, so the anchor has to be no more than the attention sink
    (arXiv 2411.17116, section 3.4).
    """
    return min(_whole_pages(min(ANCHOR_TOKENS, block_size // ANCHORS_OF_BLOCK) or 1, page_size), block_size)


def has_default_overlap(options: StarOptions, *, independent: bool) -> bool:
    """Whether blocks see the block before them although no option says so."""
    return options.overlap_size is None and options.anchor_size is None and not independent


def find_block_size(options: StarOptions, num_prompt_tokens: int, page_size: int) -> int:
    """B of a prompt (raises OptionError: it is not a whole number of pages, or nothing says it)."""
    if options.block_size is None:
        return default_block_size(num_prompt_tokens, page_size)
    if options.block_size:
        _refuse_off_page("block_size", options.block_size, page_size)
        return options.block_size
    if not options.num_blocks:
        raise OptionError(
            flat_name("block_size"),
            0,
            f"{flat_name('num_blocks')} is 0 too, so the block size is undefined",
            f"{flat_name('block_size')} or {flat_name('num_blocks')} above 0",
        )
    return max(-(-num_prompt_tokens // (options.num_blocks * page_size)), 1) * page_size


def find_segment_block_size(options: StarOptions, num_prompt_tokens: int, page_size: int) -> int:
    """As find_block_size, where blocks are segments with positions of their own: B is the longest segment."""
    if options.block_size is None:
        return _whole_pages(SEGMENT_BLOCK_SIZE, page_size)
    return find_block_size(options, num_prompt_tokens, page_size)


def find_anchor_and_overlap(
    options: StarOptions, given: set[str], block_size: int, page_size: int, *, independent: bool
) -> tuple[int, int]:
    """A and O of blocks of ``block_size`` tokens.

    By default they have B tokens together, as many as the paper's anchor. Where blocks have to be independent these are
    the paper's anchor, A = B; else they are a small anchor and the end of the block before, which lose less at the same
    number of keys (docs/star-accuracy.md).

    Args:
        given: the options that the request itself gave.
        independent: whether a block's KV has to do without the block before it, unless an overlap is asked for.

    Raises:
        OptionError: a size is not a whole number of pages, or the request's is larger than its block.
    """
    anchor, overlap = options.anchor_size, options.overlap_size
    for field, value in (("anchor_size", anchor), ("overlap_size", overlap)):
        if value is not None:
            _check_in_block(field, value, given, block_size, page_size)
    if overlap is None:
        by_default = has_default_overlap(options, independent=independent)
        overlap = block_size - default_anchor_size(block_size, page_size) if by_default else 0
    overlap = min(overlap, block_size)
    if anchor is None:
        anchor = max(block_size - overlap, default_anchor_size(block_size, page_size))
    return min(anchor, block_size), overlap


def check_sizes(options: StarOptions, page_size: int) -> None:
    """Refuse server defaults that no prompt could use with this KV page (raises OptionError)."""
    for field in ("block_size", "anchor_size", "overlap_size"):
        _refuse_off_page(field, getattr(options, field) or 0, page_size)
    if options.block_size:
        given = options.model_fields_set
        find_anchor_and_overlap(options, given, options.block_size, page_size, independent=True)


def _whole_pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size) * page_size


def _check_in_block(field: str, value: int, given: set[str], block_size: int, page_size: int) -> None:
    """Refuse A or O off a page, or above B if the request gave it; a default above B becomes B."""
    _refuse_off_page(field, value, page_size)
    if value > block_size and field in given:
        raise OptionError(
            flat_name(field),
            value,
            f"it is larger than the star block of {block_size} tokens",
            f"a multiple of {page_size} from 0 to {block_size}",
        )


def _refuse_off_page(field: str, value: int, page_size: int) -> None:
    if value % page_size:
        raise OptionError(
            flat_name(field),
            value,
            f"it is not a multiple of the KV page of {page_size} tokens",
            f"a multiple of {page_size}",
        )

"""The plans that are compared: each is a name and the star options that its requests send."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from starling.config.star import parse_options

LETTERS = {
    "B": "star_block_size",
    "A": "star_anchor_size",
    "O": "star_overlap_size",
    "H": "star_dense_heads",
    "Q": "star_query_tokens",
    "S": "star_segments",
    "L": "star_adapter",
}
ALLOWED = (
    "dense; default, the server's own star options; n/8, eight star blocks; or sizes in tokens such as "
    "B=1024,A=1024,O=0,Q=128; behind either H=0.1, the share of dense KV heads, S= with the text of the token that "
    "starts a document, and L=off, without the server's adapter"
)


@dataclass(frozen=True)
class Plan:
    """Plan by which the prompts are prefilled.

    Attributes:
        name: name in tables, results and errors.
        options: the star options of a request, under their flat names (`vllm_xargs`).
    """

    name: str
    options: dict[str, str | int] = field(hash=False)

    @property
    def is_dense(self) -> bool:
        return self.options["star"] == "off"


DENSE = Plan("dense", {"star": "off"})


def parse_plan(text: str) -> Plan:
    """Parse the plan of one --plan.

    Args:
        text: ``dense``; ``default``; or parts with a comma between them: ``n/8`` or ``B=n/8``; ``B=``, ``A=``, ``O=``,
            ``Q=`` and a number of tokens; ``H=`` and a share of the KV heads; ``S=`` and the text of the token that
            starts a document; ``L=off``, without the server's adapter.

    Raises:
        ValueError: the text is no plan, or its options contradict one another.
    """

    def refused(reason: str) -> ValueError:
        return ValueError(f"plan={text!r} is refused: {reason}. Allowed: {ALLOWED}.")

    if text == DENSE.name:
        return DENSE
    options: dict[str, str | int] = {"star": "on"}
    for part in text.split(",") if text != "default" else ():
        letter, equals, value = ("B", "=", part) if part.startswith("n/") else part.strip().partition("=")
        if letter not in LETTERS or not equals:
            raise refused(f"{part!r} is no option of a plan")
        if LETTERS[letter] in options:
            raise refused(f"{letter} is given twice")
        options[LETTERS[letter]] = int(value) if value.isascii() and value.isdigit() else value
    try:
        parse_options(options)
    except ValueError as error:
        raise ValueError(f"plan={text!r}: {error}") from None
    return Plan(text, options)


def with_dense(plans: Iterable[Plan]) -> list[Plan]:
    """Return dense, and then the other plans, each once.

    Raises:
        ValueError: two plans have the same name, or the same options.
    """
    found = [DENSE]
    for plan in plans:
        if plan == DENSE:
            continue
        for other in found:
            if plan.name == other.name:
                raise ValueError(f"plan={plan.name!r} is refused: it is given twice. Allowed: each plan once.")
            if plan.options == other.options:
                raise ValueError(
                    f"plan={plan.name!r} is refused: it is the same plan as {other.name}. Allowed: each plan once."
                )
        found.append(plan)
    return found

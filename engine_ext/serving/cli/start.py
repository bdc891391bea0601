"""`starling serve`: what can be refused without vLLM is refused before vLLM is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from starling.engine_ext.serving.cli.start_checks import refuse_mistakes

UNUSABLE = 2


def run(argv: Sequence[str]) -> int:
    """Serve until a signal, and return the exit code of serve.py, or 2 for a mistake in the command line."""
    try:
        refuse_mistakes(argv)
    except ValueError as error:
        print(f"starling serve: error: {error}", file=sys.stderr)
        return UNUSABLE
    from starling.engine_ext.serving.cli.serve import run as serve

    return serve(argv)

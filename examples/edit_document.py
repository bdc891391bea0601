"""Edit one document of a long prompt over several turns, and print each turn's time to first token and cached tokens.

python examples/edit_document.py --turns 5

Each document starts with a token whose text the request gives as star_segments. The server then computes each document
at positions of its own, wherever it stands. So an edit that makes a document longer leaves the others as they are: the
server computes only the edited document and the question.

The example needs a server of `starling serve`, such as `make serve`. Only servers with
--star-segments, as a preset has it, or --enable-prompt-tokens-details report the number of cached tokens.
"""

import argparse
import sysconfig
from pathlib import Path

import httpx
from completions import Completions
from openai import OpenAIError

HEAD = "These are files of a library, and a question about them.\n" * 8
QUESTION = "\n\nWhat are these files about?\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the server (default: %(default)s)")
    parser.add_argument("--mark", default="<file_sep>", help="first token of each document (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=8, help="number of documents (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=2000, help="maximum per document (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="number of edits (default: %(default)s)")
    parser.add_argument("--edit", type=int, default=4, help="document to edit (default: %(default)s)")
    args = parser.parse_args()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: args.documents]
    documents = [f"{args.mark}{path.name}\n{path.read_text()[: args.characters]}" for path in files]
    try:
        client = Completions(args.url)
        star = {
            "star": "on",
            "star_query_tokens": len(client.tokenize(QUESTION)),
            "star_segments": args.mark,
        }
        for turn in range(args.turns + 1):
            if turn:
                documents[args.edit - 1] += f"# Edited in turn {turn}.\n"
            answer = client.ask("".join([HEAD, *documents, QUESTION]), star, max_tokens=4)
            cached = "?" if answer.cached_tokens is None else answer.cached_tokens
            name = f"document {args.edit} edited" if turn else "the first time"
            tokens = f"{cached} of {answer.prompt_tokens} prompt tokens cached"
            print(f"{name}: first token after {answer.seconds:.2f} s; {tokens}")
    except (OpenAIError, httpx.HTTPError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

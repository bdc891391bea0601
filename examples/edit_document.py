"""Edit one document of a long prompt over several turns, and print each turn's time to first token and cached tokens.

python examples/edit_document.py --turns 5

Each document starts with a token that the request names as star_segment_token. The server then starts each document at
the border of a star block, whatever the lengths of the documents before it. An edit that makes a document longer
therefore moves no other document: the server computes only the edited document's blocks and the question.

The example needs a server of `starling serve`, such as `make serve`. Only servers started with
--enable-prompt-tokens-details report the number of cached tokens.
"""

import argparse
import os
import sysconfig
import time
from pathlib import Path

import httpx
from openai import OpenAI, OpenAIError

QUESTION = "\n\nWhat are these files about?\n"


def tokenize(url: str, text: str) -> list[int]:
    """Token ids of a text without special tokens; raises httpx.HTTPError if the server does not answer."""
    response = httpx.post(f"{url}/tokenize", json={"prompt": text, "add_special_tokens": False}, timeout=60)
    response.raise_for_status()
    return response.json()["tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the server (default: %(default)s)")
    parser.add_argument("--mark", default="<file_sep>", help="first token of each document (default: %(default)s)")
    parser.add_argument("--block", type=int, default=512, help="tokens of a star block (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=8, help="number of documents (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=2000, help="maximum per document (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="number of edits (default: %(default)s)")
    parser.add_argument("--edit", type=int, default=4, help="document to edit; 1 has the anchor (default: %(default)s)")
    args = parser.parse_args()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: args.documents]
    documents = [f"{args.mark}{path.name}\n{path.read_text()[: args.characters]}" for path in files]
    client = OpenAI(base_url=f"{args.url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        mark, question = tokenize(args.url, args.mark), tokenize(args.url, QUESTION)
        if len(mark) > 1:
            raise SystemExit(f"--mark {args.mark!r} must be one token of this model, but it is {len(mark)} tokens")
        star = {
            "star": "on",
            "star_block_size": args.block,
            "star_query_tokens": len(question),
            "star_segment_token": mark[0],
        }
        model = client.models.list().data[0].id
        for turn in range(args.turns + 1):
            if turn:
                documents[args.edit - 1] += f"# Edited in turn {turn}.\n"
            start = time.perf_counter()
            stream = client.completions.create(
                model=model,
                prompt="".join([*documents, QUESTION]),
                max_tokens=4,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"add_special_tokens": False, "vllm_xargs": star},
            )
            first_token = usage = None
            for chunk in stream:
                first_token = first_token or time.perf_counter() - start
                usage = chunk.usage or usage
            details = usage.prompt_tokens_details
            cached = "?" if details is None else details.cached_tokens
            name = f"document {args.edit} edited" if turn else "the first time"
            tokens = f"{cached} of {usage.prompt_tokens} prompt tokens cached"
            print(f"{name}: first token after {first_token:.2f} s; {tokens}")
    except (OpenAIError, httpx.HTTPError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

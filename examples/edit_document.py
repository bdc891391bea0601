"""Edit one document of a long prompt, turn after turn: each turn's time to first token, and what came from the cache.

python examples/edit_document.py --turns 5

Every document is padded to the length of a star block, so an edit changes one block and moves no other: only that
block and the question are computed. Needs a server of `starling serve`, such as `make serve`; what was cached is told
by servers started with --enable-prompt-tokens-details.
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
    response = httpx.post(f"{url}/tokenize", json={"prompt": text, "add_special_tokens": False}, timeout=60)
    response.raise_for_status()
    return response.json()["tokens"]


def padded(tokens: list[int], length: int, padding: list[int]) -> list[int]:
    """The tokens cut, or filled up with padding, to ``length``."""
    return (tokens + padding * length)[:length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--block", type=int, default=512, help="tokens of a document and of a star block (%(default)s)")
    parser.add_argument("--documents", type=int, default=12, help="how many (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="edits (default: %(default)s)")
    parser.add_argument("--edit", type=int, default=6, help="which document, from 1; 0 is the anchor (%(default)s)")
    args = parser.parse_args()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: args.documents + 1]
    client = OpenAI(base_url=f"{args.url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        newline, question = tokenize(args.url, "\n"), tokenize(args.url, QUESTION)
        texts = [path.read_text()[: args.block * 3] for path in files]
        documents = [padded(tokenize(args.url, text), args.block, newline) for text in texts]
        model = client.models.list().data[0].id
        star = {"star": "on", "star_block_size": args.block, "star_query_tokens": len(question)}
        for turn in range(args.turns + 1):
            if turn:
                edited = f"# Edited in turn {turn}.\n{texts[args.edit]}"
                documents[args.edit] = padded(tokenize(args.url, edited), args.block, newline)
            prompt = [token for document in documents for token in document] + question
            start = time.perf_counter()
            stream = client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=4,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"vllm_xargs": star},
            )
            first = usage = None
            for chunk in stream:
                first = first or time.perf_counter() - start
                usage = chunk.usage or usage
            details = usage.prompt_tokens_details
            cached = "?" if details is None else details.cached_tokens
            what = f"document {args.edit} edited" if turn else "the first time"
            print(
                f"{what}: first token after {first:.2f} s; {cached} of {len(prompt)} prompt tokens cached", flush=True
            )
    except (OpenAIError, httpx.HTTPError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

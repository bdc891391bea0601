"""Ask a question with OpenAI's own client, with or without Star Attention, and print the plan of the prompt.

python examples/openai_client.py "What is the capital of France?" --star-block-size 128
"""

import argparse
import os

from openai import OpenAI, OpenAIError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the server (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--star-block-size", type=int, metavar="B", help="use Star Attention with blocks of B tokens")
    args = parser.parse_args()

    star = {"star": "on", "star_block_size": args.star_block_size} if args.star_block_size is not None else {}
    client = OpenAI(base_url=f"{args.url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        # The raw response gives access to the headers, which arrive before the first chunk.
        response = client.chat.completions.with_raw_response.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": args.question}],
            temperature=0,
            max_tokens=args.max_tokens,
            stream=True,
            extra_body={"vllm_xargs": star},
        )
        print(f"x-starling-plan: {response.headers.get('x-starling-plan')}\n")
        for chunk in response.parse():
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    except OpenAIError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

"""Stream a completion over gRPC, with or without Star Attention.

python examples/grpc_stream.py "The capital of France is" --star-block-size 128
"""

import argparse

from starling.client import Client, Delta, Final, StarlingError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--star-block-size", type=int, metavar="B", help="use Star Attention with blocks of B tokens")
    args = parser.parse_args()

    star = {"mode": "on", "block_size": args.star_block_size} if args.star_block_size is not None else None
    with Client(args.address) as client:
        try:
            for event in client.stream(args.prompt, temperature=0, max_tokens=args.max_tokens, star=star):
                if isinstance(event, Delta):
                    print(event.text, end="", flush=True)
                elif isinstance(event, Final):
                    print(f"\n\n{event.finish_reason}, {event.usage}\n{event.plan}")
        except StarlingError as error:
            raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

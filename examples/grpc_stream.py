"""Stream a completion over gRPC, with or without Star Attention.

python examples/grpc_stream.py "The capital of France is" --star-block-size 128
"""

import argparse

import grpc

from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--star-block-size", type=int, metavar="B", help="use Star Attention, in blocks of B tokens")
    args = parser.parse_args()

    request = pb.GenerateStreamRequest(
        text=args.prompt, sampling=pb.SamplingParams(temperature=0, max_tokens=args.max_tokens)
    )
    if args.star_block_size is not None:
        request.star.mode = pb.StarOptions.MODE_ON
        request.star.block_size = args.star_block_size

    with grpc.insecure_channel(args.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            for event in stub.GenerateStream(request):
                if event.WhichOneof("event") == "delta":
                    print(event.delta.text, end="", flush=True)
                else:
                    print(f"\n\n{event.final}", end="")
        except grpc.RpcError as error:
            raise SystemExit(f"{error.code().name}: {error.details()}") from None


if __name__ == "__main__":
    main()

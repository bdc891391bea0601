"""Serve the demo model over HTTP and gRPC until Ctrl-C, and print commands to try.

python examples/serve_demo.py --port 8000 --grpc-port 50051
"""

import argparse
import contextlib
import json
import os
import sys
import textwrap
from pathlib import Path

from rich.console import Console
from server import Server, end_on_signals, serving

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "smollm2-135m-instruct"
LOG = ROOT / "build" / "serve-server.log"

LONG_PROMPT = f"""import json; print(json.dumps({{"model": "{MODEL.name}", "max_tokens": 8,
    "prompt": "The quick brown fox jumps over the lazy dog. " * 100 + "In one word, the animal is a",
    "vllm_xargs": {{"star": "on", "star_block_size": 128, "star_query_tokens": 32}}}}))"""
"""Python code, that of docs/five-minutes.md, which prints a request."""


def commands(server: Server) -> dict[str, str]:
    """Return the command lines to try, by description. They work unchanged from the current directory."""
    chat = {
        "model": MODEL.name,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 32,
        "temperature": 0,
        "vllm_xargs": {"star": "on", "star_block_size": 128},
    }
    generate = {
        "text": "The capital of France is",
        "sampling": {"maxTokens": 16, "temperature": 0},
        "star": {"mode": "MODE_ON", "blockSize": "128"},
    }
    python, examples = os.path.relpath(sys.executable), os.path.relpath(ROOT / "examples")
    star = "--star-block-size 128"
    return {
        "a long prompt; the x-starling-plan header of the response says that it was prefilled with Star Attention": (
            f"{python} -c '{LONG_PROMPT}' | "
            f"curl -i {server.http}/v1/completions -H 'content-type: application/json' -d @-"
        ),
        "a chat; this prompt and the next two are shorter than a star block, so their plan is dense": (
            f"curl -i {server.http}/v1/chat/completions -H 'content-type: application/json' -d '{json.dumps(chat)}'"
        ),
        "OpenAI API, from Python": (
            f"{python} {examples}/openai_client.py 'What is the capital of France?' --url {server.http} {star}"
        ),
        "gRPC, from Python": (
            f"{python} {examples}/grpc_stream.py 'The capital of France is' --address {server.grpc} {star}"
        ),
        "editing one document of a long prompt: how many prompt tokens come from the cache": (
            f"{python} {examples}/edit_document.py --url {server.http}"
        ),
        "a coding agent's session, whose files and tool results change: tokens computed and time of each turn": (
            f"{python} {examples}/agent_session.py --url {server.http}"
        ),
        "questions about the standard library, answered from its documentation": (
            f"{python} {examples}/rag.py --url {server.http}"
        ),
        "gRPC, with grpcurl": (
            f"grpcurl -plaintext -d '{json.dumps(generate)}' {server.grpc} starling.v1.InferenceService/GenerateStream"
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    in_use = "if it is in use, a free port is used"
    parser.add_argument("--port", type=int, default=8000, help=f"HTTP port; {in_use} (default: %(default)s)")
    parser.add_argument("--grpc-port", type=int, default=50051, help=f"gRPC port; {in_use} (default: %(default)s)")
    args = parser.parse_args()
    end_on_signals()
    console = Console(highlight=False)
    with contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
        with console.status("starting") as status:
            server = stack.enter_context(
                serving(
                    MODEL,
                    *("--served-model-name", MODEL.name, "--enforce-eager", "--dtype", "bfloat16"),
                    "--enable-prompt-tokens-details",
                    log=LOG,
                    port=args.port,
                    grpc_port=args.grpc_port,
                    on_message=lambda message: status.update(f"starting: {message:.80}"),
                )
            )
        print(f"{MODEL.name} is served on {server.http} and over gRPC on {server.grpc}; log: {os.path.relpath(LOG)}")
        for description, command in commands(server).items():
            print(f"\n{description}:\n{textwrap.indent(command, '    ')}")
        print("\nPress Ctrl-C to stop the server.", flush=True)
        server.process.wait()


if __name__ == "__main__":
    main()

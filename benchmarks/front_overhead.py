"""The cost of a streamed token over gRPC, over HTTP and in process: `python -m benchmarks.front_overhead`.

One process runs one engine and both fronts, as `starling serve` does. It also calls AsyncLLM.generate. The gRPC and
HTTP clients run in another process. Each round measures all three, in rotated order. The model is tiny, so that its own
time is small. The benchmark reports the time until all streams have ended, and the CPU time of the serving process:
that is the cost for a server with remote clients. Writes results/front_overhead.json and .png.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from rich.console import Console
from rich.table import Table
from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.sampling_params import RequestOutputKind, SamplingParams

from benchmarks.engine import QUIET
from benchmarks.random_llama import make_tiny_llama
from benchmarks.report import saved_figure, write_json
from benchmarks.streaming_clients import PROMPT, time_streams
from examples.server import free_ports
from starling.engine_ext.serving.cli.serve import start_front
from starling.engine_ext.serving.cli.serve_args import parse, refuse_open_plaintext
from starling.engine_ext.serving.grpc.server_options import NO_ADMIN
from starling.engine_ext.start import plugin
from starling.lab.statistics import ratio_interval

IN_PROCESS, GRPC, HTTP = WAYS = ("in process", "gRPC", "HTTP")
MODEL = "tiny"
WALL, CPU = KINDS = ("time", "CPU time of the server")
Times = dict[str, list[float]]  # kind -> microseconds a streamed token, one value a round


class ServedEngine:
    """One engine with both fronts, in this event loop."""

    def __init__(self, engine: Any, grpc_address: str, http_address: str, pool: ProcessPoolExecutor) -> None:
        self.engine, self.pool = engine, pool
        self.addresses = {GRPC: grpc_address, HTTP: http_address}

    async def seconds(self, way: str, streams: int, tokens: int) -> float:
        """Return the seconds until ``streams`` concurrent streams have returned ``tokens`` tokens each."""
        if way == IN_PROCESS:
            return await self._in_process(streams, tokens)
        run = asyncio.get_running_loop().run_in_executor
        return await run(self.pool, time_streams, way, self.addresses[way], streams, tokens, MODEL)

    async def _in_process(self, streams: int, tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)

        async def count_tokens(index: int) -> int:
            outputs = self.engine.generate(PROMPT, params, f"direct-{time.monotonic_ns()}-{index}")
            return sum([len(output.outputs[0].token_ids) async for output in outputs])

        started = time.perf_counter()
        counts = await asyncio.gather(*map(count_tokens, range(streams)))
        seconds = time.perf_counter() - started
        assert counts == [tokens] * streams
        return seconds


async def measure(model: Path, loads: list[int], tokens: int, rounds: int) -> dict[int, dict[str, Times]]:
    """Return concurrent streams -> way -> its times."""
    http, grpc = free_ports(0, 0)
    options = ["--dtype", "float32", "--enforce-eager", "--served-model-name", MODEL, "--disable-log-stats"]
    args, grpc_port = parse(
        [str(model), "--host", "127.0.0.1", "--port", str(http), "--grpc-port", str(grpc), *options]
    )
    args.model, args.uvicorn_log_level = str(model), "warning"
    refuse_open_plaintext(args, grpc_port, NO_ADMIN)
    listen_address, sock = setup_server(args, reuse_port=False)
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with sock, pool:
        async with build_async_engine_client(args) as engine:
            front, grpc_address = await start_front(engine, args, grpc_port, NO_ADMIN)
            serving = asyncio.ensure_future(build_and_serve(engine, listen_address, sock, args))
            await wait_until_ready(f"http://127.0.0.1:{http}/health")
            served = ServedEngine(engine, grpc_address, f"http://127.0.0.1:{http}", pool)
            result = {streams: await interleave(served, streams, tokens, rounds) for streams in loads}
            await front.stop(0)
            os.kill(os.getpid(), signal.SIGTERM)
            await (await serving)
    return result


async def wait_until_ready(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url):
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)


async def interleave(served: ServedEngine, streams: int, tokens: int, rounds: int) -> dict[str, Times]:
    """Return way -> its times over ``rounds`` rounds, after one round as a warm-up."""
    times: dict[str, Times] = {way: {WALL: [], CPU: []} for way in WAYS}
    for index in range(-1, rounds):
        turn = index % len(WAYS)
        for way in WAYS[turn:] + WAYS[:turn]:
            before = time.process_time()
            seconds = {WALL: await served.seconds(way, streams, tokens), CPU: time.process_time() - before}
            if index >= 0:
                for kind, value in seconds.items():
                    times[way][kind].append(value / streams / tokens * 1e6)
    return times


def plot(result: dict[int, dict[str, Times]], path: Path) -> None:
    with saved_figure(path, 1, len(KINDS), figsize=(9, 3.5)) as (_, axes):
        for axis, kind in zip(axes, KINDS, strict=True):
            for column, way in enumerate(WAYS):
                positions = [row + (column - 1) * 0.27 for row in range(len(result))]
                medians = [statistics.median(times[way][kind]) for times in result.values()]
                axis.bar(positions, medians, 0.25, label=way)
            axis.set_xticks(range(len(result)), [f"{streams} at once" for streams in result])
            axis.set_ylabel(f"{kind}, µs a streamed token")
        axes[0].legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64], help="concurrent streams (%(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each stream (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each way (%(default)s)")
    args = parser.parse_args()
    os.environ.update(QUIET | {"VLLM_CPU_KVCACHE_SPACE": "1"})
    plugin.register()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_llama(Path(folder) / MODEL, num_hidden_layers=1, max_position_embeddings=2048)
        result = uvloop.run(measure(model, args.streams, args.tokens, args.rounds))
    table = Table("streams at once", "µs a token", *WAYS, "gRPC over HTTP", "95 %")
    ratios = {
        streams: {kind: ratio_interval(times[HTTP][kind], times[GRPC][kind]) for kind in KINDS}
        for streams, times in result.items()
    }
    for streams, times in result.items():
        for kind, (ratio, lower, upper) in ratios[streams].items():
            medians = [f"{statistics.median(times[way][kind]):.0f}" for way in WAYS]
            table.add_row(str(streams), kind, *medians, f"{ratio:.2f}", f"{lower:.2f} to {upper:.2f}")
    Console(width=110).print(table)
    path = write_json("front_overhead", {"us_per_token": result, "grpc_over_http": ratios})
    plot(result, path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()

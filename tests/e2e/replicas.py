"""Prompts for servers of several replicas: requests, outputs, and what each replica has computed."""

import json
import random
import re
import urllib.request
from http.client import HTTPConnection

import grpc
import numpy as np

from starling.scheduler.planning.assignment import ReplicaState, assign_blocks
from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc

PAGE_SIZE, TOKENS = 32, 6
ENGINE_OPTIONS = [
    *("--dtype", "float32", "--block-size", str(PAGE_SIZE), "--enforce-eager", "--max-num-batched-tokens", "128")
]
TOLERANCE = 1e-5
REPLICAS = 3


def random_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 250), k=length)


def body(server, prompt: list[int], star: dict | None, **more) -> dict:
    greedy = {"model": server.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
    return greedy | {"ignore_eos": True, "return_tokens_as_token_ids": True, "vllm_xargs": star or {}} | more


def post(server, prompt, star=None, headers=None, **more):
    """The response to a completion request, as a context manager."""
    data = json.dumps(body(server, prompt, star, **more)).encode()
    headers = {"content-type": "application/json"} | (headers or {})
    return urllib.request.urlopen(urllib.request.Request(f"{server.http}/v1/completions", data, headers), timeout=300)


def connect(server, seconds: float = 300) -> HTTPConnection:
    return HTTPConnection("127.0.0.1", int(server.http.rsplit(":", 1)[1]), timeout=seconds)


def send(connection: HTTPConnection, server, prompt, star, **more) -> None:
    """Send a completion request without waiting for the response."""
    data = json.dumps(body(server, prompt, star, **more))
    connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})


def complete(server, prompt, star=None, **more):
    """(tokens, logprobs, plan) of one completion."""
    with post(server, prompt, star, **more) as response:
        return parse_completion(response)


def parse_completion(response):
    """(tokens, logprobs, plan) of a response."""
    plan, choice = json.loads(response.headers["x-starling-plan"]), json.loads(response.read())["choices"][0]
    return choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"], plan


def metrics(server, name: str) -> dict[str, float]:
    """Label set, as it is printed -> value of a metric."""
    with urllib.request.urlopen(f"{server.http}/metrics", timeout=300) as response:
        lines = [line.rsplit(" ", 1) for line in response.read().decode().splitlines()]
    return {labels.removeprefix(name): float(value) for labels, value in lines if labels.split("{")[0] == name}


def computed(server, replicas: int = REPLICAS) -> list[int]:
    """Tokens that each replica has computed so far."""
    counts = metrics(server, "starling:computed_tokens_total")
    return [int(counts[f'{{replica="{replica}"}}']) for replica in range(replicas)]


def computed_since(server, before: list[int]) -> list[int]:
    """Tokens that each replica has computed since ``computed`` returned ``before``."""
    return [after - earlier for after, earlier in zip(computed(server, len(before)), before, strict=True)]


def count_plans(server) -> int:
    """Prompts that the server has planned so far."""
    return len(re.findall(r"\ba prompt of \d+ tokens: ", server.log.read_text()))


def expected(length: int, star: dict, states: list[ReplicaState]) -> list[int]:
    """Tokens that each replica has to compute: its star blocks, an anchor that it does not have, and the query."""
    block, end = star["star_block_size"], (length - star["star_query_tokens"]) // PAGE_SIZE * PAGE_SIZE
    blocks = -(-(length - star["star_query_tokens"]) // block)
    assignments = assign_blocks(np.ones(blocks), 1.0, states, star["star_replicas"])
    assert len(assignments) > 1
    tokens = [0] * len(states)
    for assignment in assignments:
        state = states[assignment.replica]
        for index in range(assignment.first, assignment.stop):
            if not any(state.cached[index : index + 1]):
                tokens[assignment.replica] += min((index + 1) * block, end) - index * block
        if assignment.first and not state.has_anchor:
            tokens[assignment.replica] += block
    tokens[assignments[0].replica] += length - end + TOKENS - 1
    return tokens


def assert_same(one, other, tolerance: float = TOLERANCE) -> None:
    assert one[0] == other[0]
    assert max(abs(a - b) for a, b in zip(one[1], other[1], strict=True)) <= tolerance


def complete_on_one(server, prompt, star):
    """The completion with the same plan on one replica, without prefix hits."""
    output = complete(server, prompt, star | {"star_replicas": 1}, cache_salt="another")
    assert output[2]["replicas"] == 1
    return output


def complete_over_grpc(server, prompt, **star):
    """(tokens, logprobs, plan) of one completion over gRPC."""
    star = pb.StarOptions(mode=pb.StarOptions.MODE_ON, block_size="256", query_tokens=40, **star)
    sampling = pb.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, n=1, logprobs=0)
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), star=star, sampling=sampling)
    with grpc.insecure_channel(server.grpc) as channel:
        reply = inference_pb2_grpc.InferenceServiceStub(channel).Generate(message, timeout=300)
    (choice,) = reply.choices
    logprobs = [position.chosen.logprob for position in choice.logprobs]
    return [f"token_id:{token}" for token in choice.token_ids], logprobs, reply.plan


def options(replicas: int, block: int = 256, query: int = 40) -> dict:
    return {"star": "on", "star_block_size": block, "star_query_tokens": query, "star_replicas": replicas}

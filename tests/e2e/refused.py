"""Requests that a server refuses: options, what the refusal says, and the field that it names over gRPC."""

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from starling.v1 import inference_pb2 as pb

BAD = {
    "unknown": ({"star_blok": 128}, ["star_blok", "128", "no such star option", "star_block_size"]),
    "text": ({"star_block_size": "big"}, ["star_block_size", "big", "whole number", "multiple of the KV page"]),
    "list": ({"star_block_size": [128]}, ["star_block_size", "128", "whole number"]),
    "a number": ({"star": 2}, ["star", "2", "one of off, on, auto"]),
    "off the page": ({"star": "on", "star_block_size": 100}, ["star_block_size", "100", "32 tokens", "multiple of 32"]),
    "A above B": (
        {"star": "on", "star_block_size": 64, "star_anchor_size": 128},
        ["star_anchor_size", "128", "larger than the star block of 64", "from 0 to 64"],
    ),
    "O above B": (
        {"star": "on", "star_block_size": 64, "star_overlap_size": 96},
        ["star_overlap_size", "96", "larger than the star block of 64", "from 0 to 64"],
    ),
    "long query": ({"star": "on", "star_query_tokens": 8000}, ["star_query_tokens", "8000", "prompt has only"]),
    "negative": ({"star_query_tokens": -1}, ["star_query_tokens", "-1", "0 or more"]),
    "not one token": (
        {"star": "on", "star_segments": "several words"},
        ["star_segments", "several words", "not one token", "the text of one token"],
    ),
    "nearly an option": ({"star": "on", "block_size": 64}, ["block_size", "did you mean star_block_size"]),
    "offsets that do not ascend": (
        {"star": "on", "star_segments": [4, 9, 7]},
        ["star_segments", "(4, 9, 7)", "7 follows 9", "a list of token offsets"],
    ),
    "an offset behind the prompt": (
        {"star": "on", "star_segments": [4, 9000]},
        ["star_segments", "(4, 9000)", "9000 is not one of them"],
    ),
    "many offsets": (
        {"star": "on", "star_segments": list(range(10_000))},
        ["star_segments", "[0, 1, 2, 3, 4, 5, ...]", "it has 10000 elements"],
    ),
    "nested": ({"star": {"block_size": 64}}, ["vllm_xargs"]),  # vLLM refuses it
}


BAD_OVER_GRPC = ["off the page", "A above B", "O above B", "long query", "not one token"]


BAD_SEGMENTS = {
    "offsets that do not ascend": ({"segment_offsets": [4, 9, 7]}, "star.segment_offsets", "7 follows 9"),
    "an offset behind the prompt": ({"segment_offsets": [4, 9000]}, "star.segment_offsets", "9000 is not one of them"),
    "no chat": ({"segments": "auto"}, "star.segments", "the prompt is not a chat"),
    "offsets beside auto": (
        {"segment_offsets": [4], "segments": "auto"},
        "star.segment_offsets",
        "segments already says where documents start",
    ),
}
BAD_FIELDS = [
    ({"star": pb.StarOptions(mode=9)}, "star.mode"),
    ({"text": ""}, "text"),
    ({"text": "x" * 9000}, "text"),
    ({"text": "x" * 8192}, "text"),
    ({"text": None, "token_ids": pb.TokenIds(ids=[9999])}, "token_ids"),
    ({"text": None, "texts": pb.Texts()}, "texts"),
    ({"text": None, "texts": pb.Texts(texts=["one"])}, "texts"),
    ({"text": None, "texts": pb.Texts(texts=["one", ""])}, "texts"),
    ({"text": None, "texts": pb.Texts(texts=["x"] * 9000)}, "texts"),
    ({"cache_salt": "a/b"}, "cache_salt"),
    ({"sampling": pb.SamplingParams(top_p=2)}, "sampling.top_p"),
    ({"sampling": pb.SamplingParams(max_tokens=0)}, "sampling.max_tokens"),
    ({"sampling": pb.SamplingParams(stop_token_ids=[9999])}, "sampling.stop_token_ids"),
    ({"sampling": pb.SamplingParams(n=2, temperature=0)}, "sampling.n"),
    ({"sampling": pb.SamplingParams(logprobs=21)}, "sampling.logprobs"),
    ({"sampling": pb.SamplingParams(prompt_logprobs=21)}, "sampling.prompt_logprobs"),
    ({"sampling": pb.SamplingParams(logit_bias={9999: 1})}, "sampling.logit_bias"),
    ({"sampling": pb.SamplingParams(extra_args='{"star": "on"}')}, "sampling.extra_args"),
    ({"sampling": {"structured_outputs": {"regex": "("}}}, "sampling.structured_outputs.regex"),
    ({"sampling": {"structured_outputs": {"json_schema": "{"}}}, "sampling.structured_outputs.json_schema"),
    ({"sampling": {"structured_outputs": {"json_schema": ""}}}, "sampling.structured_outputs.json_schema"),
    (
        {"sampling": {"structured_outputs": {"json_schema": '{"type": "string", "minLength": -1}'}}},
        "sampling.structured_outputs.json_schema",
    ),
    ({"lora_name": "none"}, "lora_name"),
    ({"priority": 1}, "priority"),
]


def refused_fields(error: grpc.RpcError) -> list[str]:
    """The fields in the BadRequest details of an error, which has status INVALID_ARGUMENT."""
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    details = error_details_pb2.BadRequest()
    assert rpc_status.from_call(error).details[0].Unpack(details)
    return [violation.field for violation in details.field_violations]

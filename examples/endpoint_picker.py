"""An endpoint picker for Kubernetes' InferencePool that knows what each server has cached.

    python examples/endpoint_picker.py HOST:PORT [HOST:PORT ...]

A gateway asks it, by Envoy's ext_proc, which server gets a request, and sends the request there itself (the Endpoint
Picker Protocol of the Gateway API Inference Extension). It chooses as document_router.py does: the server with the
fewest tokens to compute before the prompt's first token. A host's servers are all its addresses, which are looked up
every two seconds: a headless Service of Kubernetes has those of all ready pods.

The gateway sends bodies with FULL_DUPLEX_STREAMED, or those of requests with BUFFERED. Needs envoy-data-plane,
grpcio-health-checking, httpx, starlette and uvicorn (docs/routers.md).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from betterproto2 import which_one_of
from document_router import MAX_BODY, PATHS, Headers, Router, Server
from envoy_data_plane.envoy.config.core.v3 import (
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
)
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode as BodyMode
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    BodyMutation,
    BodyResponse,
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    HttpBody,
    HttpHeaders,
    ImmediateResponse,
    ProcessingRequest,
    ProcessingResponse,
    StreamedBodyResponse,
    TrailersResponse,
)
from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
from envoy_data_plane.google.protobuf import Struct
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
HEALTH_NAMES = ("", "liveness", "readiness", SERVICE)
DESTINATION, DESTINATION_METADATA = "x-gateway-destination-endpoint", "envoy.lb"
SUBSET, SUBSET_METADATA = "x-gateway-destination-endpoint-subset", "envoy.lb.subset_hint"
LOOK_UP_SECONDS = 2.0
GRACE_SECONDS = 60.0
"""After SIGTERM, for the requests whose messages come: their answers pass through this process."""
PIECE = 60_000
"""Bytes of a body in one message: Envoy takes less than 64 KiB."""

log = logging.getLogger("picker")


class Refusal(Exception):
    """The client gets this answer, and no server the request."""

    def __init__(self, status: StatusCode, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class Request:
    """A client's request, as its messages come in.

    Attributes:
        streamed: True if the gateway holds the request until all its messages are answered; False if it waits for an
            answer to the headers, and then sends the body as one message.
        subset: the endpoints of which one may be chosen, or None for any.
    """

    headers: Headers = field(default_factory=list)
    path: str = ""
    body: bytearray = field(default_factory=bytearray)
    streamed: bool = True
    subset: frozenset[str] | None = None
    is_sent: bool = False

    def begin(self, message: ProcessingRequest, headers: HttpHeaders) -> BodyMode:
        """Take the first message; returns how the body is sent."""
        for each in headers.headers.headers if headers.headers else ():
            value = each.raw_value or each.value.encode()
            if each.key == ":path":
                self.path = value.decode(errors="replace").partition("?")[0]
            elif not each.key.startswith(":"):
                self.headers.append((each.key.encode(), value))
        given = message.metadata_context.filter_metadata if message.metadata_context else {}
        self.subset = subset_of(given)
        config = message.protocol_config
        mode = config.request_body_mode if config else BodyMode.FULL_DUPLEX_STREAMED
        self.streamed = mode == BodyMode.FULL_DUPLEX_STREAMED
        return mode

    def add(self, part: HttpBody) -> None:
        self.body += part.body
        if len(self.body) > MAX_BODY:
            raise Refusal(StatusCode.PayloadTooLarge, f"the body is refused: it has more than {MAX_BODY} bytes")


def subset_of(metadata: Mapping[str, Struct]) -> frozenset[str] | None:
    """Return the endpoints that a gateway allows, from the metadata of its request, or None for all."""
    if SUBSET_METADATA not in metadata:
        return None
    allowed: Any = metadata[SUBSET_METADATA].to_dict().get(SUBSET)
    if isinstance(allowed, str):
        allowed = allowed.split(",")
    return None if allowed is None else frozenset(str(each).strip() for each in allowed)


class EndpointPicker:
    """Picks the servers of requests.

    Args:
        names: HOST:PORT of servers.
        endpoints: number of endpoints of an answer, the best first; the gateway tries the others if it retries.
        shed: number of tokens waiting at every server from which on requests are refused, or None to refuse none.
    """

    def __init__(self, names: Iterable[str], endpoints: int = 1, shed: int | None = None) -> None:
        self.names, self.endpoints, self.shed = list(names), endpoints, shed
        self.router = Router([])
        self.servers: dict[str, Server] = {}

    async def look_up(self) -> None:
        """Find out which servers there are. Those of a name that isn't found are gone."""
        found: list[str] = []
        for name in self.names:
            host, _, port = name.rpartition(":")
            try:
                infos = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
            except socket.gaierror as error:
                log.warning("%s has no address: %s", name, error)
                continue
            found += [f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in (str(info[4][0]) for info in infos)]
        if self.servers.keys() != set(found):
            log.info("servers: %s", ", ".join(found) or "none")
        self.servers = {each: self.servers.get(each) or Server(f"http://{each}") for each in found}

    async def pick(self, request: Request) -> tuple[list[str], Server, int]:
        """Return the endpoints of a request, the best first; the best one's server; and the tokens that it computes.

        Raises:
            Refusal: no server may get it.
        """
        subset = self.servers.keys() if request.subset is None else request.subset
        allowed = {name: each for name, each in self.servers.items() if name in subset}
        if not allowed:
            raise Refusal(StatusCode.ServiceUnavailable, "no server is ready")
        if self.shed is not None and all(each.waiting >= self.shed for each in allowed.values()):
            raise Refusal(StatusCode.TooManyRequests, f"{self.shed} tokens or more wait at every server")
        if request.path in PATHS and request.body:
            order = await self.router.ranked(allowed.values(), request.path, request.headers, bytes(request.body))
        else:
            order = [(0, each) for each in sorted(allowed.values(), key=lambda each: each.waiting)]
        name_of = {id(each): name for name, each in allowed.items()}
        tokens, best = order[0]
        return [name_of[id(each)] for _, each in order[: self.endpoints]], best, tokens

    async def process(
        self, messages: AsyncIterator[ProcessingRequest], context: object
    ) -> AsyncIterator[ProcessingResponse]:
        """Answer a gateway's messages about one request, and about its response."""
        request, response_is_streamed = Request(), True
        with contextlib.ExitStack() as computing:
            try:
                async for message in messages:
                    match which_one_of(message, "request"):
                        case "request_headers", HttpHeaders() as headers:
                            mode = request.begin(message, headers)
                            if config := message.protocol_config:
                                response_is_streamed = config.response_body_mode == BodyMode.FULL_DUPLEX_STREAMED
                            if headers.end_of_stream or mode == BodyMode.NONE:
                                request.streamed = True  # there is nothing to wait for
                                for answer in await self.send(request, computing, has_body=False):
                                    yield answer
                            elif mode == BodyMode.BUFFERED:
                                yield ProcessingResponse(request_headers=HeadersResponse())
                            elif not request.streamed:
                                text = "the gateway must send bodies with FULL_DUPLEX_STREAMED or BUFFERED"
                                raise Refusal(StatusCode.InternalServerError, text)
                        case "request_body", HttpBody() as part:
                            request.add(part)
                            if part.end_of_stream:
                                for answer in await self.send(request, computing):
                                    yield answer
                        case "request_trailers", _:
                            if not request.is_sent:
                                for answer in await self.send(request, computing, ends=False):
                                    yield answer
                            yield ProcessingResponse(request_trailers=TrailersResponse())
                        case "response_headers", _:
                            yield ProcessingResponse(response_headers=HeadersResponse())
                        case "response_body", HttpBody() as part:
                            computing.close()  # the server has begun to answer
                            if response_is_streamed:
                                for piece in pieces(part.body, part.end_of_stream):
                                    yield ProcessingResponse(response_body=piece)
                            else:
                                yield ProcessingResponse(response_body=BodyResponse())
                        case "response_trailers", _:
                            yield ProcessingResponse(response_trailers=TrailersResponse())
            except Refusal as refusal:
                log.warning("%s is refused: %d %s", request.path, refusal.status, refusal)
                told = ImmediateResponse(status=HttpStatus(code=refusal.status), body=str(refusal).encode())
                yield ProcessingResponse(immediate_response=told)

    async def send(
        self, request: Request, computing: contextlib.ExitStack, has_body: bool = True, ends: bool = True
    ) -> list[ProcessingResponse]:
        """Return the responses that let a request go on to its server.

        Args:
            computing: closed once the server has begun to answer, or the request has ended.
            has_body: True if the gateway waits for a body.
            ends: True if no trailers come.
        """
        names, server, tokens = await self.pick(request)
        computing.enter_context(server.computing(tokens))
        request.is_sent = True
        text = ",".join(names)
        header = HeaderValueOption(
            header=HeaderValue(key=DESTINATION, raw_value=text.encode()),
            append_action=HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
        )
        common = CommonResponse(header_mutation=HeaderMutation(set_headers=[header]), clear_route_cache=True)
        metadata = Struct.from_dict({DESTINATION_METADATA: {DESTINATION: text}})
        if not request.streamed:
            return [ProcessingResponse(request_body=BodyResponse(response=common), dynamic_metadata=metadata)]
        first = ProcessingResponse(request_headers=HeadersResponse(response=common), dynamic_metadata=metadata)
        body = pieces(bytes(request.body), ends) if has_body else ()
        return [first, *(ProcessingResponse(request_body=each) for each in body)]

    async def serve(self, args: argparse.Namespace) -> None:
        """Answer gateways, and checks of health, until the task is cancelled or SIGTERM comes."""
        checks = health.aio.HealthServicer()
        server, plain = (grpc.aio.server(options=[("grpc.max_receive_message_length", 2 * MAX_BODY)]) for _ in range(2))
        handler = grpc.stream_stream_rpc_method_handler(
            self.process, request_deserializer=ProcessingRequest.parse, response_serializer=bytes
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Process": handler}),))
        for each in (server, plain):
            health_pb2_grpc.add_HealthServicer_to_server(checks, each)
        if args.certificate:
            pair = (args.key.read_bytes(), args.certificate.read_bytes())
            server.add_secure_port(f"{args.host}:{args.port}", grpc.ssl_server_credentials([pair]))
        else:
            server.add_insecure_port(f"{args.host}:{args.port}")
        plain.add_insecure_port(f"{args.host}:{args.health_port}")
        await self.look_up()
        for name in HEALTH_NAMES:
            await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
        await asyncio.gather(server.start(), plain.start())
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        try:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), LOOK_UP_SECONDS)
                await self.look_up()
        finally:
            await checks.enter_graceful_shutdown()
            await server.stop(GRACE_SECONDS)
            await plain.stop(None)


def pieces(body: bytes, ends: bool) -> Iterator[BodyResponse]:
    """Yield a body as answers that pass it on."""
    starts = range(0, len(body), PIECE) or range(1)
    for start in starts:
        is_last = ends and start == starts[-1]
        piece = StreamedBodyResponse(body=body[start : start + PIECE], end_of_stream=is_last)
        yield BodyResponse(response=CommonResponse(body_mutation=BodyMutation(streamed_response=piece)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="HOST:PORT", help="servers, such as starling-pods:8000")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=9002, help="port for gateways (%(default)s)")
    parser.add_argument(
        "--health-port", type=int, default=9003, help="port of gRPC's health, in plain text (%(default)s)"
    )
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="for TLS on the gateways' port, with --key")
    parser.add_argument("--key", type=Path, metavar="FILE", help="of the certificate")
    parser.add_argument(
        "--endpoints", type=int, default=1, metavar="N", help="in an answer, the best first (%(default)s)"
    )
    parser.add_argument("--shed", type=int, metavar="TOKENS", help="refuse requests while so many wait at every server")
    args = parser.parse_args(arguments)
    if bool(args.certificate) != bool(args.key):
        parser.error("--certificate and --key go together")
    return args


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(EndpointPicker(args.names, args.endpoints, args.shed).serve(args))


if __name__ == "__main__":
    main()

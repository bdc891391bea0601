"""Receiving of a unary call's message: only after the call is allowed, within a time, and with few others at once.

gRPC's own handler of a unary call takes the whole message from the network before anything else. So a client without a
key, or one that stalls, could fill the memory. On the network a unary call is a stream of one message: Starling's
handler takes calls as streams, and reads the message itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from typing import Any
from weakref import WeakValueDictionary

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import DecodeError
from vllm.exceptions import VLLMValidationError

from starling.engine_ext.front.bounds import FIELDS
from starling.engine_ext.serving.grpc.auth import HEALTH_PREFIX, METHOD_HANDLERS, Continuation, host_of
from starling.engine_ext.serving.grpc.messages import SlowMessageError, abort
from starling.features.replicas.split.split_state import retrieve_error

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
"""Wire types of fields (protobuf's encoding); 3 and 4 are groups, which no message of starling.v1 has."""


def method_of(path: str) -> MethodDescriptor | None:
    """Return the method of a call's path, "/package.Service/Method", or None if this process has no code for it."""
    service, _, method = path.removeprefix("/").partition("/")
    try:
        return Default().FindServiceByName(service).methods_by_name.get(method)
    except KeyError:
        return None


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number on the wire, and the position of the next field.

    Raises:
        IndexError: the data ends before the number does.
    """
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def check_num_fields(data: bytes, message: Descriptor) -> None:
    """Check how many fields a message and its inner messages have. Packed numbers, and a map's entry, are one field.

    Data that is not a message is left to the parser, which reports it.

    Raises:
        VLLMValidationError: there are more than FIELDS.
    """
    if len(data) <= 2 * FIELDS.limit:  # a field has two bytes at least
        return
    count, left = 0, [(0, len(data), message)]
    try:
        while left:
            at, end, kind = left.pop()
            while at < end:
                count += 1
                if count > FIELDS.limit:
                    FIELDS.check(count)
                tag, at = varint(data, at)
                wire = tag & 7
                if wire == VARINT:
                    _, at = varint(data, at)
                elif wire == LENGTH:
                    size, at = varint(data, at)
                    inner = inner_message(kind, tag >> 3)
                    if inner is not None:
                        left.append((at, at + size, inner))
                    at += size
                elif wire in (FIXED64, FIXED32):
                    at += 8 if wire == FIXED64 else 4
                else:
                    return
    except IndexError:
        return


def inner_message(message: Descriptor, number: int) -> Descriptor | None:
    """Return the message type of the field of a number, or None if it holds no message or an entry of a map."""
    field = message.fields_by_number.get(number)
    if field is None or field.type != FieldDescriptor.TYPE_MESSAGE or field.message_type.GetOptions().map_entry:
        return None
    inner: Descriptor = field.message_type
    return inner


AT_ONCE, OF_CLIENT, SECONDS = 32, 16, 60.0
HEALTH_AT_ONCE, HEALTH_OF_HOST, HEALTH_SECONDS = 64, 8, 10.0  # of health calls that run: they need no key


ClientOf = Callable[[grpc.aio.ServicerContext], str]


async def arriving(message: Awaitable[Any], seconds: float) -> Any:
    """Wait for a message that gRPC is reading, and return it.

    A read that takes too long is not cancelled, because gRPC would keep its bytes. It ends with the call.

    Raises:
        SlowMessageError: the message did not arrive within ``seconds``.
    """
    reading = asyncio.ensure_future(message)
    reading.add_done_callback(retrieve_error)
    done, _ = await asyncio.wait({reading}, timeout=seconds)
    if not done:
        raise SlowMessageError(f"a message did not arrive within {seconds:.0f} s")
    return reading.result()


class Arrivals:
    """Limit of the messages that arrive at the same time. Further ones wait, unread.

    Args:
        at_once: number of messages of all clients.
        of_client: number of messages of one client.
        seconds: time from the start of the call to the end of the message.
        client_of: returns a name for the client of a call.
    """

    def __init__(self, at_once: int, of_client: int, seconds: float, client_of: ClientOf) -> None:
        self.client_of = client_of
        self.all = asyncio.Semaphore(at_once)
        self.of_client = of_client
        self.seconds = seconds
        self.clients: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def receive(self, context: grpc.aio.ServicerContext) -> Any:
        """Return the call's message as bytes, or grpc.aio.EOF if the client has sent none.

        Raises:
            SlowMessageError: the message did not arrive in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.seconds
        share = self.clients.setdefault(self.client_of(context), asyncio.Semaphore(self.of_client))
        async with AsyncExitStack() as held:
            for semaphore in (share, self.all):
                try:
                    async with asyncio.timeout_at(deadline):
                        await held.enter_async_context(semaphore)
                except TimeoutError:
                    raise SlowMessageError(f"other messages kept this one waiting for {self.seconds:.0f} s") from None
            return await arriving(context.read(), deadline - loop.time())


class RunningCalls:
    """Limit of the calls that run at the same time. Further ones are refused.

    Args:
        at_once: number of calls of all hosts.
        of_host: number of calls of one host.
    """

    def __init__(self, at_once: int, of_host: int) -> None:
        self.at_once = at_once
        self.of_host = of_host
        self.hosts: Counter[str] = Counter()

    @contextmanager
    def count(self, host: str) -> Iterator[bool]:
        """Count a call until the end of the block, and yield whether it is allowed."""
        allowed = self.hosts.total() < self.at_once and self.hosts[host] < self.of_host
        self.hosts[host] += allowed
        try:
            yield allowed
        finally:
            self.hosts[host] -= allowed
            self.hosts += Counter()  # drops hosts without a call


class ArrivalInterceptor(grpc.aio.ServerInterceptor):
    """Interceptor that receives the messages of unary calls; add it after the interceptors that refuse calls.

    Bytes that are not a message of the called method end the call with INVALID_ARGUMENT; gRPC itself would use UNKNOWN.

    Args:
        client_of: returns a name for the client of a call.
    """

    def __init__(self, client_of: ClientOf) -> None:
        self.arrivals = Arrivals(AT_ONCE, OF_CLIENT, SECONDS, client_of)
        self.health = Arrivals(HEALTH_AT_ONCE, HEALTH_OF_HOST, HEALTH_SECONDS, host_of)
        self.health_calls = RunningCalls(HEALTH_AT_ONCE, HEALTH_OF_HOST)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        handler = counting_handler(handler, handler_call_details.method)
        if handler.request_streaming:
            return handler
        if handler_call_details.method.startswith(HEALTH_PREFIX):
            return limited_handler(receiving_handler(handler, self.health), self.health_calls)
        return receiving_handler(handler, self.arrivals)


def counting_handler(handler: grpc.RpcMethodHandler, path: str) -> grpc.RpcMethodHandler:
    """Return a handler that counts the fields of each message before parsing it, or ``handler`` if it parses none."""
    method, parse = method_of(path), handler.request_deserializer
    if method is None or parse is None:
        return handler

    def count_and_parse(data: bytes) -> Any:
        check_num_fields(data, method.input_type)
        return parse(data)

    kind = (handler.request_streaming, handler.response_streaming)
    serve = (handler.stream_unary, handler.stream_stream) if kind[0] else (handler.unary_unary, handler.unary_stream)
    return METHOD_HANDLERS[kind](serve[kind[1]], count_and_parse, handler.response_serializer)


def limited_handler(handler: grpc.RpcMethodHandler, calls: RunningCalls) -> grpc.RpcMethodHandler:
    """Return a handler of message streams that refuses calls beyond a limit before it reads a message."""
    serve = handler.stream_stream if handler.response_streaming else handler.stream_unary

    async def count_and_serve(messages: Any, context: grpc.aio.ServicerContext) -> Any:
        with calls.count(host_of(context)) as allowed:
            if not allowed:
                reason = f"{calls.at_once} health calls may run, and {calls.of_host} of one address"
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
            return await serve(messages, context)

    make_handler = METHOD_HANDLERS[True, handler.response_streaming]
    return make_handler(count_and_serve, None, handler.response_serializer)


def receiving_handler(handler: grpc.RpcMethodHandler, arrivals: Arrivals) -> grpc.RpcMethodHandler:
    """Return a handler that receives one message through ``arrivals``, and then calls the method of ``handler``."""
    serve = handler.unary_stream if handler.response_streaming else handler.unary_unary

    async def receive_and_serve(_: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            data = await arrivals.receive(context)
        except SlowMessageError as error:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        if data is grpc.aio.EOF:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
        try:
            request = handler.request_deserializer(data)
        except VLLMValidationError as error:
            await abort(context, error, "message")
        except DecodeError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        del data
        served = serve(request, context)
        if not isinstance(served, AsyncGenerator):
            return await served
        async with aclosing(served) as responses:
            async for response in responses:
                await context.write(response)
        return None

    make_handler = METHOD_HANDLERS[True, handler.response_streaming]
    return make_handler(receive_and_serve, None, handler.response_serializer)

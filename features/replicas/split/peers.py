"""The servers that this one splits prompts with: found by name, asked what they are, and left out while they fail."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from vllm.logger import init_logger

from starling.config.entry import config_of
from starling.config.replicas import ReplicaOptions, join_address, split_address, split_peers
from starling.features.adapter.lora import adapter_of
from starling.features.replicas.agents import server_of
from starling.features.replicas.page_transfer import differences
from starling.features.replicas.replica_calls import IDENTITY
from starling.features.replicas.rules import MAX_SERVERS
from starling.features.replicas.split.replica_rpc import ReplicaRPC
from starling.features.replicas.split.split_metrics import split_metrics
from starling.v1 import replica_pb2 as pb
from starling.v1 import replica_pb2_grpc
from starling.vllm_compat.versions import vllm_version

logger = init_logger("vllm.starling")

REFRESH_SECONDS = 5.0
"""How often names are resolved again, and peers are asked what they are."""

DESCRIBE_SECONDS = 2.0

RESOLVE_SECONDS = 5.0
"""How long a look-up of a name may take; a start waits for the first one."""

FAILURES_IN_A_ROW = 3
"""After so many parts that have failed on a peer, and none between them that has not, it is the peer that is broken."""

GONE_SECONDS = 60.0
"""A server that has not said for so long what it is counts as gone: connections to it are closed."""

PING_SECONDS = 10
NOTICE_SECONDS = 2 * PING_SECONDS
"""Within this time a server notices that the link to a peer is lost, or the peer's host: a ping is not answered."""

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),  # http_proxy of the environment is for other hosts than the peers
    ("grpc.keepalive_time_ms", PING_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", PING_SECONDS * 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


def hold_seconds(timeout: float) -> float:
    """For how long a server holds the pages of a peer's prompt after the peer's call has broken.

    Args:
        timeout: seconds, of --star-replica-timeout, which is the same on both.
    """
    return 2 * timeout + NOTICE_SECONDS


def fetch_seconds(timeout: float) -> float:
    """For how long a fetch may begin after a peer was asked whether it holds the pages, and has said that it does.

    The call has not broken before the question. So the first pages, which arrive within another ``timeout`` or do not
    count, are held until then, and for half of NOTICE_SECONDS more: the clocks of two hosts do not run equally fast.
    """
    return hold_seconds(timeout) - timeout - NOTICE_SECONDS / 2


@dataclass(frozen=True)
class Identity:
    """Which server this is, and what has to be equal for two servers to share a prompt.

    Attributes:
        name: unique for each start of a server.
        properties: versions, model, weights, and the layout of KV pages, as text.
    """

    name: str
    properties: Mapping[str, str]

    def mismatch(self, other: Identity) -> str | None:
        """Why the two can't share a prompt, with the values of both; None where they can."""
        return differences(self.properties, other.properties) or None


async def own_identity(engine: Any, rpc: ReplicaRPC) -> Identity:
    """The identity of this server, whose engine has started.

    Raises:
        ReplicaTimeout: the engine does not answer.
    """
    found = await rpc.call(engine, 0, IDENTITY)
    model = engine.vllm_config.model_config
    config = model.hf_text_config.to_dict()
    config.pop("_name_or_path", None)  # the model's folder may have another name on each server
    described = json.dumps([config, str(model.dtype), model.quantization], sort_keys=True, default=str)
    properties = {key: str(value) for key, value in found["layout"].items()} | {
        "starling": importlib.metadata.version("vllm-starling"),
        "vllm": vllm_version() or "unknown",
        "model": hashlib.sha256(described.encode()).hexdigest()[:16],
        "weights": hashlib.sha256(found["weights"].encode()).hexdigest()[:16],
        "timeout": f"{rpc.timeout:g}",  # it says how long the other server holds pages that this one may still read
    }
    if (adapter := adapter_of(config_of(engine.vllm_config))) is not None:
        properties["adapter"] = adapter.digest
    if '"longrope"' in described:  # its factors depend on the longest prompt that a server takes
        properties["max_model_len"] = str(model.max_model_len)
    return Identity(found["name"], properties)


class Peer:
    """One address, at which another server may listen.

    Args:
        address: of the gRPC front, as HOST:PORT.
        channel: to it.
        key: of STARLING_REPLICA_KEY.
        timeout: seconds for which the peer is left out after a failed call.
        on_left_out: called when that time begins.
    """

    def __init__(
        self, address: str, channel: grpc.aio.Channel, key: str, timeout: float, on_left_out: Callable[[], None]
    ) -> None:
        self.address, self.channel, self.timeout, self.on_left_out = address, channel, timeout, on_left_out
        self.metadata = (("authorization", f"Bearer {key}"),)
        self.stub = replica_pb2_grpc.ReplicaServiceStub(channel)
        self.identity: Identity | None = None
        self.problem: str | None = "it has not been asked yet"
        self._left_out_until = 0.0
        self._failures = 0  # parts that have failed since one has not
        self._server: str | None = None  # the last one that has answered there
        self._answered_at = 0.0

    @property
    def server(self) -> str | None:
        """The server that was last found at this address (replicas/agents.py); None where none was, or it is gone."""
        return self._server

    def note_answer(self, identity: Identity | None) -> str | None:
        """Take the answer to Describe, None where there was none; returns the server that is gone, if one is."""
        now, before = asyncio.get_running_loop().time(), self._server
        if identity is not None:
            self._server, self._answered_at = server_of(identity.name), now
        elif now - self._answered_at > GONE_SECONDS:
            self._server = None
        return before if before != self._server else None

    @property
    def is_left_out(self) -> bool:
        return asyncio.get_running_loop().time() < self._left_out_until

    @property
    def is_usable(self) -> bool:
        return self.problem is None and not self.is_left_out

    def leave_out(self, reason: str) -> None:
        """A call has failed: use the peer again only after some time. The prompts that run there may all fail so."""
        was_left_out = self.is_left_out
        self._left_out_until = asyncio.get_running_loop().time() + self.timeout
        if not was_left_out:
            logger.warning("peer %s is left out for %g s: %s", self.address, self.timeout, reason)
            split_metrics().peers_left_out.inc()
            self.on_left_out()

    def note_failed_part(self, reason: str) -> None:
        """A part has failed, by an error that may come from its prompt or from the peer."""
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            self.leave_out(f"{self._failures} parts in a row have failed there, the last one with {reason}")

    def note_held_part(self) -> None:
        """The peer has prefilled a part."""
        self._failures = 0

    def prefill_part(self) -> Any:
        """Begin a call of ReplicaService.PrefillPart."""
        return self.stub.PrefillPart(metadata=self.metadata)

    async def describe(self) -> Identity | str:
        """Ask for the peer's identity; returns it, or why it can't be had."""
        try:
            answer = await self.stub.Describe(pb.DescribeRequest(), timeout=DESCRIBE_SECONDS, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            return reason_of(error)
        return Identity(answer.name, dict(answer.properties))


class PeerDirectory:
    """All peers of one server.

    Args:
        options: where they are.
        own: this server's identity.
        key: of STARLING_REPLICA_KEY.
        credentials: of TLS; None: plain text.

    Attributes:
        own_problem: why this server can't share a prompt with any other one; None where it can.
    """

    def __init__(
        self, options: ReplicaOptions, own: Identity, key: str, credentials: grpc.ChannelCredentials | None
    ) -> None:
        self.entries = split_peers(options.peers)
        self.own, self.key, self.credentials, self.timeout = own, key, credentials, options.timeout
        self.own_problem: str | None = None
        self.by_address: dict[str, Peer] = {}
        self._addresses: dict[str, list[str]] = {}  # entry -> what it was resolved to last
        self._refreshing: asyncio.Task | None = None
        self._gone: list[str] = []  # servers that were seen at an address, and are there no more

    def take_gone(self) -> list[str]:
        """The servers (replicas/agents.py) that are gone since the last call: restarted, or not found any more."""
        there = {peer.server for peer in self.by_address.values()}
        gone, self._gone = [server for server in self._gone if server not in there], []
        return gone

    @property
    def usable(self) -> list[Peer]:
        """The peers that a prompt may be split with now."""
        if self.own_problem is not None:
            return []
        return [peer for peer in self.by_address.values() if peer.is_usable][: MAX_SERVERS - 1]

    async def start(self) -> None:
        """Find the peers once, and again and again from now on."""
        await self.refresh()
        self._refreshing = asyncio.ensure_future(self._refresh_for_ever())

    async def stop(self) -> None:
        """Stop looking for peers. Calls that run go on."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait({self._refreshing})

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.refresh()
            except Exception:
                logger.exception("the peers can't be found")

    async def refresh(self) -> None:
        """Resolve all names, and ask each address what is there."""
        await asyncio.gather(*(self._resolve(entry) for entry in self.entries))
        hosts = {address: entry for entry in self.entries for address in self._addresses.get(entry, ())}
        for address in self.by_address.keys() - hosts.keys():
            logger.info("peer %s: no name leads to it any more", address)
            peer = self.by_address.pop(address)  # its channel closes with the last call that uses it
            self._gone += [peer.server] if peer.server is not None else []
        for address, entry in hosts.items():
            if address not in self.by_address:
                channel = self._channel(address, entry)
                self.by_address[address] = Peer(address, channel, self.key, self.timeout, self._count_usable)
        peers = list(self.by_address.values())
        answers = await asyncio.gather(*(peer.describe() for peer in peers))
        known = {self.own.name}
        for peer, answer in zip(peers, answers, strict=True):
            # Both at once: a prompt that is split meanwhile must not see an identity that is not compared yet.
            peer.identity = answer if isinstance(answer, Identity) else None
            gone = peer.note_answer(peer.identity)
            self._gone += [gone] if gone is not None else []
            self._note(peer, self._problem_of(answer, known) if isinstance(answer, Identity) else answer)
        self._count_usable()

    def _count_usable(self) -> None:
        split_metrics().usable_peers.set(len(self.usable))

    def _problem_of(self, identity: Identity, known: set[str]) -> str | None:
        """Why a peer that has answered can't be used; ``known`` has the names of the servers before it."""
        if identity.name == self.own.name:
            return "it is this server"
        if identity.name in known:
            return "another address leads to the same server"
        known.add(identity.name)
        mismatch = self.own.mismatch(identity)
        return None if mismatch is None else f"its KV pages can't be used here: {mismatch}"

    def _note(self, peer: Peer, problem: str | None) -> None:
        if problem != peer.problem:
            if problem is None:
                logger.info("peer %s: prompts are split with it", peer.address)
            else:
                logger.info("peer %s is not used: %s", peer.address, problem)
        peer.problem = problem

    async def _resolve(self, entry: str) -> None:
        """Look up the addresses behind a name. If that fails, the last ones stay."""
        host, port = split_address(entry)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:  # a time-out is an OSError
            logger.warning("the addresses of the peers %s can't be looked up: %s", entry, error or "no answer in time")
            return
        self._addresses[entry] = sorted({join_address(str(address[0]), port) for *_, address in found})

    def _channel(self, address: str, entry: str) -> grpc.aio.Channel:
        if self.credentials is None:
            return grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
        # The certificate is for the name, not for the address behind it.
        options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", split_address(entry)[0]))
        return grpc.aio.secure_channel(address, self.credentials, options)


def reason_of(error: Exception) -> str:
    """Why a call to a peer has failed."""
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)

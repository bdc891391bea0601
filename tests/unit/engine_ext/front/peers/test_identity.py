"""Who is a peer: which servers a server finds and uses."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from types import SimpleNamespace

import grpc
import pytest

from starling.engine_ext.serving.grpc.auth import peer_credentials, server_credentials
from starling.engine_ext.serving.grpc.replica_service import ReplicaServicer
from starling.engine_ext.serving.grpc.server import Front
from starling.features.replicas.split import peers
from starling.features.replicas.split.peers import Identity, own_identity
from tests.unit.engine_ext.front.peers.pods import AUTO, KEY
from tests.unit.engine_ext.front.simulation import TOKENS


def test_a_server_is_not_its_own_peer_and_counts_once(run_pods):
    async def scenario(a, b):
        port = b.address.rpartition(":")[2]
        found = await a.find(f"{a.address},{b.address},localhost:{port}")
        assert len(found.usable) == 1
        problems = [peer.problem for peer in found.by_address.values() if peer.problem]
        assert "it is this server" in problems

    run_pods(scenario)


def test_only_servers_with_the_same_model_weights_and_versions_are_used(run_pods):
    async def scenario(a, b):
        own = await own_identity(a.server.engine, a.state.rpc)
        assert set(own.properties) >= {"starling", "vllm", "model", "weights", "dtype", "timeout"}
        b.replica.weights = "others"
        theirs = await own_identity(b.server.engine, b.state.rpc)
        assert "weights" in own.mismatch(theirs)
        service = ReplicaServicer(b.server.engine, theirs)
        front = Front(b.server.engine, [], replica=service, replica_key=KEY)
        port = await front.start("127.0.0.1:0", None)
        found = await a.find(f"127.0.0.1:{port}")
        assert found.usable == []
        (peer,) = found.by_address.values()
        assert peer.problem.startswith("its KV pages can't be used here: weights '")
        await front.stop(0)

    run_pods(scenario)


def test_servers_with_other_adapters_are_not_used(run_pods, monkeypatch):
    async def scenario(a, b):
        found = []
        for digest in (None, "one", "two"):
            adapter = None if digest is None else SimpleNamespace(digest=digest)
            monkeypatch.setattr(peers, "adapter_of", lambda config, adapter=adapter: adapter)
            found.append(await own_identity(a.server.engine, a.state.rpc))
        without, one, two = found
        assert without.mismatch(one) == "adapter None here, 'one' there"
        assert one.mismatch(two) == "adapter 'one' here, 'two' there"
        assert one.mismatch(one) is None

    run_pods(scenario)


@pytest.mark.parametrize("key", ["another key", "api key", ""])
def test_a_server_with_another_key_gets_nothing(run_pods, key):
    async def scenario(a, b):
        found = await a.find(b.address, key=key)
        (peer,) = found.by_address.values()
        assert peer.problem.startswith("UNAUTHENTICATED")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await peer.prefill_part().read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await a.server.generate(TOKENS, AUTO)
        assert b.server.work() == [[]]

    run_pods(scenario)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_the_certificate_of_a_peer_has_to_be_for_the_name_by_which_it_is_found(run_pods, certificates, name):
    """The certificate is for localhost alone."""
    certificate, key = map(str, certificates)
    args = Namespace(ssl_certfile=certificate, ssl_keyfile=key, ssl_ca_certs=None, ssl_cert_reqs=0)
    args.enable_ssl_refresh = False

    async def scenario(a, b):
        identity = await own_identity(b.server.engine, b.state.rpc)
        front = Front(b.server.engine, [], replica=ReplicaServicer(b.server.engine, identity), replica_key=KEY)
        port = await front.start("127.0.0.1:0", server_credentials(args))
        found = await a.find(f"{name}:{port}", credentials=peer_credentials(args))
        # Some systems have IPv6 for localhost too, where nothing listens.
        assert [peer.address for peer in found.usable] == ([f"127.0.0.1:{port}"] if name == "localhost" else [])
        plain = await a.find(f"localhost:{port}")
        assert plain.usable == []
        if name == "localhost":
            a.state.set_peers(found)
            await a.server.generate(TOKENS, AUTO)
            assert b.server.work() == [[(0, 64), (320, 480)]]
        await front.stop(0)

    run_pods(scenario)


def test_a_name_that_can_not_be_looked_up_keeps_its_last_addresses(run_pods, monkeypatch):
    async def scenario(a, b):
        found = await a.find(b.address)

        async def fail(*args, **kwargs):
            raise OSError("no name server")

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", fail)
        await found.refresh()
        assert [peer.address for peer in found.usable] == [b.address]

    run_pods(scenario)


def test_a_look_up_that_hangs_does_not_keep_a_server_from_starting(run_pods, monkeypatch):
    monkeypatch.setattr(peers, "RESOLVE_SECONDS", 0.1)

    async def scenario(a, b):
        async def hang(*args, **kwargs):
            await asyncio.Event().wait()

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", hang)
        found = await asyncio.wait_for(a.find(b.address), 200)
        assert found.usable == []

    run_pods(scenario)


def test_all_addresses_behind_a_name_are_peers_and_those_that_leave_are_forgotten(run_pods, monkeypatch):
    async def scenario(a, b):
        port = int(b.address.rpartition(":")[2])
        behind = ["127.0.0.1", "::1"]

        async def look_up(host, port, **_):
            assert host == "starling-peers"
            return [(0, 0, 0, "", (address, port)) for address in behind]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
        found = await a.find(f"starling-peers:{port}")
        assert sorted(found.by_address) == [f"127.0.0.1:{port}", f"[::1]:{port}"]
        assert [peer.address for peer in found.usable] == [b.address]
        behind.remove("127.0.0.1")
        await found.refresh()
        assert list(found.by_address) == [f"[::1]:{port}"]
        assert found.usable == []

    run_pods(scenario)


def test_servers_of_a_longrope_model_need_the_same_longest_prompt(run_pods, monkeypatch):
    """vLLM chooses a LongRoPE model's factors by the longest prompt that the server takes."""

    async def scenario(a, b):
        rpc, model = a.state.rpc, a.server.engine.vllm_config.model_config
        assert "max_model_len" not in (await own_identity(a.server.engine, rpc)).properties
        long = model.hf_text_config.to_dict() | {"rope_scaling": {"rope_type": "longrope"}}
        monkeypatch.setattr(model, "hf_text_config", SimpleNamespace(to_dict=lambda: long))
        assert (await own_identity(a.server.engine, rpc)).properties["max_model_len"] == "8192"

    run_pods(scenario)


def test_identities_differ_by_what_only_one_of_them_has():
    assert Identity("a", {"x": "1"}).mismatch(Identity("b", {"x": "1"})) is None
    reason = Identity("a", {"x": "1"}).mismatch(Identity("b", {"x": "2", "y": "3"}))
    assert reason == "x '1' here, '2' there; y None here, '3' there"

"""A Python client of starling.v1.InferenceService, blocking and for asyncio; docs/grpc.md shows both.

It lies beside the stubs, and not with the server in engine_ext, because a machine that only asks has no vLLM: nothing
here needs more than grpcio, protobuf and googleapis-common-protos (tests/unit/test_client.py sees to that).
"""

from starling.client.clients import AsyncClient, Client
from starling.client.errors import StarlingError

__all__ = ["AsyncClient", "Client", "StarlingError"]

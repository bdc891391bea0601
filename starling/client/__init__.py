"""A Python client of starling.v1.InferenceService, blocking and for asyncio; docs/grpc.md shows both.

The client is packaged with the stubs and not with the server in engine_ext, because client machines have no vLLM. It
requires only grpcio, protobuf and googleapis-common-protos; tests/unit/engine_ext/serving/grpc/test_client.py checks
that.
"""

from starling.client.clients import AsyncClient, Client
from starling.client.errors import ConnectError, StarlingError
from starling.client.replies import (
    Capabilities,
    Choice,
    Completion,
    Delta,
    Event,
    Final,
    Plan,
    Progress,
    PromptLogprobs,
    Tokens,
    Usage,
    WarmedDocument,
)

__all__ = [
    "AsyncClient",
    "Capabilities",
    "Choice",
    "Client",
    "Completion",
    "ConnectError",
    "Delta",
    "Event",
    "Final",
    "Plan",
    "Progress",
    "PromptLogprobs",
    "StarlingError",
    "Tokens",
    "Usage",
    "WarmedDocument",
]

"""The gRPC server: its services, health and reflection, on the engine that the OpenAI server uses."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from vllm.logger import init_logger
from vllm.renderers import ChatParams

from starling.engine_ext.serving.grpc import admin as admin_service
from starling.engine_ext.serving.grpc.admin import AdminInterceptor, AdminServicer, start_admin_server
from starling.engine_ext.serving.grpc.arrivals import ArrivalInterceptor
from starling.engine_ext.serving.grpc.auth import AuthInterceptor, NoteClient, add_port
from starling.engine_ext.serving.grpc.inference import SERVICE, Inference
from starling.engine_ext.serving.grpc.server_options import (
    GRACE_SECONDS,
    MAX_REQUEST_BYTES,
    NO_ADMIN,
    AdminOptions,
    join_address,
    server_options,
)
from starling.v1 import admin_pb2_grpc, inference_pb2_grpc

logger = init_logger("vllm.starling")

GATEWAY_EXTRA = "pip install 'vllm-starling[smg]'"
HEALTH_CHECK_SECONDS = 0.5


class Front:
    """The gRPC server with its services, and AdminService's own port if it has one.

    Args:
        engine: the AsyncLLM that the OpenAI server uses.
        api_keys: keys of which calls of InferenceService need one; empty if they need no key.
        chat: parameters for rendering chat messages.
        admin: address and access of AdminService.
        show_cached: whether responses say how many tokens were cached (vLLM's --enable-prompt-tokens-details).
    """

    def __init__(
        self,
        engine: Any,
        api_keys: list[str],
        chat: ChatParams | None = None,
        admin: AdminOptions = NO_ADMIN,
        show_cached: bool = False,
    ) -> None:
        self.engine = engine
        self.admin = admin
        self.admin_server: grpc.aio.Server | None = None
        self.admin_port: int | None = None
        self.auth = AuthInterceptor(api_keys)
        self.arrivals = ArrivalInterceptor(self.auth.client_of)
        operators = AdminInterceptor(admin.key, own_port=False, methods=self.auth.admin_methods)
        interceptors = [self.auth, operators, NoteClient(show_cached), self.arrivals]
        self.server = grpc.aio.server(interceptors=interceptors, options=server_options(MAX_REQUEST_BYTES))
        self.health = health.aio.HealthServicer()
        self.inference = Inference(
            engine, self.health.enter_graceful_shutdown, chat or ChatParams(), self.auth.client_of
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.inference, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self._admin_servicer(), self.server)
        self.services = [SERVICE, *self._add_gateway()]
        names = (*self.services, admin_service.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)
        self.engine_died = False
        self.port: int | None = None
        self._watchdog: asyncio.Task | None = None
        self._stopping: asyncio.Task | None = None

    def _admin_servicer(self) -> AdminServicer:
        return AdminServicer(self.engine, self, max_message_bytes=MAX_REQUEST_BYTES)

    def _add_gateway(self) -> list[str]:
        """Serve VllmEngine if its package is installed, and return the service's name in a list."""
        try:
            from smg_grpc_proto import vllm_engine_pb2_grpc

            from starling.engine_ext.serving.grpc.gateway import GATEWAY_SERVICE, Gateway
        except ImportError as error:
            logger.info("gRPC without vllm.grpc.engine.VllmEngine, which gateways call: %s (%s)", error, GATEWAY_EXTRA)
            return []
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(Gateway(self.inference), self.server)
        return [GATEWAY_SERVICE]

    @property
    def draining(self) -> bool:
        return self.auth.draining

    async def stop_admitting(self) -> None:
        """Refuse new calls with UNAVAILABLE and report NOT_SERVING; running calls continue."""
        self.auth.draining = True
        await self.health.enter_graceful_shutdown()

    async def start(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Listen, report SERVING and return the port.

        Raises:
            RuntimeError: the server can't listen on ``address``, or on AdminService's own port.
        """
        self.port = add_port(self.server, address, credentials)
        await self.server.start()
        if self.admin.port is not None:
            address = join_address(self.admin.host, self.admin.port)
            self.admin_server, self.admin_port = await start_admin_server(
                self._admin_servicer(), self.admin.key, address, credentials
            )
            logger.info("AdminService on %s", join_address(self.admin.host, self.admin_port))
        for name in ("", *self.services):
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._watchdog = asyncio.ensure_future(self._watch_engine())
        return self.port

    async def _watch_engine(self) -> None:
        """Report NOT_SERVING when the engine dies, even if no call is made."""
        while not self.engine.errored:
            await asyncio.sleep(HEALTH_CHECK_SECONDS)
        logger.error("gRPC: the engine has died; every call gets UNAVAILABLE")
        await self.health.enter_graceful_shutdown()

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Report NOT_SERVING, refuse new calls, wait up to ``grace`` seconds for running calls, then close."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop(grace))
        await asyncio.shield(self._stopping)

    async def _stop(self, grace: float) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        self.engine_died = self.engine.errored
        await self.stop_admitting()
        if await self.auth.drain(grace):
            logger.info("gRPC: every running stream has ended")
        else:
            logger.warning("gRPC: ending streams that still run after %.0f s", grace)
        await self.server.stop(None)
        if self.admin_server is not None:
            await self.admin_server.stop(None)

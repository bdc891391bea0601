"""A call of the Python client, blocking or asyncio, to the gRPC server on a fake engine."""

import asyncio
import time

from starling.client import AsyncClient, Client, Event, StarlingError
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine, front_of

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


class Call:
    """One call of a client: its events, its response or error, and the seconds it took."""

    def __init__(self, kind: str, engine: FakeEngine, method: str = "stream", front=None, **options) -> None:
        self.kind, self.engine, self.method, self.front, self.options = kind, engine, method, front or {}, options
        self.events: list[Event] = []
        self.reply = self.error = None

    def __call__(self, *args, **fields) -> "Call":
        asyncio.run(self._over_front(args, fields))
        return self

    async def _over_front(self, args, fields) -> None:
        async with front_of(self.engine, **self.front) as front:
            started = time.monotonic()
            try:
                if self.kind == "blocking":
                    await asyncio.to_thread(self._block, front.address, args, fields)
                else:
                    await self._await(front.address, args, fields)
            except StarlingError as error:
                self.error = error
            self.seconds = time.monotonic() - started

    def _block(self, address, args, fields) -> None:
        with Client(address, **self.options) as client:
            answer = getattr(client, self.method)(*args, **fields)
            if self.method == "stream":
                for event in answer:
                    self.events.append(event)
            self.reply = answer

    async def _await(self, address, args, fields) -> None:
        async with AsyncClient(address, **self.options) as client:
            answer = getattr(client, self.method)(*args, **fields)
            if self.method != "stream":
                self.reply = await answer
                return
            async for event in answer:
                self.events.append(event)

    @property
    def kinds(self) -> list[str]:
        return [type(event).__name__.lower() for event in self.events]

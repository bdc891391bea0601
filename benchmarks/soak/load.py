"""The load: its capacity, requests at a rate, and moments without requests in which every page must be free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from benchmarks.soak.mix import KINDS, Kind, kinds_for
from benchmarks.soak.player import Player
from benchmarks.soak.target import wait_idle

CLIENTS = 32  # requests at the same time
CAPACITY_CLIENTS = 8


async def measure_capacity(player: Player, seconds: float) -> float:
    """Return the requests in a second that the server completes for clients that never wait between two requests."""
    kinds = [kind for kind in kinds_for(player.target) if kind.brief]
    started = time.monotonic()

    async def client() -> int:
        played = 0
        while time.monotonic() - started < seconds:
            await player.play(choose(player, kinds))
            played += 1
        return played

    played = await asyncio.gather(*(client() for _ in range(CAPACITY_CLIENTS)))
    return sum(played) / (time.monotonic() - started)


def choose(player: Player, kinds: Sequence[Kind]) -> Kind:
    """Choose a kind, by the shares of the kinds."""
    return player.random.choices(kinds, [kind.share for kind in kinds])[0]


class OpenLoop:
    """Sends requests at random times, at a mean rate that does not depend on the server's speed.

    At most 32 requests are open. Without a free client, an arrival is counted as not sent.
    """

    def __init__(self, player: Player, rate: float) -> None:
        """Prepare the loop; no request is sent yet.

        Args:
            rate: mean number of arrivals in a second.
        """
        self.player = player
        self.kinds = kinds_for(player.target)
        self.rate = rate
        self.open: set[asyncio.Task[None]] = set()

    async def send(self, seconds: float) -> None:
        """Send requests for so long, and return without waiting for the last of them."""
        clock, end = time.monotonic(), time.monotonic() + seconds
        while (clock := clock + self.player.random.expovariate(self.rate)) < end:
            await asyncio.sleep(max(clock - time.monotonic(), 0))
            if len(self.open) >= CLIENTS:
                self.player.ledger.not_sent += 1
                continue
            task = asyncio.create_task(self.player.play(choose(self.player, self.kinds)))
            self.open.add(task)
            task.add_done_callback(self.open.discard)

    async def ended(self) -> None:
        """Wait for the open requests."""
        await asyncio.gather(*self.open)

    async def rest(self) -> dict[str, float]:
        """Wait for the open requests, and say what the server still holds then.

        Returns:
            The largest numbers of ``pages_used``, ``requests_running`` and ``requests_waiting`` of any engine, and of
            pages that are neither used, cached nor free.
        """
        await self.ended()
        states = await wait_idle(self.player.clients)
        held = ("pages_used", "requests_running", "requests_waiting")
        left = {name: max(getattr(state, name) for state in states) for name in held}
        lost = [state.pages_total - state.pages_used - state.pages_cached - state.pages_free for state in states]
        return left | {"pages_unexplained": max(map(abs, lost))}


async def play_each(player: Player, rounds: int) -> None:
    """Play every kind ``rounds`` times, all kinds of a round at once."""
    for _ in range(rounds):
        await asyncio.gather(*(player.play(kind) for kind in KINDS))

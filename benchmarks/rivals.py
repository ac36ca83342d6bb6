"""The Python hedging libraries on PyPI under a virtual clock, for `inference.py`: their public transports over a service of given latencies.

usage: python benchmarks/rivals.py      (prints the success rates; needs `pip install hedge-python httpx-hedged httpx`)
"""

from __future__ import annotations

import asyncio
import importlib.util
import selectors
import time
from collections.abc import Callable, Coroutine
from unittest.mock import patch

import httpx
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NAMES = tuple(name for name, module in (("hedge-python", "hedge"), ("httpx-hedged", "httpx_hedged")) if importlib.util.find_spec(module))


class Skipping(selectors.SelectSelector):
    """Instead of waiting it moves the time."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now_s += timeout or 0.0
        return super().select(0)


def simulate(main: Callable[[], Coroutine[None, None, None]]) -> None:
    """Runs a coroutine on virtual time, which is also what `time.monotonic` says."""
    selector = Skipping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now_s  # type: ignore[method-assign]
    with patch.object(time, "monotonic", lambda: selector.now_s):
        try:
            loop.run_until_complete(main())
        finally:
            loop.close()


class Service(httpx.AsyncBaseTransport):
    """Answers a request's first call after x[i] and its second after y[i]; negative times fail after their size."""

    def __init__(self, x: Floats, y: Floats) -> None:
        self.times, self.calls = (x.tolist(), y.tolist()), 0
        self.seen: dict[int, int] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        number = int(request.url.query)
        leg = self.seen.get(number, 0)
        self.seen[number] = leg + 1
        self.calls += 1
        after_s = self.times[min(leg, 1)][number]
        await asyncio.sleep(abs(after_s))
        if after_s < 0:
            raise httpx.ConnectError("the leg broke")
        return httpx.Response(200)


def transport(name: str, inner: Service, budget: float, per_s: float) -> httpx.AsyncBaseTransport:
    """The library's transport for a budget: it hedges at the percentile 1 - budget, and is told the rate of requests."""
    if name == "hedge-python":
        from hedge import HedgeConfig
        from hedge.transport import HedgedHttpxTransport

        return HedgedHttpxTransport(inner, HedgeConfig(percentile=1 - budget, budget_percent=100 * budget, estimated_rps=per_s))
    import httpx_hedged

    return httpx_hedged.HedgedTransport(inner, httpx_hedged.HedgeConfig(percentile=1 - budget, budget_percent=100 * budget))


def replay(name: str, x: Floats, y: Floats, budget: float, apart_s: float) -> tuple[Floats, NDArray[np.bool_], float]:
    """(latency, success, extra calls as a share) of a stream of requests."""
    service = Service(x, y)
    latency, ok = np.zeros(len(x)), np.zeros(len(x), dtype=bool)

    async def one(sender: httpx.AsyncBaseTransport, i: int) -> None:
        began_s = time.monotonic()
        try:
            await sender.handle_async_request(httpx.Request("GET", f"http://service/answer?{i}"))
            ok[i] = True
        except httpx.ConnectError:
            ok[i] = False
        latency[i] = time.monotonic() - began_s

    async def main() -> None:
        sender, running = transport(name, service, budget, 1 / apart_s), set[asyncio.Task[None]]()
        for i in range(len(x)):
            task = asyncio.create_task(one(sender, i))
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(apart_s)
        await asyncio.gather(*running)
        await sender.aclose()

    simulate(main)
    return latency, ok, service.calls / len(x) - 1


if __name__ == "__main__":
    if not NAMES:
        print("Neither hedge-python nor httpx-hedged is installed.")
    rng = np.random.default_rng(0)
    times = 0.8 * rng.lognormal(0, 0.15, 3000) * np.where(rng.random(3000) < 0.05, 10, 1)
    for library in NAMES:
        took, succeeded, extra = replay(library, times, np.full(3000, -0.05), 0.05, 0.08)
        print(f"{library}: backups always fail: success {succeeded.mean():.2%} at {extra:.2%} extra calls")

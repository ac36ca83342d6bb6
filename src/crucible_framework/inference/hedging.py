"""A request that is slow is sent a second time, and the first answer counts. `HedgedSampler` is a Sampler made of Samplers.

How long to wait, and whether at all, is a policy's word (`policies.py`); what may be spent is the ledger's (`ledger.py`); one request on
its way is a race (`race.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from ..clock import system_clock
from ..errors import CapabilityError, ConfigError
from ..protocols import Clock, HedgePolicy, OnPiece, Sampler, StreamSampler
from ..records import Prompt, SamplingParams
from .ledger import HedgeStats, Ledger
from .policies import default_policy
from .pool import Pool
from .race import Answer, Race, Terms

__all__ = ["HedgedSampler"]


class HedgedSampler:
    """Sends a request to the first leg, and where the policy and the budget say so to the next ones; the first good answer is given.

    A leg that fails starts the next at once. A fault of the request itself (ConfigError, DataError, AuthError, CapabilityError) is given at
    once, since it would fail anywhere. A leg that answers "too many requests" or "unavailable" (ServiceError 429, 503) is not added to, and
    no request is hedged for `pushback_s`.

    Args:
        legs: one sampler, which is then asked again; or several: replicas, or levels from cheap to strong. Of a `Pool` the prices count too.
        policy: when to start the next leg; where None `Adaptive(budget)`, and `Never` where a leg says that it is a Tinker service's.
        budget: credits per request; every further leg costs one, after a failure too. 0 never sends a second; 1 or more is no limit for two legs.
        burst: credits that can be saved at most.
        max_legs: calls per request at most.
        accept: whether an answer is good enough; if not, the next leg starts at once, and of answers none of which is good the last leg's is given.
        first_token: legs stream, and the first token of all decides. Long answers are then not mistaken for slow ones, and a loser has drawn
            nothing yet. `stream` always works so.
        idempotent: False where asking twice has effects; then one call is made. A function decides per request.
        brake_at: calls in flight from which nothing is hedged, because a pool that is full gets slower by it.
        rotate: starts each request at the next leg in turn; for replicas.
        clock: delays and latencies.
    """

    def __init__(
        self,
        legs: Sampler | Sequence[Sampler] | Pool,
        policy: HedgePolicy | None = None,
        *,
        budget: float = 0.05,
        burst: float = 50.0,
        max_legs: int | None = None,
        accept: Callable[[Answer], bool] | None = None,
        first_token: bool = False,
        idempotent: bool | Callable[[Prompt, SamplingParams], bool] = True,
        brake_at: int | None = None,
        pushback_s: float = 10.0,
        rotate: bool = False,
        clock: Clock = system_clock,
    ) -> None:
        members = tuple(legs) if isinstance(legs, Pool) else ()
        if isinstance(legs, Pool):
            self.legs: tuple[Sampler, ...] = tuple(member.sampler for member in members)
        else:
            self.legs = tuple(legs) if isinstance(legs, Sequence) else (legs,)
        self.max_legs = max_legs if max_legs is not None else max(2, len(self.legs))
        if not self.legs or self.max_legs < 1:
            raise ConfigError(f"HedgedSampler has {len(self.legs)} legs and max_legs={max_legs!r}; expected at least one of each.")
        if first_token and accept is not None:
            raise ConfigError("HedgedSampler got accept and first_token; expected one of them: an answer cannot be judged by its first token.")
        if first_token:
            self._check_streaming()
        prices = tuple(m.price for m in members) or (None,) * len(self.legs)
        service = next((name for leg in self.legs if (name := str(getattr(leg, "service", ""))).startswith("tinker")), "")
        self.budget, self.first_token, self.idempotent, self.rotate = budget, first_token, idempotent, rotate
        ledger = Ledger(clock, budget=budget, burst=burst, unlimited=budget >= self.max_legs - 1, brake_at=brake_at, priced=None not in prices)
        self.policy: HedgePolicy = policy if policy is not None else default_policy(service, budget)
        self._terms = Terms(
            legs=self.legs, prices=prices, policy=self.policy, ledger=ledger, clock=clock, max_legs=self.max_legs, accept=accept,
            pushback_s=pushback_s, rotate=rotate, may_add=budget > 0 and self.max_legs > 1,
        )  # fmt: skip

    @property
    def model(self) -> str:
        """The legs' models, each once."""
        return f"hedged({', '.join(dict.fromkeys(leg.model for leg in self.legs))})"

    @property
    def stats(self) -> HedgeStats:
        """The counts so far."""
        return self._terms.ledger.stats

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[Answer]:
        """The first good answer of the legs. Cancelling the future cancels every leg.

        The future fails with the error of the only call, or with AllMembersFailedError where several were made and none gave an answer.
        """
        return self._race(prompt, params, n, (lambda _piece: None) if self.first_token else None).begin()

    def stream(self, prompt: Prompt, params: SamplingParams, on_piece: OnPiece, n: int = 1) -> Future[Answer]:
        """The answer piece by piece, from the leg whose first piece came first; see `StreamSampler`. Cancelling the future cancels every leg.

        A leg that fails before its first piece is replaced like in `sample`; one that fails after it fails the answer, since the caller has
        seen its beginning. What `on_piece` raises fails the answer too.

        Raises:
            CapabilityError: a leg cannot stream.
        """
        self._check_streaming()
        return self._race(prompt, params, n, on_piece).begin()

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """The first leg's, not hedged."""
        return self.legs[0].compute_logprobs(prompt, completion)

    def _check_streaming(self) -> None:
        silent = [leg.model for leg in self.legs if not isinstance(leg, StreamSampler)]
        if silent:
            raise CapabilityError(f"{', '.join(silent)} cannot stream; expected legs with `stream`. Wrap them: Streamed(sampler, tokenizer).")

    def _race(self, prompt: Prompt, params: SamplingParams, n: int, on_piece: OnPiece | None) -> Race:
        hedged = self.idempotent(prompt, params) if callable(self.idempotent) else self.idempotent
        number = self._terms.ledger.open()
        return Race(self._terms, prompt, params, n, base=number if self.rotate else 0, hedged=hedged, on_piece=on_piece)

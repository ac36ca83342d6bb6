"""What another way of routing would have earned, from the log of the one in use: look before you switch. Knows no samplers.

A log says how the chosen model did, not how the others would have done. Requests on which both ways agree are weighted by how likely each was
to choose so; a model of the reward, fitted on other rows, stands in for the rest. What the log never tried it cannot judge, and that is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, DataError, TooFewError
from ..protocols import Router
from ..records import Estimate, record
from .routing import Routed

__all__ = ["OffPolicy", "Policy", "always", "off_policy", "replayed"]

Floats: TypeAlias = NDArray[np.float64]
Policy: TypeAlias = Callable[[tuple[str, ...], tuple[float, ...]], Mapping[str, float]]
"""(models, features of the prompt) → the probability of each model; models that are not named have 0."""
_LEAST = 30.0


@record
class OffPolicy:
    """What a policy would have earned and cost per request, against what was.

    Attributes:
        reward: mean reward of the policy.
        gain: mean of the policy's reward less that which the log has, row by row; switch where the whole interval is above 0.
        cost: mean cost of the policy.
        effective: how many rows the weighted rows are worth, (Σw)² / Σw².
        largest_weight: of one row, of all; near 1 a single request decides.
    """

    reward: Estimate
    gain: Estimate
    cost: Estimate
    effective: float
    largest_weight: float


def always(name: str) -> Policy:
    """Sends every request to one model."""
    return lambda _names, _context: {name: 1.0}


def off_policy(log: Sequence[Routed], policy: Policy, *, level: float = 0.95, folds: int = 5, ridge: float = 1.0) -> OffPolicy:
    """Doubly robust estimates of a policy's reward, gain and cost from the log of another.

    Per row: the reward model's mean under the policy, plus w (reward − model), with w the policy's probability of what was done over the
    log's. It is right where either the probabilities or the model is. The model is a ridge regression on the features per model, or a mean
    where there are none, fitted on the other folds. Intervals: Student's t over rows, which are taken for independent.

    Args:
        log: rows with a known probability: of a router that draws (thompson, exp3, weighted, best_performing), or with `explore` above 0.
        policy: for example `always("large")`; it must not depend on the log's rewards. For a router that learns: `replayed`.
        level: of the intervals.
        folds: of cross-fitting; row i is in fold i mod folds.
        ridge: of the reward model.

    Raises:
        TooFewError: the rows on which log and policy agree are worth fewer than 30.
        DataError: a row has no probability, or more than one set of features.

    Source: Dudík, Langford & Li 2011, arXiv 1103.4601; cross-fitting: Chernozhukov et al. 2018; effective size: Kish 1965.
    """
    names, contexts = _checked(log, folds, level)
    chosen = np.array([names.index(row.chose) for row in log])
    logged = np.array([row.probability or 0.0 for row in log])
    wanted = np.array([_law(policy, row, names) for row in log])
    weight = wanted[np.arange(len(log)), chosen] / logged
    effective = float(weight.sum() ** 2 / (weight @ weight)) if weight.any() else 0.0
    if effective < _LEAST:
        agreed = int((weight > 0).sum())
        raise TooFewError(
            f"Log and policy agree on {agreed} of {len(log)} requests, worth {effective:.1f} rows; expected at least {_LEAST:g}. "
            "Route with RoutedSampler(explore=0.1) for a while: what was never tried cannot be judged."
        )
    fold = np.arange(len(log)) % folds
    found: dict[str, Floats] = {}
    for what in ("reward", "cost"):
        seen = np.array([float(getattr(row, what)) for row in log])
        model = np.zeros((len(log), len(names)))
        for k in range(folds):
            held = fold == k
            model[held] = _predict((contexts[~held], chosen[~held], seen[~held]), contexts[held], len(names), ridge)
        found[what] = (wanted * model).sum(axis=1) + weight * (seen - model[np.arange(len(log)), chosen])
    rewards = np.array([row.reward for row in log])
    return OffPolicy(
        reward=_mean("reward", found["reward"], level),
        gain=_mean("gain", found["reward"] - rewards, level),
        cost=_mean("cost", found["cost"], level),
        effective=effective,
        largest_weight=float(weight.max() / weight.sum()),
    )


def replayed(log: Sequence[Routed], router: Router, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """The mean reward of a router that learns, played against the log: it is told only rows on which it chose what the log chose.

    Rows are kept in proportion to 1 / probability, so that what the router sees is as if requests had been routed evenly. With K models about
    one row in K × (largest probability / smallest) counts, so it needs a long log, best one of even exploration.

    Args:
        log: as for `off_policy`.
        router: a fresh one; it learns from the log.
        level: of the interval.
        seed: of the rejections.

    Raises:
        TooFewError: fewer than 30 rows were left.
        DataError: as for `off_policy`.

    Source: Li et al. 2011, arXiv 1003.5956, with rejection for logs that are not even.
    """
    _checked(log, 2, level)
    rng = np.random.default_rng(seed)
    least = min(row.probability or 1.0 for row in log)
    kept: list[float] = []
    for row in log:
        context = np.array(row.context) if row.context else None
        if router.choose(row.among, context) != row.chose or rng.random() >= least / (row.probability or 1.0):
            continue
        router.observe(row.chose, reward=row.reward, cost=row.cost, latency_s=row.latency_s, ok=row.ok, context=context)
        kept.append(row.reward)
    if len(kept) < _LEAST:
        raise TooFewError(
            f"The router agreed with {len(kept)} of {len(log)} rows; expected at least {_LEAST:g}. Give a longer log, or one with more exploration."
        )
    return replace(_mean("reward", np.array(kept), level), method="replay")


def _checked(log: Sequence[Routed], folds: int, level: float) -> tuple[tuple[str, ...], Floats]:
    if not 0 < level < 1 or folds < 2:
        raise ConfigError(f"off_policy got level={level!r} and folds={folds!r}; expected a number in (0, 1) and at least 2.")
    if len(log) < _LEAST:
        raise TooFewError(f"The routing log has {len(log)} rows; expected at least {_LEAST:g}.")
    unknown = sum(row.probability is None or not 0 < row.probability <= 1 for row in log)
    if unknown:
        raise DataError(
            f"{unknown} of {len(log)} rows of the routing log have no probability in (0, 1]; expected one in each. "
            "Log while a router draws without a ceiling, or route with explore above 0."
        )
    sizes = {len(row.context) for row in log}
    if len(sizes) > 1:
        raise DataError(f"The rows of the routing log have {sorted(sizes)} features; expected one number of them. Take rows of one router.")
    names = tuple(dict.fromkeys(name for row in log for name in (*row.among, row.chose)))
    return names, np.array([(1.0, *row.context) for row in log])


def _law(policy: Policy, row: Routed, names: tuple[str, ...]) -> list[float]:
    chances = policy(row.among, row.context)
    law = [float(chances.get(name, 0.0)) for name in names]
    if set(chances) - set(names) or min(law) < 0 or not math.isclose(sum(law), 1.0, abs_tol=1e-6):
        raise ConfigError(f"The policy gave {dict(chances)!r} for the models {list(row.among)!r}; expected probabilities of these that sum to 1.")
    return law


def _predict(rows: tuple[Floats, NDArray[np.int64], Floats], at: Floats, models: int, ridge: float) -> Floats:
    """The reward that each model would get at each row of `at`, [rows, models]; a model without data has the mean of all."""
    x, chosen, y = rows
    found = np.full((len(at), models), float(y.mean()) if len(y) else 0.0)
    penalty = ridge * np.eye(x.shape[1])
    penalty[0, 0] = 1e-9
    for i in range(models):
        mine = chosen == i
        if mine.any():
            a, b = x[mine], y[mine]
            found[:, i] = at @ np.linalg.solve(a.T @ a + penalty, a.T @ b)
    return found


def _mean(name: str, values: Floats, level: float) -> Estimate:
    from scipy.stats import t

    n, centre = len(values), float(values.mean())
    half = float(t.ppf((1 + level) / 2, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    return Estimate(name=name, value=centre, low=centre - half, high=centre + half, n=n, level=level, method="doubly robust")

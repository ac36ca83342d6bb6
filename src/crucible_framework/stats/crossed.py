"""Several seeds × the same items: a difference whose interval speaks of other seeds and other items at once. Knows no ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from ..errors import StatisticsError, TooFewError
from ..records import Estimate, Finding
from .samples import Floats, Sample, Values, check_level, left_out, sample, t_finding
from .significance import Side, check_margin, margin_finding

__all__ = ["interquartile_mean", "performance_profile", "seeds_and_items"]

Freedom: TypeAlias = Literal["satterthwaite", "least"]
_SOURCE = "Owen 2007, Annals of Applied Statistics 1:386-411 (crossed bootstrap); Cameron, Gelbach & Miller 2011; Miller 2024, arXiv 2411.00640"


def _matrix(name: str, rows: Sequence[Values], kept: Sequence[int]) -> Floats:
    return np.stack([sample(f"{name}, seed {index}", [row[item] for item in kept]).x for index, row in enumerate(rows)])


def seeds_and_items(
    name: str,
    before: Sequence[Values],
    after: Sequence[Values],
    *,
    clusters: Sequence[str] | None = None,
    paired_seeds: bool = False,
    method: Literal["t", "bootstrap"] = "t",
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
    margin: float | None = None,
    side: Side = "both",
    freedom: Freedom = "satterthwaite",
) -> Finding:
    """Mean difference after - before of scores [seed][item], both sides on the same items.

    Its variance is that of items (or their clusters) plus that of seeds, less what both count twice; so the interval is about other seeds
    *and* other items. With few seeds it is wide, as it must be: one more seed then helps more than many items.

    Args:
        before, after: one row of scores per training seed; the numbers of seeds may differ unless `paired_seeds`.
        clusters: the source of each item.
        paired_seeds: row s of both sides shares what a seed decides (order of the data, initial weights).
        method: "t" has degrees of freedom by Satterthwaite; "bootstrap" draws seeds and clusters of items (percentiles) and is too narrow
            with fewer than about 10 seeds.
        freedom: degrees of freedom of "t". "satterthwaite" weighs seeds and items by their variances; its p-values are too small where seeds vary much, are
            two or three, and the level is far below 5 %; "least", seeds - 1, then still holds its level, at the price of power.
        margin: asks instead whether the difference lies inside ±margin (or on one `side` of it), as `tost` does; the method is then "t".

    Raises:
        TooFewError: a side has a single seed (say so and use `paired_difference`), fewer than two complete items or clusters, or no spread.
        StatisticsError: rows differ in length, or a margin is not positive.
    """
    check_level(level)
    if margin is not None:
        check_margin(margin)
        if method != "t":
            raise StatisticsError(f"method is {method!r} with a margin; expected 't'.")
    for where, rows in (("before", before), ("after", after)):
        if len(rows) < 2:
            raise TooFewError(f"{name!r} has {len(rows)} seed(s) {where}; expected at least two. Use paired_difference, which is about items only.")
    lengths = {len(row) for row in (*before, *after)}
    if len(lengths) != 1 or (clusters is not None and len(clusters) not in lengths):
        raise StatisticsError(f"{name!r} has rows (or clusters) of different lengths {sorted(lengths)}; expected the same items in each row.")
    if paired_seeds and len(before) != len(after):
        raise StatisticsError(f"{name!r} has {len(before)} and {len(after)} seeds; expected as many on both sides where paired_seeds is True.")
    total = lengths.pop()
    kept = [item for item in range(total) if all(row[item] is not None for row in (*before, *after))]
    if not kept:
        raise TooFewError(f"{name!r} has no item with a score of every seed, of {total}; expected at least two.")
    a, b = _matrix(f"{name} before", before, kept), _matrix(f"{name} after", after, kept)
    of_items = sample(name, (b.mean(axis=0) - a.mean(axis=0)).tolist(), None if clusters is None else [clusters[item] for item in kept])
    if of_items.units < 2:
        raise TooFewError(f"{name!r} has a single {'item' if clusters is None else 'cluster of items'}; expected at least two.")
    note = left_out(total - len(kept), total)
    if method == "bootstrap":
        return _bootstrapped(name, a, b, of_items, paired_seeds=paired_seeds, level=level, resamples=resamples, seed=seed, note=note)
    return _analytic(name, a, b, of_items, paired_seeds=paired_seeds, level=level, note=note, margin=margin, side=side, freedom=freedom)


def _seed_parts(x: Floats) -> tuple[float, float]:
    """(variance of the mean from seeds, part of it that is noise of single scores)."""
    s, items = x.shape
    means = x.mean(axis=1)
    residual = x - means[:, None] - x.mean(axis=0) + x.mean()
    noise = float((residual**2).sum()) / ((s - 1) * max(1, items - 1)) / (s * items)
    return float(means.var(ddof=1)) / s, noise


def _analytic(
    name: str, a: Floats, b: Floats, of_items: Sample, *, paired_seeds: bool, level: float, note: str, margin: float | None, side: Side,
    freedom: Freedom,
) -> Finding:  # fmt: skip
    scores = (b - a,) if paired_seeds else (a, b)
    parts = [_seed_parts(one) for one in scores]
    items = of_items.se() ** 2
    seeds, noise = sum(part[0] for part in parts), sum(part[1] for part in parts)
    variance = max(items + seeds - noise, items, seeds)
    scale = max(float(np.abs(a).max()), float(np.abs(b).max()))
    effect = float(b.mean() - a.mean())
    effect = 0.0 if abs(effect) <= 1e-13 * scale else effect
    if variance <= (1e-12 * scale) ** 2:
        if effect or margin is not None:
            raise TooFewError(f"{name!r} differs by {effect:g} for every seed and item: no spread, so no test is defined. Report the difference.")
        se, df = 0.0, float(of_items.units - 1)
    else:
        se = math.sqrt(variance)
        shares = [(items / variance) ** 2 / (of_items.units - 1)]
        shares += [(part[0] / variance) ** 2 / (len(one) - 1) for part, one in zip(parts, scores, strict=True)]
        df = min(1 / sum(shares), float(of_items.units - 1 + sum(len(one) - 1 for one in scores)))
        if freedom == "least":
            df = float(min(of_items.units - 1, *(len(one) - 1 for one in scores)))
    share = f", {seeds / (seeds + items):.0%} of the variance from seeds" if seeds + items > 0 else ""
    why = f"{_what(a, b, of_items, paired_seeds)}; other seeds and other items count{share}; {df:.3g} degrees of freedom{note}"
    n, clusters, kind = a.size + b.size, of_items.clusters, "two-way (seed × item) t"
    if margin is not None:
        return margin_finding(
            name, kind, effect=effect, se=se, df=df, margin=margin, side=side, n=n, why=why, level=level, clusters=clusters, source=_SOURCE
        )  # fmt: skip
    return t_finding(name, f"{kind} test", effect=effect, se=se, df=df, n=n, why=why, source=_SOURCE, level=level, clusters=clusters)


def _what(a: Floats, b: Floats, of_items: Sample, paired_seeds: bool) -> str:
    clustered = f" from {of_items.units} clusters" if of_items.clustered else ""
    seeds = f"{len(a)} paired seeds" if paired_seeds else f"{len(a)} and {len(b)} seeds"
    return f"{seeds} × {a.shape[1]} items{clustered}, scored by both sides"


def _bootstrapped(
    name: str, a: Floats, b: Floats, of_items: Sample, *, paired_seeds: bool, level: float, resamples: int, seed: int, note: str
) -> Finding:  # fmt: skip
    if resamples < 1000:
        raise StatisticsError(f"resamples is {resamples!r}; expected at least 1000. Usual: 4000.")
    random = np.random.default_rng(seed)
    codes = np.arange(a.shape[1]) if of_items.codes is None else of_items.codes
    sums_a, sums_b = (np.stack([np.bincount(codes, weights=row, minlength=of_items.units) for row in side]) for side in (a, b))
    sizes = np.bincount(codes, minlength=of_items.units).astype(np.float64)
    draws = random.multinomial(of_items.units, np.full(of_items.units, 1 / of_items.units), size=resamples).astype(np.float64)
    seeds_b = random.multinomial(len(b), np.full(len(b), 1 / len(b)), size=resamples) / len(b)
    seeds_a = seeds_b if paired_seeds else random.multinomial(len(a), np.full(len(a), 1 / len(a)), size=resamples) / len(a)
    replicates = ((seeds_b @ sums_b - seeds_a @ sums_a) * draws).sum(axis=1) / (draws @ sizes)
    effect = float(b.mean() - a.mean())
    # With the sample itself added on both ends, p >= 1/(resamples + 1), and the ends are the replicates at which p crosses 1 - level.
    low_count, high_count = (int(np.count_nonzero(side)) + 1 for side in (replicates <= 0, replicates >= 0))
    needed = max(1, math.ceil((1 - level) * (resamples + 1) / 2 - 1e-9) - 1)
    ordered = np.sort(replicates)
    return Finding(
        name=name,
        test="two-way (seed × item) bootstrap",
        statistic=effect,
        p_value=min(1.0, 2 * min(low_count, high_count) / (resamples + 1)),
        effect=effect,
        interval=(float(ordered[needed - 1]), float(ordered[resamples - needed])),
        n=a.size + b.size,
        why=f"{_what(a, b, of_items, paired_seeds)}; {resamples} resamples draw seeds and items, percentiles{note}",
        source=_SOURCE,
        level=level,
        clusters=of_items.clusters,
    )


def interquartile_mean(name: str, scores: Sequence[Values], *, level: float = 0.95, resamples: int = 4000, seed: int = 0) -> Estimate:
    """Mean of the middle half of all scores [task][seed], with a bootstrap that draws seeds within each task.

    Raises:
        TooFewError: no task, or a task with fewer than two scores.

    Source: Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical Precipice, arXiv 2108.13264.
    """
    check_level(level)
    tasks, random = _tasks(name, scores), np.random.default_rng(seed)
    drawn = np.concatenate([task.x[random.integers(len(task.x), size=(resamples, len(task.x)))] for task in tasks], axis=1)
    low, high = np.quantile(_middle(drawn), ((1 - level) / 2, (1 + level) / 2))
    value = float(_middle(np.concatenate([task.x for task in tasks])[None, :])[0])
    text = f"interquartile mean, percentile bootstrap ({resamples} resamples of seeds within {len(tasks)} tasks)"
    return Estimate(name=name, value=value, low=min(float(low), value), high=max(float(high), value), n=drawn.shape[1], level=level, method=text)


def _middle(x: Floats) -> Floats:
    """Mean of each row without its lowest and highest quarter, as scipy's trim_mean cuts it."""
    cut = x.shape[1] // 4
    return np.asarray(np.sort(x, axis=1)[:, cut : x.shape[1] - cut].mean(axis=1), dtype=np.float64)


def _tasks(name: str, scores: Sequence[Values]) -> list[Sample]:
    tasks = [sample(f"{name}, task {index}", row) for index, row in enumerate(scores)]
    if not tasks or min(len(task.x) for task in tasks) < 2:
        raise TooFewError(f"{name!r} has {len(tasks)} task(s), one with fewer than two scores; expected at least two scores of each.")
    return tasks


def performance_profile(
    name: str, scores: Sequence[Values], thresholds: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[Estimate, ...]:  # fmt: skip
    """The share of runs that score more than each threshold, with a bootstrap that draws seeds within each task; each task counts the same.

    Where the profile of one method lies above that of another at every threshold, it is better whatever the threshold.

    Args:
        scores: [task][seed].
        thresholds: finite, in any order; one estimate each.

    Raises:
        TooFewError: no task, or a task with fewer than two scores.
        StatisticsError: no thresholds, or one that is not finite.

    Source: Agarwal et al. 2021, arXiv 2108.13264 (run-score distributions); Dolan & Moré 2002.
    """
    check_level(level)
    if not thresholds or not all(math.isfinite(tau) for tau in thresholds):
        raise StatisticsError(f"thresholds is {thresholds!r}; expected at least one finite number.")
    tasks, random = _tasks(name, scores), np.random.default_rng(seed)
    taus = np.array(thresholds, dtype=np.float64)
    value = np.mean([(task.x[:, None] > taus).mean(axis=0) for task in tasks], axis=0)
    drawn = np.zeros((resamples, len(taus)))
    for task in tasks:
        picked = task.x[random.integers(len(task.x), size=(resamples, len(task.x)))]
        drawn += np.stack([(picked > tau).mean(axis=1) for tau in taus], axis=1) / len(tasks)
    low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2), axis=0)
    n, text = sum(len(task.x) for task in tasks), f"share of runs above, percentile bootstrap ({resamples} resamples of seeds within {len(tasks)} tasks)"
    return tuple(
        Estimate(name=f"{name} > {tau:g}", value=float(v), low=min(float(lo), float(v)), high=max(float(hi), float(v)), n=n, level=level, method=text)
        for tau, v, lo, hi in zip(taus, value, low, high, strict=True)
    )

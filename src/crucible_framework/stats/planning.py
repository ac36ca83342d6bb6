"""How many items, pairs, clusters or seeds a comparison needs, what it can find, and how surely. Knows no data.

There is no "observed power" here: computed from a result it says no more than that result's p-value (Hoenig & Heisey 2001).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

from ..errors import StatisticsError
from ..records import record
from .noncentral import f_cdf, t_cdf
from .samples import Alternative

__all__ = ["Plan", "PlanDesign", "plan"]

PlanDesign: TypeAlias = Literal["independent", "paired", "anova", "proportions", "paired proportions", "seeds"]
_MOST = 10**9


@record
class Plan:
    """A plan whose three parts fit: `effect` is found with chance `power` at `n`.

    Attributes:
        n: per group, pairs, or seeds per side, as `unit` says.
        solved: which part was computed from the others.
        clusters: how many clusters (per group) that makes, None without clusters.
        why: the method in words.
    """

    design: PlanDesign
    effect: float
    n: int
    power: float
    alpha: float
    solved: Literal["effect", "n", "power"]
    unit: str
    clusters: int | None
    why: str


@record
class _Setting:
    design: PlanDesign
    alpha: float
    alternative: Alternative
    sd: float
    groups: int
    base: float
    discordant: float
    cluster_size: int
    icc: float
    items: int
    sd_seeds: float

    @property
    def inflation(self) -> float:
        return 1 + (self.cluster_size - 1) * self.icc

    def clusters(self, n: int) -> int:
        return math.ceil(n / self.cluster_size)

    def alpha_tail(self) -> float:
        return self.alpha / 2 if self.alternative == "two-sided" else self.alpha


def plan(
    design: PlanDesign,
    *,
    effect: float | None = None,
    n: int | None = None,
    power: float | None = None,
    alpha: float = 0.05,
    alternative: Literal["two-sided", "one-sided"] = "two-sided",
    sd: float = 1.0,
    correlation: float | None = None,
    groups: int = 2,
    base: float | None = None,
    discordant: float | None = None,
    cluster_size: int = 1,
    icc: float = 0.0,
    items: int | None = None,
    sd_seeds: float | None = None,
) -> Plan:
    """Solves for the one of `effect`, `n` and `power` that is None.

    | design | effect | n | needs |
    |---|---|---|---|
    | independent | difference of means | per group | `sd` of a score |
    | paired | mean difference | pairs | `sd` of the differences; or `sd` of a score and `correlation` of the two |
    | anova | standard deviation of the groups' means | per group | `sd` of a score within a group, `groups` |
    | proportions | difference of shares | per group | `base`: the share before |
    | paired proportions | difference of shares | pairs | `discordant`: the share of pairs that change |
    | seeds | mean difference | seeds per side | `items`, `sd` of items' differences, `sd_seeds` of one seed's mean score |

    Args:
        alpha: of the test.
        cluster_size: items per cluster (document); with `icc`, their correlation within one, n counts items and is worth n/(1 + (m - 1) icc);
            t tests then have clusters - 1 degrees of freedom (per group).

    Raises:
        StatisticsError: not exactly one of the three is None, a number is out of range, or nothing up to a billion is enough.

    Source: Cohen 1988; Connor 1987 (paired proportions); Donner & Klar 2000 (clusters); Miller 2024, arXiv 2411.00640 (evaluations).
    """
    if [effect, n, power].count(None) != 1:
        raise StatisticsError(f"effect={effect}, n={n}, power={power}; expected exactly one of them to be None: the one to solve for.")
    setting = _setting(
        design=design, alpha=alpha, alternative="two-sided" if alternative == "two-sided" else "greater", sd=sd, correlation=correlation, groups=groups,
        base=base, discordant=discordant, cluster_size=cluster_size, icc=icc, items=items, sd_seeds=sd_seeds,
    )  # fmt: skip
    _range("alternative", alternative, alternative in ("two-sided", "one-sided"), "'two-sided' or 'one-sided'")
    _range("power", power, power is None or alpha < power < 1, f"a number between alpha ({alpha:g}) and 1")
    least, most = 2 * cluster_size, _largest(setting)
    _range("n", n, n is None or n >= least, f"at least {least}")
    _range("effect", effect, effect is None or (effect != 0 and abs(effect) < most), f"a number other than 0, below {most:g}")
    if effect is not None and design == "proportions" and not 0 < setting.base + effect < 1:
        raise StatisticsError(f"base + effect is {setting.base + effect:g}; expected a share between 0 and 1.")
    solved: Literal["effect", "n", "power"] = "effect" if effect is None else "n" if n is None else "power"
    effect = _solve_effect(setting, n or 0, power or 0.0, most) if effect is None else effect
    n = _solve_n(setting, effect, power or 0.0, least) if n is None else n
    counted = setting.clusters(n) if cluster_size > 1 and design != "seeds" else None
    return Plan(
        design=design, effect=effect, n=n, power=_power(setting, effect, n), alpha=alpha, solved=solved, unit=_UNITS[design], clusters=counted,
        why=_WHY[design] + (f"; clusters of {cluster_size} with correlation {icc:g} inflate the variance {setting.inflation:.3g} times" if counted else ""),
    )  # fmt: skip


_UNITS: dict[PlanDesign, str] = {
    "independent": "per group", "paired": "pairs", "anova": "per group", "proportions": "per group", "paired proportions": "pairs", "seeds": "seeds per side",
}  # fmt: skip
_WHY: dict[PlanDesign, str] = {
    "independent": "noncentral t distribution of two independent means",
    "paired": "noncentral t distribution of the mean of differences",
    "anova": "noncentral F distribution of one-way analysis of variance",
    "proportions": "normal approximation of the score test of two shares",
    "paired proportions": "normal approximation of McNemar's test (Connor 1987)",
    "seeds": "noncentral t distribution, variance of items and of seeds together, Satterthwaite's degrees of freedom",
}


def _range(what: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise StatisticsError(f"{what} is {value!r}; expected {expected}.")


def _setting(
    *,
    design: PlanDesign,
    alpha: float,
    alternative: Alternative,
    sd: float,
    correlation: float | None,
    groups: int,
    base: float | None,
    discordant: float | None,
    cluster_size: int,
    icc: float,
    items: int | None,
    sd_seeds: float | None,
) -> _Setting:
    _range("design", design, design in _WHY, f"one of {', '.join(_WHY)}")
    _range("alpha", alpha, 0 < alpha < 1, "a number between 0 and 1")
    _range("sd", sd, 0 < sd < math.inf, "a positive number")
    _range("groups", groups, groups >= 2, "at least 2")
    _range("cluster_size", cluster_size, cluster_size >= 1, "at least 1")
    _range("icc", icc, 0 <= icc <= 1, "a number from 0 to 1")
    _range("correlation", correlation, correlation is None or (design == "paired" and -1 <= correlation < 1), "a number from -1 to below 1, for pairs")
    if design == "proportions":
        _range("base", base, base is not None and 0 < base < 1, "the share before, between 0 and 1")
    if design == "paired proportions":
        _range("discordant", discordant, discordant is not None and 0 < discordant <= 1, "the share of pairs that change, above 0 and at most 1")
    if design == "seeds":
        _range("items", items, items is not None and items >= 2, "how many items each seed answers, at least 2")
        _range("sd_seeds", sd_seeds, sd_seeds is not None and sd_seeds >= 0, "the standard deviation of one seed's mean score, from 0 on")
    return _Setting(
        design=design, alpha=alpha, alternative=alternative, sd=sd if correlation is None else sd * math.sqrt(2 * (1 - correlation)), groups=groups,
        base=base or 0.0, discordant=discordant or 0.0, cluster_size=cluster_size, icc=icc, items=items or 2, sd_seeds=sd_seeds or 0.0,
    )  # fmt: skip


def _largest(setting: _Setting) -> float:
    return {"proportions": 1.0, "paired proportions": setting.discordant}.get(setting.design, math.inf)


# --------------------------------------------------------------------------------------------------------------- power
def _power(setting: _Setting, effect: float, n: int) -> float:
    powers: dict[PlanDesign, Callable[[_Setting, float, int], float]] = {
        "independent": _power_means,
        "paired": _power_means,
        "anova": _power_anova,
        "proportions": _power_shares,
        "paired proportions": _power_pairs,
        "seeds": _power_seeds,
    }
    return min(1.0, max(0.0, powers[setting.design](setting, effect, n)))


def _t_power(setting: _Setting, shift: float, df: float) -> float:
    """Power of a t test whose statistic is centred on `shift`; a one-sided test looks the way of the effect."""
    from scipy.special import stdtrit

    shift, critical = abs(shift), -float(stdtrit(df, setting.alpha_tail()))
    if shift > critical + 38:
        return 1.0
    above = 1 - t_cdf(critical, df, shift)
    return above + t_cdf(-critical, df, shift) if setting.alternative == "two-sided" else above


def _power_means(setting: _Setting, effect: float, n: int) -> float:
    sides = 2 if setting.design == "independent" else 1
    units = n if setting.cluster_size == 1 else setting.clusters(n)
    return _t_power(setting, effect / (setting.sd * math.sqrt(sides * setting.inflation / n)), sides * (units - 1))


def _power_anova(setting: _Setting, effect: float, n: int) -> float:
    from scipy.special import fdtri

    units = n if setting.cluster_size == 1 else setting.clusters(n)
    df1, df2 = setting.groups - 1, setting.groups * (units - 1)
    noncentrality = (effect / setting.sd) ** 2 * n * setting.groups / setting.inflation
    return 1 - f_cdf(float(fdtri(df1, df2, 1 - setting.alpha)), df1, df2, noncentrality)


def _z_power(setting: _Setting, shift: float, null_sd: float, sd: float) -> float:
    from scipy.special import ndtr, ndtri

    critical = -float(ndtri(setting.alpha_tail())) * null_sd
    above = float(ndtr((abs(shift) - critical) / sd))
    return above + float(ndtr((-abs(shift) - critical) / sd)) if setting.alternative == "two-sided" else above


def _power_shares(setting: _Setting, effect: float, n: int) -> float:
    p1, p2 = setting.base, setting.base + effect
    mean = (p1 + p2) / 2
    unit = setting.inflation / n
    return _z_power(setting, effect, math.sqrt(2 * mean * (1 - mean) * unit), math.sqrt((p1 * (1 - p1) + p2 * (1 - p2)) * unit))


def _power_pairs(setting: _Setting, effect: float, n: int) -> float:
    unit = setting.inflation / n
    return _z_power(setting, effect, math.sqrt(setting.discordant * unit), math.sqrt((setting.discordant - effect**2) * unit))


def _power_seeds(setting: _Setting, effect: float, n: int) -> float:
    of_items, of_seed = setting.sd**2 * setting.inflation / setting.items, setting.sd_seeds**2 / n
    variance = of_items + 2 * of_seed
    units = max(2, setting.clusters(setting.items))
    df = 1 / ((of_items / variance) ** 2 / (units - 1) + 2 * (of_seed / variance) ** 2 / (n - 1))
    return _t_power(setting, effect / math.sqrt(variance), df)


# --------------------------------------------------------------------------------------------------------------- solve
def _solve_n(setting: _Setting, effect: float, power: float, least: int) -> int:
    high = least
    while _power(setting, effect, high) < power:
        high *= 2
        if high > _MOST:
            raise StatisticsError(
                f"No n up to a billion finds an effect of {effect:g} with power {power:g}; expected a larger effect. "
                "With seeds, the items alone may already vary too much: give more items."
            )
    low = max(least, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(setting, effect, middle) >= power else (middle + 1, high)
    return high


def _solve_effect(setting: _Setting, n: int, power: float, most: float) -> float:
    from scipy.optimize import brentq

    limit = min(most, 1 - setting.base) if setting.design == "proportions" else most
    high = setting.sd / math.sqrt(n) if math.isinf(limit) else limit * (1 - 1e-9)
    while math.isinf(limit) and _power(setting, high, n) < power:
        high *= 2
    if _power(setting, high, n) < power:
        raise StatisticsError(f"n = {n} finds no effect below {limit:g} with power {power:g}; expected a larger n.")
    return float(brentq(lambda effect: _power(setting, effect, n) - power, high * 1e-9, high, xtol=1e-12 * high, rtol=1e-12))

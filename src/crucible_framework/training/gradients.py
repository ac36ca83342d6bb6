"""Gradient hooks that look: norms, distribution, flow, health, cosine, noise scale; and `chain`, which runs several in order.

A hook is a function (gradients by parameter name, report) → gradients that an engine runs between backward and step; what it reports is a
metric of the step, under `grad/` where its name has no slash. Those that change gradients are in `edits.py`. Each call of a factory below
makes a fresh hook: some remember earlier steps, so a hook serves one run. What they remember is not in a checkpoint; a resumed run starts
it anew, so the rows of `cosine` and `noise_scale` just after a resume differ from those of a run that was never stopped.

This file does not know models, optimizers or files. Torch is imported when a hook runs.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from .. import events
from ..errors import ConfigError, NumericError, UnknownNameError
from ..plugins import Registry
from ..protocols import GradientHook, Gradients, Report

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "By",
    "Issue",
    "chain",
    "check_by",
    "cosine",
    "distribution",
    "dot",
    "flow",
    "gradient_hooks",
    "group_norms",
    "health",
    "layer_of",
    "matching",
    "noise_and_signal",
    "noise_scale",
    "norms",
]

By: TypeAlias = Literal["tensor", "layer", "block", "all"]
Issue: TypeAlias = Literal["vanishing", "exploding", "not_finite"]
HookFactory: TypeAlias = Callable[[], GradientHook]

gradient_hooks: Registry[HookFactory] = Registry(
    "gradient hook", {name: f"crucible_framework.training.gradients:{name}" for name in ("cosine", "distribution", "flow", "health", "norms")}
)
"""Names to factories without arguments, each giving a fresh hook; the entry-point group is `crucible.gradient_hook`."""

_ENDS = re.compile(r"\.lora_(?P<part>[AB])(\.default)?\.weight$|\.weight$")
_BLOCK = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


# --------------------------------------------------------------------------------------------------------------- names
def layer_of(name: str, by: By = "layer") -> str:
    """The group that a parameter belongs to.

    Args:
        name: as the engine calls it, "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight".
        by: "tensor" keeps A and B apart ("layers.3.self_attn.q_proj.A"); "layer" joins them; "block" gives the first number of the name,
            padded so that names sort in order ("003"), or "other"; "all" is one group.
    """
    if by == "all":
        return "all"
    bare = name.removeprefix("base_model.model.").removeprefix("model.")
    end = _ENDS.search(bare)
    layer = bare[: end.start()] if end else bare
    if by == "block":
        number = _BLOCK.search(layer)
        return f"{int(number[1]):03d}" if number else "other"
    return f"{layer}.{end['part']}" if by == "tensor" and end and end["part"] else layer


def matching(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The names that one of the patterns means.

    A pattern is compared, with shell wildcards (* ? [0-3]), with a parameter's whole name, its layer ("layers.3.self_attn.q_proj"), its short
    name ("layers.3.self_attn.q_proj.A"), and the ends of these at a dot, so "q_proj" means what it does in `LoraConfig.target_modules`.

    Raises:
        UnknownNameError: a pattern means no parameter; some of their short names are given.
    """
    found: set[str] = set()
    for pattern in patterns:
        ends = (pattern, f"*.{pattern}")
        hits = {name for name in names if any(fnmatch.fnmatchcase(form, end) for form in (name, layer_of(name), layer_of(name, "tensor")) for end in ends)}
        if not hits:
            raise UnknownNameError("parameter pattern", pattern, {layer_of(name) for name in names}, fix="Wildcards are * ? [..].")
        found |= hits
    return found


def check_by(by: str) -> None:
    """Raises ConfigError where `by` is no way to group parameters."""
    if by not in ("tensor", "layer", "block", "all"):
        raise ConfigError(f"by is {by!r}; expected 'tensor', 'layer', 'block' or 'all'.")


# -------------------------------------------------------------------------------------------------------------- numbers
def group_norms(gradients: Gradients, by: By = "layer") -> dict[str, float]:
    """L2 norm per group, in the order in which the groups first occur. Read from the device once."""
    import torch

    if not gradients:
        return {}
    each = torch.stack([torch.linalg.vector_norm(gradient.detach().float()) for gradient in gradients.values()]).tolist()
    squares: dict[str, float] = {}
    for name, norm in zip(gradients, each, strict=True):
        group = layer_of(name, by)
        squares[group] = squares.get(group, 0.0) + norm * norm
    return {group: math.sqrt(square) for group, square in squares.items()}


def dot(a: Gradients, b: Gradients) -> float:
    """Σ over all parameters of a · b: float32 within a tensor, exact over tensors.

    Raises:
        ConfigError: the two do not have the same parameters.
    """
    import torch

    if a.keys() != b.keys():
        raise ConfigError(f"Gradients of {sorted(a.keys() ^ b.keys())[:3]} are in one set and not in the other; expected the same parameters.")
    if not a:
        return 0.0
    each = torch.stack([torch.dot(a[name].detach().flatten().float(), b[name].detach().flatten().float().to(a[name].device)) for name in a])
    return math.fsum(each.tolist())


# --------------------------------------------------------------------------------------------------------------- chain
def chain(*hooks: str | GradientHook) -> GradientHook:
    """Runs hooks in order, each on what the one before it gave: looking first shows raw gradients, looking last those that are used.

    Args:
        hooks: functions, or names of `gradient_hooks` ("norms", "module:factory"), which are made afresh.

    Raises:
        UnknownNameError: a name is not registered.
        ConfigError: no hook, or something that cannot be called.
    """
    if not hooks:
        raise ConfigError("chain() got no hooks; expected at least one, for example chain('norms', 'health').")
    made = tuple(gradient_hooks.get(hook)() if isinstance(hook, str) else hook for hook in hooks)
    for hook in made:
        if not callable(hook):
            raise ConfigError(f"{hook!r} is no gradient hook; expected a function (gradients, report) or a name of {', '.join(gradient_hooks.names())}.")

    def chained(gradients: Gradients, report: Report) -> Gradients:
        for hook in made:
            gradients = hook(gradients, report)
        return gradients

    return chained


# ------------------------------------------------------------------------------------------------------------- looking
def norms(by: By = "layer") -> GradientHook:
    """Reports `norm/<group>`, the L2 norm per group, in units of the loss per unit of the parameter.

    In a fresh adapter B is zero, so the gradient of A is exactly zero at the first step; that is no fault.

    Args:
        by: see `layer_of`. "tensor" gives two metrics a layer and step, "block" one for each block of the model.
    """
    check_by(by)

    def hook(gradients: Gradients, report: Report) -> Gradients:
        for group, norm in group_norms(gradients, by).items():
            report(f"grad/norm/{group}", norm)
        return gradients

    return hook


def distribution(low: int = -10, high: int = 1) -> GradientHook:
    """Reports mean, standard deviation (n − 1), least, greatest, sparsity (share of exact zeros) and a histogram over all entries.

    The histogram counts magnitudes by decade, so that steps can be compared: `magnitude/1e-03` is the share of entries with
    1e-3 ≤ |g| < 1e-2, `magnitude/below` of those under 10^low (zeros included), `magnitude/above` of those of 10^high and more.

    Args:
        low: exponent of the first decade.
        high: exponent of the end of the last one.

    Raises:
        ConfigError: low ≥ high.
    """
    if low >= high:
        raise ConfigError(f"The decades run from 1e{low} to 1e{high}; expected low < high, for example -10 and 1.")

    def hook(gradients: Gradients, report: Report) -> Gradients:
        import torch

        flat = torch.cat([gradient.detach().flatten().double().cpu() for gradient in gradients.values()])
        count = flat.numel()
        parts = torch.stack([flat.mean(), flat.std() if count > 1 else torch.zeros((), dtype=flat.dtype), flat.min(), flat.max(), (flat == 0).double().mean()])
        for name, value in zip(("mean", "std", "min", "max", "sparsity"), parts.tolist(), strict=True):
            report(name, value)
        edges = torch.tensor([10.0**power for power in range(low, high + 1)], dtype=flat.dtype)
        bins = torch.bincount(torch.bucketize(flat.abs(), edges, right=True), minlength=len(edges) + 1).tolist()
        labels = ("below", *(f"1e{power:+03d}" for power in range(low, high)), "above")
        for label, found in zip(labels, bins, strict=True):
            report(f"grad/magnitude/{label}", found / count)
        return gradients

    return hook


def flow() -> GradientHook:
    """Reports `flow/<block>`, the L2 norm per block of the model in its order, and `flow_ratio`, first block over last.

    A ratio far below 1 says that little of the signal reaches the early blocks. It is left out where the model has fewer than two adapted
    blocks or the last one's gradient is zero.
    """

    def hook(gradients: Gradients, report: Report) -> Gradients:
        blocks = group_norms(gradients, "block")
        for block in sorted(blocks):
            report(f"grad/flow/{block}", blocks[block])
        numbered = sorted(block for block in blocks if block != "other")
        if len(numbered) > 1 and blocks[numbered[-1]] > 0:
            report("flow_ratio", blocks[numbered[0]] / blocks[numbered[-1]])
        return gradients

    return hook


def health(
    vanishing: float = 1e-7,
    exploding: float = 1e3,
    *,
    thresholds: Mapping[str, tuple[float, float]] | None = None,
    fail_on: Sequence[Issue] = (),
    by: By = "layer",
) -> GradientHook:
    """Reports how many layers have a norm that vanishes (below), explodes (above) or is not finite; each step's issues are an event too.

    A and B of a layer count together, so that the zero gradient of A at the start of a run is no issue.

    Args:
        vanishing: norms below it vanish.
        exploding: norms above it explode.
        thresholds: (vanishing, exploding) for layers that a pattern means; the first match counts.
        fail_on: issues that refuse the step instead of only being counted. The engines themselves refuse what is not finite.
        by: what a layer is, see `layer_of`.

    Raises:
        ConfigError: limits that are negative or not in order, or an unknown issue.
        NumericError (when it runs): an issue of `fail_on`.

    Emits:
        `training.gradient_issue` with kind, layers (the first five) and count.
    """
    check_by(by)
    limits = dict(thresholds or {})
    for pattern, (low, high) in {**limits, "*": (vanishing, exploding)}.items():
        if not 0 <= low < high:
            raise ConfigError(f"The limits of {pattern!r} are {low!r} and {high!r}; expected 0 ≤ vanishing < exploding, for example 1e-7 and 1e3.")
    for issue in fail_on:
        if issue not in ("vanishing", "exploding", "not_finite"):
            raise ConfigError(f"fail_on holds {issue!r}; expected 'vanishing', 'exploding' or 'not_finite'.")

    def issue_of(layer: str, norm: float) -> Issue | None:
        low, high = next((pair for pattern, pair in limits.items() if fnmatch.fnmatchcase(layer, pattern)), (vanishing, exploding))
        if not math.isfinite(norm):
            return "not_finite"
        return "vanishing" if norm < low else "exploding" if norm > high else None

    def hook(gradients: Gradients, report: Report) -> Gradients:
        found: dict[Issue, list[str]] = {"vanishing": [], "exploding": [], "not_finite": []}
        sizes = group_norms(gradients, by)
        for layer, norm in sizes.items():
            if (issue := issue_of(layer, norm)) is not None:
                found[issue].append(layer)
        for kind, layers in found.items():
            report(f"grad/health/{kind}", float(len(layers)))
            if layers:
                events.emit("training.gradient_issue", kind=kind, layers=[*layers[:5]], count=len(layers))
            if layers and kind in fail_on:
                worst = f"{layers[0]!r} has a gradient of norm {sizes[layers[0]]:g} ({kind.replace('_', ' ')})"
                raise NumericError(f"{worst}; expected one within the limits. The weights were not touched: look at the data and the rate.", tensor=layers[0])
        return gradients

    return hook


def cosine(by: By = "all") -> GradientHook:
    """Reports `cosine/<group>`, the cosine between this step's gradient and the last one's, from the second step on.

    Near 1: steps agree, and a larger rate may do; near 0: noise rules; below 0: steps undo each other. Nothing is reported where one of
    the two is zero. Keeps one gradient in memory.
    """
    check_by(by)
    last: dict[str, Tensor] = {}

    def hook(gradients: Gradients, report: Report) -> Gradients:
        now = {name: gradient.detach() for name, gradient in gradients.items()}
        if last.keys() == now.keys():
            groups: dict[str, list[str]] = {}
            for name in now:
                groups.setdefault(layer_of(name, by), []).append(name)
            for group, names in groups.items():
                new, old = ({name: source[name] for name in names} for source in (now, last))
                size = math.sqrt(dot(new, new) * dot(old, old))
                if size > 0:
                    report(f"grad/cosine/{group}", max(-1.0, min(1.0, dot(new, old) / size)))
        last.clear()
        last.update(now)
        return gradients

    return hook


def noise_scale(batch_size: int, window: int = 8) -> GradientHook:
    """Reports the simple noise scale B = tr(Σ) / |G|² in examples, once per `window` steps: far larger batches than B gain little.

    The gradients of `window` steps are taken as small batches and their mean as the large one. The estimates are unbiased where the weights
    stand still; here they move within the window, which counts as noise. So read it as an upper side of the truth at small rates, and use
    `example_gradients` where weights stand still. `noise_trace` is tr(Σ), `signal` is |G|²; the ratio is left out where the estimate of
    |G|² is not positive, which says that the window is too short to see the signal.

    Args:
        batch_size: examples per step (batch_size × accumulate). Their gradient must be a mean, as the trainer makes it.
        window: steps per estimate.

    Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1.
    """
    if batch_size < 1 or window < 2:
        raise ConfigError(f"noise_scale has batch_size {batch_size!r} and window {window!r}; expected at least 1 example and 2 steps.")
    total: dict[str, Tensor] = {}
    squares: list[float] = []

    def hook(gradients: Gradients, report: Report) -> Gradients:
        for name, gradient in gradients.items():
            total[name] = total[name] + gradient.detach() if name in total else gradient.detach()
        squares.append(dot(gradients, gradients))
        if len(squares) == window:
            trace, signal = noise_and_signal(math.fsum(squares) / window, dot(total, total) / window**2, batch_size, batch_size * window)
            report("noise_trace", trace)
            report("signal", signal)
            if signal > 0:
                report("noise_scale", trace / signal)
            total.clear()
            squares.clear()
        return gradients

    return hook


def noise_and_signal(small: float, large: float, small_size: int, large_size: int) -> tuple[float, float]:
    """tr(Σ) and |G|² from the mean squared norms of the gradients of small and of large batches."""
    signal = (large_size * large - small_size * small) / (large_size - small_size)
    trace = (small - large) / (1 / small_size - 1 / large_size)
    return trace, signal

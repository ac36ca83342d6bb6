"""Gradient hooks that change gradients: clip, freeze, mask, add noise, project.

They give new tensors and leave those that they got. None of them holds state, so a resumed run is bit-exact. See `gradients.py` for those
that only look and for `chain`. This file does not know models or optimizers: Adam's momentum moves a parameter whose gradient is zero now
but was not before, and weight decay moves it always. Torch is imported when a hook runs.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..protocols import GradientHook, Gradients, Report
from .gradients import By, check_by, dot, group_norms, layer_of, matching

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_noise", "clip_layers", "freeze", "mask", "pcgrad", "project"]


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value!r}; expected a positive number.")


def clip_layers(max_norm: float, by: By = "layer") -> GradientHook:
    """Scales each layer's gradient down to an L2 norm of at most `max_norm`; the others keep theirs, unlike in global clipping.

    Reports `clipped`, the share of layers that were scaled.
    """
    _positive("max_norm", max_norm)
    check_by(by)

    def hook(gradients: Gradients, report: Report) -> Gradients:
        sizes = group_norms(gradients, by)
        factors = {group: max_norm / norm for group, norm in sizes.items() if norm > max_norm}
        report("clipped", len(factors) / len(sizes))
        return {name: gradient * factors[group] if (group := layer_of(name, by)) in factors else gradient for name, gradient in gradients.items()}

    return hook


def freeze(*patterns: str, keep: Sequence[str] = ()) -> GradientHook:
    """Zeroes the gradients of parameters whose name matches a pattern, save those that match one of `keep`.

    From the first step on and with `weight_decay` 0 such parameters stay bit for bit as they were. Later, Adam's momentum still moves them.

    Args:
        patterns: names or ends of names, with wildcards: "layers.0.*", "q_proj", "lora_A.weight" (see `gradients.matching`).
        keep: likewise; `freeze("*", keep=["v_proj"])` trains v_proj only.

    Raises:
        ConfigError: no pattern.
        UnknownNameError (when it runs): a pattern means no parameter.
    """
    if not patterns:
        raise ConfigError("freeze() got no pattern; expected at least one, for example freeze('layers.0.*').")

    def hook(gradients: Gradients, report: Report) -> Gradients:
        import torch

        names = list(gradients)
        frozen = matching(names, patterns) - (matching(names, keep) if keep else set[str]())
        report("frozen", len(frozen) / len(names))
        return {name: torch.zeros_like(gradient) if name in frozen else gradient for name, gradient in gradients.items()}

    return hook


def mask(masks: Mapping[str, Tensor]) -> GradientHook:
    """Multiplies gradients with masks by whole parameter name (as `gradients` names them); parameters without one are left.

    Raises:
        ConfigError (when it runs): a mask for a parameter that is not there, or of another shape.
    """

    def hook(gradients: Gradients, report: Report) -> Gradients:
        del report
        changed = dict(gradients)
        for name, factor in masks.items():
            if name not in gradients or gradients[name].shape != factor.shape:
                have = f"shape {tuple(gradients[name].shape)}" if name in gradients else "no such parameter"
                raise ConfigError(
                    f"The mask of {name!r} has shape {tuple(factor.shape)}, the gradients have {have}. Use the names and shapes that a hook sees."
                )
            changed[name] = gradients[name] * factor.to(gradients[name])
        return changed

    return hook


def add_noise(std: float, seed: int = 0, *, relative: bool = False) -> GradientHook:
    """Adds Gaussian noise to every entry; a regulariser, and no privacy mechanism (see `train_privately`).

    The noise is drawn from a seed made of `seed` and the gradient itself, not of a counter, so that a resumed run draws what it would have.

    Args:
        std: standard deviation per entry, in the gradient's unit.
        seed: another seed gives other noise.
        relative: `std` is a multiple of the root mean square of all gradient entries instead.

    Source: Neelakantan et al. 2015, arXiv 1511.06807, with constant instead of falling variance.
    """
    _positive("std", std)

    def hook(gradients: Gradients, report: Report) -> Gradients:
        import torch

        sizes = group_norms(gradients, "tensor")
        sums = torch.stack([gradient.detach().sum() for gradient in gradients.values()]).tolist()
        digest = hashlib.blake2b(struct.pack(f"<q{len(sizes)}d{len(sums)}d", seed, *sizes.values(), *sums), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        scale = std
        if relative:
            count = sum(gradient.numel() for gradient in gradients.values())
            scale = std * math.sqrt(math.fsum(size * size for size in sizes.values()) / count)
        report("noise_std", scale)
        return {name: gradient + (scale * torch.randn(gradient.shape, generator=generator)).to(gradient) for name, gradient in gradients.items()}

    return hook


def _without(gradients: Gradients, reference: Gradients) -> tuple[Gradients, bool]:
    """The gradients without their part against the reference, and whether there was one."""
    along, size = dot(gradients, reference), dot(reference, reference)
    if along >= 0 or size == 0:
        return gradients, False
    factor = along / size
    return {name: gradient - factor * reference[name].to(gradient) for name, gradient in gradients.items()}, True


def project(*references: Gradients) -> GradientHook:
    """Removes from the gradient what points against a reference, so that to first order plain gradient descent does not undo it.

    The reference is the gradient of what must be kept (see `gradient_of`), taken as it stands; as the weights move it goes stale. Adam scales
    entries one by one, so its step may still point against the reference. With several references a later one can bring back a part against
    an earlier one. Reports `projected`, how many were in conflict.

    Source: Chaudhry et al. 2019, arXiv 1812.00420 (A-GEM), eq. 11, for one reference.
    """
    if not references:
        raise ConfigError("project() got no reference; expected at least one gradient, for example that of gradient_of(...).")

    def hook(gradients: Gradients, report: Report) -> Gradients:
        hits = 0
        for reference in references:
            gradients, hit = _without(gradients, reference)
            hits += hit
        report("projected", float(hits))
        return gradients

    return hook


def pcgrad(*others: Gradients, seed: int = 0) -> GradientHook:
    """Adds the gradients of other tasks to this step's, each without its parts against the others' (PCGrad).

    Every task's gradient is projected, in a random order that depends on the seed and the number of tasks, onto the normal plane of each
    other task's that it conflicts with; then all are summed. The others' gradients come from `gradient_of` on the same weights.
    Reports `conflicts`, the number of projections.

    Source: Yu et al. 2020, arXiv 2001.06782, algorithm 1.
    """
    if not others:
        raise ConfigError("pcgrad() got no other task's gradient; expected at least one, for example that of gradient_of(...).")

    def hook(gradients: Gradients, report: Report) -> Gradients:
        import numpy as np

        tasks = [gradients, *others]
        order = np.random.default_rng([seed, len(tasks)])
        conflicts = 0
        total: dict[str, Tensor] = {}
        for i, task in enumerate(tasks):
            mine = task
            for j in order.permutation(len(tasks)):
                if j != i:
                    mine, hit = _without(mine, tasks[j])
                    conflicts += hit
            for name, gradient in gradients.items():
                part = mine[name].to(gradient)
                total[name] = total[name] + part if name in total else part
        report("conflicts", float(conflicts))
        return total

    return hook

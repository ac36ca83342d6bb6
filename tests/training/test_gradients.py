"""Gradient hooks: what they report on numbers worked by hand, what they change, and that they work in a run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crucible_framework import events
from crucible_framework.backends import connect
from crucible_framework.errors import ConfigError, NumericError, UnknownNameError
from crucible_framework.files import read_lines
from crucible_framework.protocols import Backend, GradientHook, Gradients, Report
from crucible_framework.records import AdamConfig, Dataset, TrainConfig
from crucible_framework.training import (
    Trainer,
    add_noise,
    chain,
    clip_layers,
    cosine,
    distribution,
    flow,
    freeze,
    gradient_hooks,
    health,
    mask,
    noise_scale,
    norms,
    pcgrad,
    project,
)
from crucible_framework.training.gradients import dot, group_norms, layer_of, matching

PREFIX = "base_model.model.model."
A0, B0, A1, B1 = (f"{PREFIX}layers.{i}.self_attn.q_proj.lora_{part}.weight" for i in (0, 1) for part in "AB")
CONFIG = TrainConfig(base_model="fake", max_steps=6, checkpoint_interval=2, adam=AdamConfig(lr=0.05), max_length=2048)
SEEDS = st.integers(0, 2**31)


def four(seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in {A0: (2, 3), B0: (4, 2), A1: (2, 3), B1: (4, 2)}.items()}


def run(hook: GradientHook, gradients: Gradients) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the hook gives and reports; it must not write to what it got."""
    before = {name: tensor.clone() for name, tensor in gradients.items()}
    reported: dict[str, float] = {}
    changed = dict(hook(gradients, lambda name, value: reported.update({name: float(value)})))
    assert all(
        torch.equal(
            before[name],
            tensor,
        )
        or bool(tensor.isnan().any())
        for name, tensor in gradients.items()
    )
    return changed, reported


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


# --------------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    ("name", "by", "group"),
    [
        (A0, "tensor", "layers.0.self_attn.q_proj.A"),
        (B0, "layer", "layers.0.self_attn.q_proj"),
        (f"{PREFIX}layers.12.mlp.up_proj.lora_B.default.weight", "tensor", "layers.12.mlp.up_proj.B"),
        (f"{PREFIX}layers.12.mlp.up_proj.lora_B.weight", "block", "012"),
        ("base_model.model.lm_head.weight", "layer", "lm_head"),
        ("base_model.model.lm_head.weight", "tensor", "lm_head"),
        ("base_model.model.lm_head.weight", "block", "other"),
        ("transformer.h.3.attn.c_attn.lora_A.weight", "block", "003"),
        (A0, "all", "all"),
    ],
)
def test_groups_have_short_names_that_sort_in_model_order(name: str, by: str, group: str) -> None:
    assert layer_of(name, by) == group  # type: ignore[arg-type]


def test_patterns_mean_what_target_modules_mean_and_say_what_is_there() -> None:
    names = [A0, B0, A1, B1]
    assert matching(names, ["q_proj"]) == set(names)
    assert matching(names, ["layers.0.*"]) == {A0, B0}
    assert matching(names, ["q_proj.A"]) == matching(names, ["lora_A.weight"]) == {A0, A1}
    assert matching(names, [A0, "layers.[1-9].self_attn.q_proj"]) == {A0, A1, B1}
    with pytest.raises(UnknownNameError, match=r"layers\.0\.self_attn\.q_proj"):
        matching(names, ["k_proj"])


# ------------------------------------------------------------------------------------------------------------- looking
@given(SEEDS)
def test_norms_add_up_to_the_global_norm(seed: int) -> None:
    gradients = four(seed)
    total = float(torch.linalg.vector_norm(flat(gradients)))
    for by in ("tensor", "layer", "block", "all"):
        sizes = group_norms(gradients, by)
        assert math.hypot(*sizes.values()) == pytest.approx(total, rel=1e-5)
    assert dot(gradients, gradients) == pytest.approx(total**2, rel=1e-5)
    changed, reported = run(norms("tensor"), gradients)
    assert all(torch.equal(changed[name], gradients[name]) for name in gradients)
    assert reported["grad/norm/layers.1.self_attn.q_proj.B"] == pytest.approx(float(gradients[B1].norm()), rel=1e-5)
    assert len(reported) == 4


def test_norms_on_known_numbers() -> None:
    _, reported = run(norms(), {"a.weight": torch.tensor([1.0, 2.0, 3.0]), "b.weight": torch.tensor([4.0, 5.0])})
    assert reported == {"grad/norm/a": pytest.approx(3.7416573868), "grad/norm/b": pytest.approx(6.4031242374)}
    assert group_norms({}) == {}
    assert dot({}, {}) == 0
    with pytest.raises(ConfigError, match="same parameters"):
        dot({"a": torch.ones(1)}, {"b": torch.ones(1)})


def test_distribution_on_known_numbers() -> None:
    _, reported = run(distribution(), {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0], [4.0], [5.0]])})
    assert {name: reported[name] for name in ("mean", "std", "min", "max", "sparsity")} == pytest.approx(
        {"mean": 3, "std": 1.5811388301, "min": 1, "max": 5, "sparsity": 0}
    )
    assert reported["grad/magnitude/1e+00"] == 1
    _, reported = run(distribution(-3, 1), {"a": torch.tensor([0.0, 0.0, 0.0015, -20.0])})
    shares = {name.rpartition("/")[2]: value for name, value in reported.items() if "magnitude" in name}
    assert shares == {"below": 0.5, "1e-03": 0.25, "1e-02": 0, "1e-01": 0, "1e+00": 0, "above": 0.25}
    assert reported["sparsity"] == 0.5
    assert run(distribution(), {"a": torch.tensor([2.0])})[1]["std"] == 0


@given(SEEDS, st.floats(1e-9, 1e3))
def test_the_histogram_loses_nothing(seed: int, scale: float) -> None:
    _, reported = run(distribution(), four(seed, scale))
    assert math.fsum(value for name, value in reported.items() if "magnitude" in name) == pytest.approx(1)


def test_flow_is_in_model_order_and_compares_first_with_last() -> None:
    gradients = {f"layers.{i}.q_proj.lora_B.weight": torch.full((1,), float(i + 1)) for i in (10, 2)} | {"lm_head.weight": torch.ones(1)}
    _, reported = run(flow(), gradients)
    assert list(reported) == ["grad/flow/002", "grad/flow/010", "grad/flow/other", "flow_ratio"]
    assert reported["flow_ratio"] == pytest.approx(3 / 11)
    assert "flow_ratio" not in run(flow(), {"layers.0.a.weight": torch.ones(1)})[1]
    assert "flow_ratio" not in run(flow(), {"layers.0.a.weight": torch.ones(1), "layers.1.a.weight": torch.zeros(1)})[1]


def test_health_counts_each_kind_and_joins_a_and_b() -> None:
    fresh = four() | {A0: torch.zeros(2, 3), A1: torch.zeros(2, 3)}  # as in the first step of every LoRA
    assert run(health(), fresh)[1] == {"grad/health/vanishing": 0, "grad/health/exploding": 0, "grad/health/not_finite": 0}
    sick = {"a.weight": torch.tensor([1e-9]), "b.weight": torch.tensor([2e3]), "c.weight": torch.tensor([math.nan]), "d.weight": torch.ones(1)}
    with events.collect() as seen:
        assert run(health(), sick)[1] == {"grad/health/vanishing": 1, "grad/health/exploding": 1, "grad/health/not_finite": 1}
    issues = {str(event["kind"]): event["layers"] for event in seen if event["name"] == "training.gradient_issue"}
    assert issues == {"vanishing": ["a"], "exploding": ["b"], "not_finite": ["c"]}


def test_health_limits_are_per_layer_and_may_refuse_the_step() -> None:
    gradients = {"head.weight": torch.tensor([2e3]), "body.weight": torch.tensor([1.0])}
    assert run(health(thresholds={"head": (0, 1e4)}), gradients)[1]["grad/health/exploding"] == 0
    assert run(health(1e-5, 0.5, thresholds={"h*": (0, 1e4)}), gradients)[1]["grad/health/exploding"] == 1
    with pytest.raises(NumericError, match=r"'head' has a gradient of norm 2000 \(exploding\)") as caught:
        run(health(fail_on=["exploding"]), gradients)
    assert caught.value.tensor == "head"
    for bad in ({"vanishing": 1.0, "exploding": 0.5}, {"vanishing": -1.0}, {"fail_on": ["slow"]}, {"by": "row"}, {"thresholds": {"x": (2, 1)}}):
        with pytest.raises(ConfigError):
            health(**bad)


def test_cosine_compares_with_the_step_before() -> None:
    hook = cosine()
    assert run(hook, four(1))[1] == {}
    assert run(hook, four(1))[1]["grad/cosine/all"] == pytest.approx(1)
    assert run(hook, {name: -tensor for name, tensor in four(1).items()})[1]["grad/cosine/all"] == pytest.approx(-1)
    second = run(hook, four(2))[1]["grad/cosine/all"]
    oracle = torch.nn.functional.cosine_similarity(-flat(four(1)), flat(four(2)), dim=0)
    assert second == pytest.approx(float(oracle), abs=1e-5)
    assert run(hook, {name: torch.zeros_like(tensor) for name, tensor in four().items()})[1] == {}, "no direction, no cosine"
    by_layer = cosine("layer")
    run(by_layer, four(1))
    flipped = four(1) | {A0: -four(1)[A0], B0: -four(1)[B0]}
    assert run(by_layer, flipped)[1] == {
        "grad/cosine/layers.0.self_attn.q_proj": pytest.approx(-1),
        "grad/cosine/layers.1.self_attn.q_proj": pytest.approx(1),
    }


def test_noise_scale_finds_a_noise_that_is_known() -> None:
    """Gradients of mean G with known covariance: a batch of b has G + ε/√b with tr(Σ) = entries · σ²."""
    generator = torch.Generator().manual_seed(3)
    entries, sigma, batch_size = 400, 0.5, 4
    truth = torch.full((entries,), 0.2)
    hook, found = noise_scale(batch_size, window=8), list[dict[str, float]]()
    for step in range(8 * 40):
        gradient = truth + sigma / math.sqrt(batch_size) * torch.randn(entries, generator=generator)
        _, reported = run(hook, {"a": gradient[:100], "b": gradient[100:].view(3, 100)})
        assert bool(reported) == (step % 8 == 7)
        if reported:
            found.append(reported)
    trace, signal = (math.fsum(one[name] for one in found) / len(found) for name in ("noise_trace", "signal"))
    assert trace == pytest.approx(entries * sigma**2, rel=0.05)
    assert signal == pytest.approx(float(truth @ truth), rel=0.05)
    assert math.fsum(one["noise_scale"] for one in found) / len(found) == pytest.approx(100 / 16, rel=0.1)


def test_noise_scale_gives_no_ratio_where_there_is_no_signal() -> None:
    hook = noise_scale(1, window=2)
    run(hook, {"a": torch.tensor([1.0])})
    _, reported = run(hook, {"a": torch.tensor([-1.0])})
    assert set(reported) == {"noise_trace", "signal"}
    assert reported["signal"] < 0
    for bad in ((0, 8), (4, 1)):
        with pytest.raises(ConfigError, match="at least 1 example and 2 steps"):
            noise_scale(*bad)


# ------------------------------------------------------------------------------------------------------------ changing
@given(SEEDS, st.floats(0.01, 10))
def test_clipping_bounds_each_layer_and_leaves_the_others(seed: int, limit: float) -> None:
    gradients = four(seed) | {A1: torch.full((2, 3), 1e-4), B1: torch.full((4, 2), 1e-4)}
    changed, reported = run(clip_layers(limit), gradients)
    sizes = group_norms(changed)
    assert all(size <= limit * (1 + 1e-5) for size in sizes.values())
    assert torch.equal(changed[A1], gradients[A1])
    clipped = group_norms(gradients)["layers.0.self_attn.q_proj"] > limit
    assert reported == {"clipped": 0.5 if clipped else 0}
    if clipped:
        ratio = changed[A0] / gradients[A0]
        assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio)), "the direction stays"


def test_freeze_zeroes_what_matches_and_keeps_what_is_kept() -> None:
    changed, reported = run(freeze("q_proj", keep=["*.B"]), four())
    assert not changed[A0].any()
    assert not changed[A1].any()
    assert torch.equal(changed[B0], four()[B0])
    assert reported == {"frozen": 0.5}
    assert not run(freeze("layers.0.*"), four() | {A0: torch.full((2, 3), math.inf)})[0][A0].any(), "zero, even of infinity"
    with pytest.raises(UnknownNameError):
        run(freeze("nothing"), four())
    with pytest.raises(ConfigError, match="at least one"):
        freeze()


def test_masks_multiply_and_must_fit() -> None:
    keep = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.5]])
    changed, _ = run(mask({A0: keep}), four())
    assert torch.equal(changed[A0], four()[A0] * keep)
    assert torch.equal(changed[B0], four()[B0])
    for bad in ({"nowhere": keep}, {B0: keep}):
        with pytest.raises(ConfigError, match="The mask of"):
            run(mask(bad), four())


def test_noise_has_its_size_and_depends_on_seed_and_gradient_only() -> None:
    gradients = {"a": torch.zeros(200, 200)}
    first, reported = run(add_noise(0.3, seed=1), gradients)
    assert float(first["a"].std()) == pytest.approx(0.3, rel=0.02)
    assert abs(float(first["a"].mean())) < 0.01
    assert reported == {"noise_std": 0.3}
    assert torch.equal(first["a"], run(add_noise(0.3, seed=1), gradients)[0]["a"])
    assert not torch.equal(first["a"], run(add_noise(0.3, seed=2), gradients)[0]["a"])
    other = run(add_noise(0.3, seed=1), {"a": gradients["a"] + 1})[0]["a"] - 1
    assert not torch.allclose(first["a"], other, atol=1e-3)
    _, relative = run(add_noise(0.1, relative=True), {"a": torch.full((10,), 5.0), "b": torch.full((10,), 1.0)})
    assert relative["noise_std"] == pytest.approx(0.1 * math.sqrt(13))
    for bad in (0.0, -1.0, math.inf):
        with pytest.raises(ConfigError, match="positive number"):
            add_noise(bad)


@given(SEEDS, SEEDS)
def test_projection_ends_the_conflict_with_one_reference(seed: int, other: int) -> None:
    gradients, reference = four(seed), four(other)
    changed, reported = run(project(reference), gradients)
    conflict = float(flat(gradients) @ flat(reference)) < 0
    assert reported == {"projected": float(conflict)}
    if conflict:
        assert dot(changed, reference) == pytest.approx(0, abs=1e-3)
        assert dot(changed, changed) <= dot(gradients, gradients)
    else:
        assert all(torch.equal(changed[name], gradients[name]) for name in gradients)


def pcgrad_by_hand(first: Tensor, second: Tensor) -> Tensor:
    """Two tasks, where the order does not matter."""
    along = first @ second
    if along >= 0:
        return first + second
    return first - along / (second @ second) * second + second - along / (first @ first) * first


@given(SEEDS, SEEDS)
def test_pcgrad_of_two_tasks_is_the_published_formula(seed: int, other: int) -> None:
    gradients, task = four(seed), four(other)
    changed, reported = run(pcgrad(task), gradients)
    expected = pcgrad_by_hand(flat(gradients).double(), flat(task).double())
    assert torch.allclose(flat(changed).double(), expected, atol=1e-4)
    assert reported["conflicts"] in (0, 2)


def test_pcgrad_of_three_tasks_sums_where_nothing_conflicts() -> None:
    changed, reported = run(pcgrad(four(1), four(1)), four(1))
    assert torch.allclose(flat(changed), 3 * flat(four(1)))
    assert reported["conflicts"] == 0
    zero = {name: torch.zeros_like(tensor) for name, tensor in four().items()}
    assert torch.allclose(flat(run(pcgrad(zero), four(1))[0]), flat(four(1))), "a task without a gradient is no conflict"
    for empty in (pcgrad, project):
        with pytest.raises(ConfigError, match="expected at least one"):
            empty()


# --------------------------------------------------------------------------------------------------------------- chain
def test_a_chain_runs_in_order_on_what_came_before() -> None:
    def double(gradients: Gradients, report: Report) -> Gradients:
        report("doubled", 1)
        return {name: 2 * gradient for name, gradient in gradients.items()}

    changed, reported = run(chain(double, "norms", clip_layers(1.0, "all"), norms("all")), {"x.weight": torch.tensor([3.0])})
    assert reported == {"doubled": 1, "grad/norm/x": 6, "clipped": 1, "grad/norm/all": pytest.approx(1)}
    assert float(changed["x.weight"]) == pytest.approx(1)


def test_names_of_hooks_are_factories_and_each_is_fresh() -> None:
    assert {"cosine", "distribution", "flow", "health", "norms"} <= set(gradient_hooks.names())
    first, second = chain("cosine"), chain("cosine")
    run(first, four())
    assert run(second, four())[1] == {}, "a hook of another run remembers nothing of this one"
    assert run(first, four())[1]["grad/cosine/all"] == pytest.approx(1)
    with pytest.raises(UnknownNameError, match="Did you mean 'norms'"):
        chain("norm")
    with pytest.raises(ConfigError, match="no hooks"):
        chain()
    with pytest.raises(ConfigError, match="no gradient hook"):
        chain(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="by is 'row'"):
        norms("row")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="low < high"):
        distribution(2, 2)


# --------------------------------------------------------------------------------------------------------------- in a run
def test_what_hooks_report_is_in_the_metrics_of_the_run(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    hook = chain("norms", "distribution", "health", "cosine", noise_scale(4, 3))
    with Trainer(backend, CONFIG, folder=tmp_path / "run", hook=hook) as trainer:
        trainer.train(claims)
    rows = [row for row in read_lines(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    assert [("grad/cosine/all" in row, "grad/noise_trace" in row) for row in rows] == [(i > 0, i % 3 == 2) for i in range(6)]
    for row in rows:
        whole = math.hypot(*(float(str(value)) for name, value in row.items() if name.startswith("grad/norm/")))
        assert whole == pytest.approx(float(str(row["grad/global_norm"])), rel=1e-4)
        assert row["grad/health/not_finite"] == 0


def test_hooks_that_only_look_change_no_bit(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    def losses(name: str, hook: GradientHook | None) -> list[object]:
        with Trainer(backend, CONFIG, folder=tmp_path / name, hook=hook) as trainer:
            trainer.train(claims)
        return [row.get("train/loss") for row in read_lines(tmp_path / name / "metrics.jsonl")]

    look = chain("norms", "distribution", "flow", "health", "cosine", noise_scale(4, 2))
    assert losses("plain", None) == losses("looked", look)


def test_a_run_with_noise_resumes_to_the_same_bytes(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    hook = chain(add_noise(0.5, relative=True), "norms")
    with Trainer(backend, CONFIG, folder=tmp_path / "whole", hook=hook) as trainer:
        trainer.train(claims)
    with Trainer(backend, CONFIG, folder=tmp_path / "cut", hook=hook, callbacks=[lambda p: "stop" if p.step == 3 else None]) as trainer:
        trainer.train(claims)
    with Trainer(backend, CONFIG, folder=tmp_path / "cut", hook=chain(add_noise(0.5, relative=True), "norms"), resume=True) as trainer:
        trainer.train(claims)
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "cut" / "metrics.jsonl").read_bytes()


def test_frozen_layers_of_the_local_engine_do_not_move(claims: Dataset) -> None:
    torch.set_num_threads(1)
    config = dataclasses.replace(CONFIG, base_model="tiny", max_steps=2, max_length=512)
    seen: list[dict[str, Tensor]] = []

    def keep(gradients: Gradients, report: Report) -> Gradients:
        seen.append({name: gradient.clone() for name, gradient in gradients.items()})
        return gradients

    with connect("local") as engine, Trainer(engine, config, hook=chain(freeze("v_proj"), keep)) as trainer:
        trainer.train(claims)
    for name, gradient in seen[-1].items():
        assert bool(gradient.any()) == ("q_proj" in name), name


def test_a_hook_that_refuses_ends_training_with_its_error(backend: Backend, claims: Dataset) -> None:
    with Trainer(backend, CONFIG, hook=health(1e-9, 1e-6, fail_on=["exploding"])) as trainer, pytest.raises(NumericError, match="exploding"):
        trainer.train(claims)

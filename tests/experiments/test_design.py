"""The plan: arms, cells, hypotheses and TOML; a mistake is named with its nearest right word before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_framework.errors import ConfigError, UnknownNameError
from crucible_framework.experiments import BASE, Budget, DataPlan, Experiment, Hypothesis, experiment_from, load_experiment
from crucible_framework.experiments.arms import select
from crucible_framework.records import TrainConfig

TOML = """
name = "ranks"
seeds = [0, 1]
scorers = ["label_accuracy", "exact_match"]
primary = "label_accuracy"

[train]
base_model = "tiny"
max_steps = 5

[matrix]
lora.rank = [4, 8]
loss = ["cross_entropy", { cross_entropy = 0.8, kl = 0.2 }]

[conditions.warm]
warmup_steps = 2
[conditions.cold]

[data]
name = "minifact"
test_limit = 9

[[hypotheses]]
better = "lora.rank=8"
than = "lora.rank=4"

[budget]
hours = 0.5
"""


def test_toml_gives_the_matrix_of_arms(tmp_path: Path) -> None:
    (tmp_path / "exp.toml").write_text(TOML)
    experiment = load_experiment(tmp_path / "exp.toml", ["train.max_steps=7", "seeds=[3]"])
    arms = {arm.name: arm for arm in experiment.arms()}
    assert len(arms) == 8
    warm = arms["warm, lora.rank=8, loss=0.8*cross_entropy+0.2*kl"]
    assert (warm.config.warmup_steps, warm.config.lora.rank, warm.config.max_steps) == (2, 8, 7)
    assert warm.config.loss == {"cross_entropy": 0.8, "kl": 0.2}, "a mix replaces the loss and is not merged into another"
    assert arms["cold, lora.rank=4, loss=cross_entropy"].config.warmup_steps == 0
    assert [cell.seed for cell in experiment.cells()] == [3] * 8
    assert experiment.budget.hours == 0.5
    pairs = select(experiment.arms(), experiment.hypotheses[0])
    assert len(pairs) == 4
    assert all(b.replace("rank=8", "rank=4") == t for b, t in pairs), "pairs agree in everything but the axis"


@settings(max_examples=20)
@given(
    ranks=st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True),
    rates=st.lists(st.floats(1e-5, 1e-2).map(lambda x: float(f"{x:.3g}")), min_size=1, max_size=3, unique=True),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True),
)
def test_cells_are_the_product_and_each_has_its_own_steady_id(ranks: list[int], rates: list[float], seeds: list[int], labels: list[str]) -> None:
    def make() -> Experiment:
        data = tuple(DataPlan(label=label) for label in labels)
        return Experiment(name="x", matrix={"lora.rank": tuple(ranks), "adam.lr": tuple(rates)}, seeds=tuple(seeds), data=data)

    cells = make().cells()
    assert len(cells) == len(ranks) * len(rates) * len(seeds) * len(labels)
    assert len({cell.id for cell in cells}) == len(cells)
    assert [cell.id for cell in cells] == [cell.id for cell in make().cells()]
    assert {(cell.config.lora.rank, cell.config.adam.lr, cell.seed, cell.data) for cell in cells} == {
        (r, lr, s, d) for r in ranks for lr in rates for s in seeds for d in labels
    }
    for cell in cells:
        assert cell.config.seed == cell.config.lora.seed == cell.seed
        assert not set(cell.id) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-")
    assert len({cell.base for cell in cells}) == len(labels), "one base for each data set, whatever the arms"
    first = [cell.seed for cell in cells[: len(ranks) * len(rates) * len(labels)]]
    assert set(first) == {seeds[0]}, "seed by seed, so that a study that ends early is balanced"


def test_the_id_changes_with_what_decides_the_result_and_with_nothing_else() -> None:
    def identity(**changes: object) -> str:
        return Experiment(name="x", seeds=(0,), **changes).cells()[0].id  # type: ignore[arg-type]

    plain = identity()
    assert identity(train=TrainConfig(max_steps=7)) != plain
    assert identity(data=(DataPlan(test_limit=3),)) != plain
    assert identity(perplexity=True) != plain
    assert identity(budget=Budget(hours=1), retries=5, in_flight=2) == plain


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"matrix": {"lora.rnk": (1, 2)}}, "lora.rank"),
        ({"matrix": {"lora.rank": (4, 4)}}, "different"),
        ({"matrix": {"lora.rank": (0, 4)}}, "LoraConfig.rank is 0"),
        ({"matrix": {"loss.kl": (1,)}}, "'loss' holds no others"),
        ({"conditions": {"base": {}}}, "untrained"),
        ({"conditions": {"a": {"lora": {"alfa": 1}}}}, "lora.alpha"),
        ({"primary": "acuracy"}, "label_accuracy"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"seeds": ()}, "seeds"),
        ({"data": (DataPlan(), DataPlan(test_limit=3))}, "labels"),
        ({"alpha": 1.0}, "alpha"),
        ({"threads": 0}, "threads"),
        ({"name": " "}, "name"),
        ({"hypotheses": (Hypothesis(better="lora.rank=9"),), "matrix": {"lora.rank": (4, 8)}}, "lora.rank=8"),
        ({"hypotheses": (Hypothesis(better="adapter", than="adapter"),)}, "itself"),
        ({"hypotheses": (Hypothesis(better="adapter", metric="f1"),)}, "f1"),
        ({"hypotheses": (Hypothesis(better="lora.rank=4", than="loss=kl"),), "matrix": {"lora.rank": (4, 8), "loss": ("kl", "cross_entropy")}}, "pair up"),
    ],
)
def test_a_mistake_is_an_error_before_anything_runs(change: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        Experiment(**{"name": "x", **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"name": "x", "seedz": [1]}, "'seeds'"),
        ({"name": "x", "matrix": {"lora": {"rank": 8}}}, "list of values"),
        ({"name": "x", "matrix": 3}, "expected a table"),
        ({"name": "x", "train": {"max_step": 3}}, "max_steps"),
        ({}, "'name' is missing"),
        ({"name": "x", "budget": {"money": 3.0}}, "price"),
        ({"name": "x", "budget": {"hours": -1.0}}, "positive"),
    ],
)
def test_a_mistake_in_toml_names_the_key(tree: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        experiment_from(tree)


def test_backends_can_be_an_axis_and_base_can_be_on_either_side() -> None:
    experiment = Experiment(name="x", matrix={"backend": ("fake", "local")}, hypotheses=(Hypothesis(better=BASE, than="backend=fake"),))
    assert [arm.backend for arm in experiment.arms()] == ["fake", "local"]
    assert select(experiment.arms(), experiment.hypotheses[0]) == ((BASE, "backend=fake"),)
    assert len({cell.base for cell in experiment.cells()}) == 2, "each backend has its own base"


def test_an_experiment_without_a_matrix_has_one_arm() -> None:
    experiment = Experiment(name="x", hypotheses=(Hypothesis(better="adapter"),))
    assert [arm.name for arm in experiment.arms()] == ["adapter"]
    with pytest.raises(UnknownNameError, match="adapter"):
        Experiment(name="x", hypotheses=(Hypothesis(better="adaptor"),))


def test_axis_values_without_choice_are_not_in_the_names() -> None:
    assert Experiment(name="x", matrix={"lora.rank": (4,), "adam.lr": (1e-3, 1e-4)}).arms()[0].name == "adam.lr=0.001"

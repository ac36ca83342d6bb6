"""The registry finds a component by table row, decorator, entry point, "module:attribute", or takes the object itself."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from importlib.metadata import EntryPoint

import pytest

from crucible_framework import plugins
from crucible_framework.errors import ConfigError, UnknownNameError
from crucible_framework.plugins import Registry, load_attribute

Number = Callable[[float], float]


def numbers() -> Registry[Number]:
    return Registry("number function", {"root": "math:sqrt", "floor": "math:floor"})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another distribution offers `cosine` and one that does not import."""

    def entry_points(*, group: str) -> list[EntryPoint]:
        offered = {"cosine": "math:cos", "broken": "no_such_module_here:f"}
        return [EntryPoint(name, value, group) for name, value in offered.items()] if group == "crucible.number_function" else []

    monkeypatch.setattr(plugins, "entry_points", entry_points)


def test_table_row_is_imported_when_asked() -> None:
    registry = Registry[Number]("number function", {"root": "math:sqrt", "bad": "no_such_module_here:f"})
    assert registry.get("root") is math.sqrt
    assert registry.get("root") is math.sqrt
    with pytest.raises(ConfigError, match=r"'no_such_module_here:f' cannot be imported.*Expected 'module:attribute'"):
        registry.get("bad")


def test_decorator_registers_and_gives_the_function_back() -> None:
    registry = numbers()

    @registry.register("double")
    def double(x: float) -> float:
        return 2 * x

    assert double(2) == 4
    assert registry.get("double") is double
    assert registry.names() == ("double", "floor", "root")


@pytest.mark.usefixtures("installed")
def test_entry_point_of_another_distribution() -> None:
    registry = numbers()
    assert registry.group == "crucible.number_function"
    assert registry.names() == ("broken", "cosine", "floor", "root")
    assert registry.get("cosine") is math.cos
    with pytest.raises(ConfigError, match="cannot be imported"):
        registry.get("broken")


@pytest.mark.usefixtures("installed")
def test_table_wins_over_entry_points_of_other_groups_and_names() -> None:
    other = Registry[Number]("loss", {})
    with pytest.raises(UnknownNameError):
        other.get("cosine")


def test_module_and_attribute_without_registration_leaves_no_name_behind() -> None:
    registry = numbers()
    assert registry.get("math:exp") is math.exp
    assert registry.names() == ("floor", "root")


def test_object_is_given_back_as_it_is() -> None:
    assert numbers().get(math.log) is math.log


def test_unknown_name_says_the_nearest_and_how_to_bring_ones_own() -> None:
    with pytest.raises(UnknownNameError) as caught:
        numbers().get("rot")
    assert str(caught.value) == "No number function is called 'rot'. Did you mean 'root'? Known: floor, root. Your own: 'module:attribute'."


def test_a_taken_name_is_refused_and_the_first_stays() -> None:
    registry = numbers()
    registry.add("exp", math.exp)
    assert registry.add("exp", math.exp) is math.exp
    for name in ("exp", "root"):
        with pytest.raises(ConfigError, match=f"called {name!r} exists already"):
            registry.add(name, math.log)
    assert registry.get("exp") is math.exp


def test_load_attribute_walks_dotted_attributes() -> None:
    assert load_attribute("collections:OrderedDict.move_to_end") is OrderedDict.move_to_end


@pytest.mark.parametrize("path", ["math", "math:", ":sqrt", "", ".relative:sqrt"])
def test_load_attribute_refuses_other_forms(path: str) -> None:
    with pytest.raises(ConfigError, match="expected 'module:attribute'"):
        load_attribute(path)


def test_load_attribute_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="module 'math' has no 'squirt'"):
        load_attribute("math:squirt")

"""The error tree: classes, exit codes, nearest names, and that errors survive the way between processes."""

from __future__ import annotations

import pickle

import pytest

from crucible_framework import errors
from crucible_framework.errors import CrucibleError, NumericError, ServiceError, UnknownNameError

TREE: dict[str, tuple[int, tuple[type[BaseException], ...]]] = {
    "CrucibleError": (70, (Exception,)),
    "ConfigError": (2, (errors.CrucibleError, ValueError)),
    "UnknownNameError": (2, (errors.ConfigError, LookupError)),
    "DataError": (65, (errors.CrucibleError, ValueError)),
    "FormatError": (65, (errors.DataError,)),
    "ChecksumError": (65, (errors.DataError,)),
    "BackendError": (70, (errors.CrucibleError, RuntimeError)),
    "CapabilityError": (2, (errors.BackendError, NotImplementedError)),
    "SessionClosedError": (70, (errors.BackendError,)),
    "ServiceError": (69, (errors.BackendError,)),
    "AuthError": (77, (errors.BackendError,)),
    "NumericError": (76, (errors.BackendError,)),
    "StoreError": (74, (errors.CrucibleError, RuntimeError)),
    "NotFoundError": (2, (errors.StoreError, LookupError)),
    "CorruptError": (74, (errors.StoreError,)),
    "LockedError": (75, (errors.StoreError,)),
    "StorageFullError": (74, (errors.StoreError,)),
    "InferenceError": (70, (errors.CrucibleError,)),
    "AllMembersFailedError": (70, (errors.InferenceError,)),
    "NoConsensusError": (70, (errors.InferenceError,)),
    "StatisticsError": (65, (errors.CrucibleError, ValueError)),
    "TooFewError": (65, (errors.StatisticsError,)),
    "ExperimentError": (70, (errors.CrucibleError, RuntimeError)),
    "BudgetExceeded": (75, (errors.ExperimentError,)),
    "PlanChangedError": (2, (errors.ExperimentError,)),
    "UnsafeError": (78, (errors.CrucibleError, RuntimeError)),
}


def build(name: str) -> CrucibleError:
    cls: type[CrucibleError] = getattr(errors, name)
    if issubclass(cls, UnknownNameError):
        return cls("loss", "klx", ["kl", "mse"], fix="Your own: 'module:attribute'.")
    if issubclass(cls, ServiceError):
        return cls("the service is away", status=503, retryable=True)
    if issubclass(cls, NumericError):
        return cls("the loss is NaN", tensor="lora_A", examples=("a", "b"))
    return cls("something happened")


def test_the_tree_lists_every_class() -> None:
    assert set(TREE) == set(errors.__all__)


@pytest.mark.parametrize("name", sorted(TREE))
def test_class_has_its_parents_and_exit_code(name: str) -> None:
    code, parents = TREE[name]
    cls = getattr(errors, name)
    assert cls.exit_code == code
    assert all(issubclass(cls, parent) for parent in parents)


@pytest.mark.parametrize("name", sorted(TREE))
def test_every_error_pickles_whole(name: str) -> None:
    error = build(name)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_head_of_the_file_draws_every_class() -> None:
    drawing = errors.__doc__ or ""
    assert [name for name in errors.__all__ if name not in drawing] == []


def test_unknown_name_names_the_nearest_first() -> None:
    error = UnknownNameError("loss", "cross_entropi", ["mse", "kl", "cross_entropy"])
    assert str(error) == "No loss is called 'cross_entropi'. Did you mean 'cross_entropy'? Known: cross_entropy, kl, mse."
    assert (error.kind, error.name, error.known) == ("loss", "cross_entropi", ("cross_entropy", "kl", "mse"))


def test_unknown_name_names_several_and_the_fix() -> None:
    text = str(UnknownNameError("split", "tst", ["test", "tests", "train"], fix="Pass split='test'."))
    assert "Did you mean 'test' or 'tests'" in text
    assert text.endswith("Pass split='test'.")


def test_unknown_name_far_from_all_gives_no_hint() -> None:
    assert str(UnknownNameError("loss", "zzz", ["kl"])) == "No loss is called 'zzz'. Known: kl."


def test_unknown_name_without_known_names() -> None:
    assert str(UnknownNameError("run", "first", [])) == "No run is called 'first'."


def test_service_error_defaults() -> None:
    error = ServiceError("away")
    assert (error.status, error.retryable) == (None, False)

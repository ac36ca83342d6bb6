"""Settings go from TOML and flags to records and back without loss; mistakes are named with their key and the nearest one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.config import differing_keys, fingerprint, from_dict, load_toml, merge, parse_overrides, places, to_dict
from crucible_framework.errors import ConfigError
from crucible_framework.records import AdamConfig, Example, Json, LoraConfig, Message, TrainConfig

names = st.text("abcdefghij_", min_size=1, max_size=8)
whole = st.integers(1, 10**6)
configs = st.builds(
    TrainConfig,
    base_model=names,
    lora=st.builds(
        LoraConfig,
        rank=whole,
        alpha=st.floats(1e-3, 1e6),
        dropout=st.floats(0, 1, exclude_max=True),
        target_modules=st.lists(names, min_size=1, max_size=4).map(tuple),
        seed=st.integers(0, 2**63 - 1),
    ),
    adam=st.builds(AdamConfig, lr=st.floats(0, 1), max_grad_norm=st.none() | st.floats(1e-6, 1e6), weight_decay=st.floats(0, 1)),
    loss=names | st.dictionaries(names, st.floats(-10, 10), min_size=1, max_size=3),
    batch_size=whole,
    epochs=st.none() | whole,
    warmup_steps=st.integers(0, 100),
    final_lr_ratio=st.floats(0, 1),
    batching=st.sampled_from(["shuffle", "length", "prefix", "pack"]),
    seed=st.integers(0, 2**32),
)


def as_dict(value: object) -> dict[str, Json]:
    tree = to_dict(value)
    assert isinstance(tree, dict)
    return tree


@given(config=configs)
def test_a_training_configuration_survives_the_round_trip(config: TrainConfig) -> None:
    copy = from_dict(TrainConfig, as_dict(config))
    assert copy == config
    assert fingerprint(copy) == fingerprint(config)
    assert differing_keys(as_dict(config), as_dict(copy)) == ()


def test_to_dict_gives_plain_values_only() -> None:
    example = Example(id="a", prompt=(Message(role="user", content="hi"),), target="t", meta={"n": [1, {"x": None}]})
    assert to_dict(example) == {"id": "a", "prompt": [{"role": "user", "content": "hi"}], "target": "t", "meta": {"n": [1, {"x": None}]}}
    assert to_dict(Path("a") / "b") == str(Path("a/b"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"lora": {"rnk": 8}}, "Unknown key 'lora.rnk'. Did you mean 'lora.rank'?"),
        ({"batchsize": 8}, "Unknown key 'batchsize'. Did you mean 'batch_size'?"),
        ({"zzzz": 8}, "Unknown key 'zzzz'. Known: accumulate, adam,"),
        ({"lora": {"rank": "eight"}}, "'lora.rank' is 'eight'; input should be a valid integer"),
        ({"lora": {"rank": 1.5}}, "'lora.rank' is 1.5"),
        ({"lora": 5}, "'lora' is 5"),
        ({"lora": {"target_modules": "q_proj"}}, "'lora.target_modules' is 'q_proj'"),
        ({"lora": {"target_modules": ["q_proj", 3]}}, "'lora.target_modules.1' is 3"),
        ({"loss": 5}, "'loss' is 5"),
        ({"batching": "random"}, "'batching' is 'random'; input should be 'shuffle', 'length', 'prefix' or 'pack'"),
        ({"lora": {"rank": 0}}, "LoraConfig.rank is 0; expected a whole number of at least 1"),
        ({"adam": {"lr": -1}}, "AdamConfig.lr is -1"),
    ],
)
def test_mistake_is_named_with_its_key(data: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, data)
    assert words in str(caught.value)


def test_unknown_key_close_to_none_gives_no_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(LoraConfig, {"zzzz": 1})
    assert "Did you mean" not in str(caught.value)


def test_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="'content' is missing; Message needs it"):
        from_dict(Message, {"role": "user"})


def test_value_that_is_no_record_at_all() -> None:
    assert from_dict(TrainConfig, {"lora": LoraConfig(rank=3)}).lora.rank == 3


def test_overrides_are_toml_where_they_parse_and_text_otherwise() -> None:
    items = ["lora.rank=8", "lora.dropout=0.1", "loss=kl", 'base_model="a=b"', "x.y.z=[1, 2]", "flag=true", "path=./a=b", "empty="]
    assert parse_overrides(items) == {
        "lora": {"rank": 8, "dropout": 0.1},
        "loss": "kl",
        "base_model": "a=b",
        "x": {"y": {"z": [1, 2]}},
        "flag": True,
        "path": "./a=b",
        "empty": "",
    }


@given(rank=whole, lr=st.floats(1e-9, 1))
def test_overrides_reach_the_record(rank: int, lr: float) -> None:
    config = from_dict(TrainConfig, parse_overrides([f"lora.rank={rank}", f"adam.lr={lr!r}"]))
    assert (config.lora.rank, config.adam.lr) == (rank, lr)


@pytest.mark.parametrize("item", ["lora.rank", "=8", " =8"])
def test_override_without_key_or_value(item: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value, for example lora"):
        parse_overrides([item])


def test_override_below_a_plain_value() -> None:
    with pytest.raises(ConfigError, match=r"'lora\.rank=8': 'lora' was set to a value before"):
        parse_overrides(["lora=1", "lora.rank=8"])


def test_merge_replaces_values_and_merges_tables() -> None:
    base: dict[str, object] = {"a": 1, "t": {"x": 1, "y": {"z": 1}}, "u": {"v": 1}}
    assert merge(base, {"a": 2, "t": {"y": {"w": 2}}, "u": 3, "n": {"m": 1}}) == {"a": 2, "t": {"x": 1, "y": {"z": 1, "w": 2}}, "u": 3, "n": {"m": 1}}
    assert base == {"a": 1, "t": {"x": 1, "y": {"z": 1}}, "u": {"v": 1}}
    assert merge({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}


def test_toml_file_with_overrides_becomes_a_record(tmp_path: Path) -> None:
    path = tmp_path / "exp.toml"
    path.write_text('base_model = "tiny"\n[lora]\nrank = 4\ntarget_modules = ["q_proj"]\n[loss]\nkl = 0.2\n', encoding="utf-8")
    config = from_dict(TrainConfig, merge(load_toml(path), parse_overrides(["lora.rank=8"])))
    assert config == TrainConfig(base_model="tiny", lora=LoraConfig(rank=8, target_modules=("q_proj",)), loss={"kl": 0.2})


def _missing(folder: Path) -> Path:
    return folder / "none.toml"


def _broken(folder: Path) -> Path:
    (path := folder / "broken.toml").write_text("a = 1\nb = [", encoding="utf-8")
    return path


def _latin(folder: Path) -> Path:
    (path := folder / "latin.toml").write_bytes(b'a = "\xe4"')
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_missing, "There is no configuration file"),
        (_broken, "not valid TOML"),
        (_latin, "not valid TOML"),
        (lambda folder: folder, "Cannot read the configuration"),
    ],
)
def test_file_that_cannot_be_used_is_named(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    path = make(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_toml(path)
    assert words in str(caught.value)
    assert path.name in str(caught.value)


def test_broken_toml_gives_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 2|end of document"):
        load_toml(_broken(tmp_path))


def test_fingerprint_tells_settings_apart_and_not_how_they_were_written() -> None:
    assert fingerprint(LoraConfig(alpha=32)) == fingerprint(LoraConfig(alpha=32.0)) == fingerprint(from_dict(LoraConfig, {"alpha": 32}))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": True})
    assert fingerprint({"a": 2.0**53}) != fingerprint({"a": 2**53 + 1})
    assert len({fingerprint(TrainConfig(seed=seed)) for seed in range(5)}) == 5
    assert len(fingerprint(TrainConfig())) == 64


def test_fingerprint_is_the_same_in_every_process() -> None:
    code = (
        "from crucible_framework.config import fingerprint\nfrom crucible_framework.records import TrainConfig\n"
        "print(fingerprint(TrainConfig(loss={'kl': 0.2, 'cross_entropy': 0.8}, epochs=2)))"
    )
    texts = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout.strip()
        for seed in ("0", "1")
    }
    assert texts == {fingerprint(TrainConfig(loss={"cross_entropy": 0.8, "kl": 0.2}, epochs=2))}


def test_differing_keys_are_dotted_and_sorted() -> None:
    old = as_dict(TrainConfig(loss={"kl": 0.2}))
    new = as_dict(TrainConfig(loss={"kl": 0.3, "mse": 1.0}, lora=LoraConfig(rank=8, target_modules=("o_proj",)), seed=1))
    assert differing_keys(old, new) == ("lora.rank", "lora.target_modules", "loss.kl", "loss.mse", "seed")
    assert differing_keys(old, old) == ()
    assert differing_keys({"loss": "kl"}, {"loss": {"kl": 1.0}}) == ("loss",)


def test_places_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CRUCIBLE_CACHE", "CRUCIBLE_DATA", "CRUCIBLE_RUNS", "CRUCIBLE_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    found = places()
    assert (found.cache, found.data, found.runs, found.offline) == (tmp_path / "xdg" / "crucible", None, Path("runs"), False)
    monkeypatch.setenv("CRUCIBLE_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path / "d"))
    monkeypatch.setenv("CRUCIBLE_RUNS", str(tmp_path / "r"))
    found = places()
    assert (found.cache, found.data, found.runs) == (tmp_path / "c", tmp_path / "d", tmp_path / "r")


def test_cache_without_settings_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CRUCIBLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert places().cache == tmp_path / ".cache" / "crucible"


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "CRUCIBLE_OFFLINE"])
@pytest.mark.parametrize(("value", "offline"), [("1", True), ("TRUE", True), ("yes", True), ("on", True), ("0", False), ("", False), ("no", False)])
def test_offline_by_either_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str, offline: bool) -> None:
    for other in ("HF_HUB_OFFLINE", "CRUCIBLE_OFFLINE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    assert places().offline is offline

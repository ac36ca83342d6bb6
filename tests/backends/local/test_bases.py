"""Finding and loading base models: names, folders, the hub; and clear refusals of what is broken, foreign or too large."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crucible_framework import events, files
from crucible_framework.backends.local import bases, loading, sizes
from crucible_framework.backends.local.skeleton import Skeleton
from crucible_framework.errors import AuthError, BackendError, ConfigError, CorruptError, ServiceError, UnknownNameError
from crucible_framework.files import publish

from .models_for_tests import make_qwen, make_tokenizer, save_model


def load(name: str | Path, tmp_path: Path) -> bases.Base:
    return bases.load_base(str(name), cache=tmp_path / "cache", dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def folder(qwen: Path, tmp_path: Path) -> Path:
    """A copy of the small model that may be damaged."""
    return Path(shutil.copytree(qwen, tmp_path / "copy"))


# --------------------------------------------------------------------------------------------------------------- names
def test_tiny_is_the_same_every_time_and_draws_nothing(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    one, two = loading.tiny_model(), loading.tiny_model()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    base = load("tiny", tmp_path)
    assert (len(base.layers), base.head, base.context, base.vocab_size) == (15, "lm_head", 2048, 261)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_aliases_and_folders_have_one_name(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bases.canonical("HuggingFaceTB/SmolLM2-135M-Instruct") == bases.canonical("smollm2-135m") == "smollm2-135m"
    monkeypatch.chdir(qwen.parent)
    assert bases.canonical("./model") == bases.canonical(str(qwen)) == str(qwen)
    assert bases.canonical("some/model") == "some/model"


@pytest.mark.parametrize(
    ("name", "message"), [("tny", "Did you mean 'tiny'"), ("smollm2-135", "Did you mean 'smollm2-135m'"), ("gpt", "Known: smollm2-135m, tiny")]
)
def test_unknown_names(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=message):
        load(name, tmp_path)


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "~/nothing-here", "a/b/c"])
def test_no_such_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no model folder"):
        load(name, tmp_path)


# ------------------------------------------------------------------------------------------------------------- folders
def test_a_folder_is_loaded_as_transformers_does(qwen: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with events.collect() as seen:
        base = load(qwen, tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(str(qwen), dtype=torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(base.logits(base.hidden(ids)), expected)
    assert (base.context, base.vocab_size, base.source) == (128, 320, str(qwen))
    assert [event["name"] for event in seen if not str(event["name"]).startswith("native.")] == ["model.loaded"]


def test_several_files_and_an_index(tmp_path: Path, qwen: Path) -> None:
    from transformers import AutoModelForCausalLM

    split = tmp_path / "split"
    AutoModelForCausalLM.from_pretrained(str(qwen)).save_pretrained(str(split), max_shard_size="40KB")
    make_tokenizer(split)
    assert len(list(split.glob("*.safetensors"))) > 1
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(split, tmp_path).hidden(ids), load(qwen, tmp_path).hidden(ids))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _reshaped(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), ConfigError, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), CorruptError, "is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ConfigError, "cannot build the model"),
        (_config(model_type="martian"), ConfigError, r"cannot build the model .* \(model_type 'martian'\)"),
        (_config(hidden_size="wide"), Exception, "model"),
        (_to_pickle, CorruptError, "holds no .safetensors file.* pickled weights are never read"),
        (lambda f: _cut(f / "model.safetensors"), CorruptError, r"has \d+ bytes; its header says \d+"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x01\x02"), CorruptError, "no valid safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x04" + bytes(7) + b"null"), CorruptError, "no valid safetensors file"),
        (_without("model.norm.weight"), CorruptError, "lack 1 tensors, first 'model.norm.weight'"),
        (_reshaped, CorruptError, "Download the model again"),
        (lambda f: (f / "tokenizer.json").write_text("{"), CorruptError, "tokenizer"),
    ],
    ids=["no config", "bad config", "list", "type", "size", "pickle", "cut", "garbage", "null", "missing tensor", "shape", "tokenizer"],
)
def test_damaged_folders(folder: Path, tmp_path: Path, damage: Callable[[Path], object], error: type[Exception], message: str) -> None:
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        load(folder, tmp_path).tokenizer.encode("x")
    assert isinstance(caught.value, (ConfigError, CorruptError))
    assert "\n" not in str(caught.value)


def test_a_manifest_is_checked(qwen: Path, tmp_path: Path) -> None:
    published = tmp_path / "published"
    publish(published, lambda target: shutil.copytree(qwen, target, dirs_exist_ok=True))
    assert load(published, tmp_path).vocab_size == 320
    path = published / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(CorruptError, match=r"is damaged: .* Delete that folder"):
        load(published, tmp_path)


def test_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: ...\nclass Config: ...\n")
    _config(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(folder)
    with pytest.raises(ConfigError, match="code in the folder is not run"):
        load(folder, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_too_large_for_the_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "available_bytes", lambda: 1000)
    with pytest.raises(BackendError, match=r"needs 0\.0 GiB for its weights; 0\.0 GiB of memory are free"):
        load(folder, tmp_path)
    monkeypatch.setattr(sizes, "available_bytes", lambda: None)
    assert load(folder, tmp_path).context == 128


def test_memory_is_read_where_the_system_tells() -> None:
    found = sizes.available_bytes()
    assert found is None or found > 2**20


# ------------------------------------------------------------------------------------------------------- architectures
def test_logits_changed_after_the_head_are_refused(tmp_path: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, logit_scale=0.25, max_position_embeddings=64,
    )  # fmt: skip
    folder = save_model(tmp_path / "cohere", CohereForCausalLM(config), 0)
    with pytest.raises(ConfigError, match="changes its logits after the output layer"):
        load(folder, tmp_path)


def test_models_without_a_plain_cache_are_refused(tmp_path: Path) -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=48, state_size=4, num_hidden_layers=1))
    hybrid = Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            layer_types=["conv", "full_attention"], max_position_embeddings=64,
        )
    )  # fmt: skip
    for name, model, message in (("mamba", mamba, "cannot build the model"), ("lfm2", hybrid, "does not run with a key-value cache")):
        with pytest.raises(ConfigError, match=message):
            load(save_model(tmp_path / name, model, 0), tmp_path)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=320, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    folder = save_model(tmp_path / "bert", BertModel(config), 0)
    with pytest.raises((ConfigError, CorruptError), match=r"Expected|Use|again"):
        load(folder, tmp_path)


def test_untied_and_wide_embeddings(tmp_path: Path) -> None:
    base = load(make_qwen(tmp_path / "wide", vocab_size=400, tie_word_embeddings=False), tmp_path)
    assert base.vocab_size == 400
    assert base.tokenizer.vocab_size < 400


# ----------------------------------------------------------------------------------------------------------------- hub
def test_the_hub_is_not_asked_offline(tmp_path: Path) -> None:
    message = r"'meta-llama/Llama-3.1-8B' is not in the Hugging Face cache, and offline mode is on .* accept its licence .*Works offline: 'smollm2-135m'"
    with pytest.raises(ServiceError, match=message) as caught:
        load("meta-llama/Llama-3.1-8B", tmp_path)
    assert not caught.value.retryable
    with pytest.raises(ServiceError, match="offline mode is on"):
        bases.load_tokenizer("meta-llama/Llama-3.1-8B", cache=tmp_path)


class Hub:
    """Stands in for the hub's client: what its two calls do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, info: Callable[[], object], snapshot: Callable[..., str]) -> None:
        import huggingface_hub

        for name in ("HF_HUB_OFFLINE", "CRUCIBLE_OFFLINE"):
            monkeypatch.delenv(name, raising=False)

        class Api:
            def model_info(self, _name: str, timeout: float) -> object:
                assert timeout <= 10
                return info()

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)


class ConnectError(Exception):
    """What a transport raises."""


def raising(error: Exception) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise error

    return call


def http_error(kind: str, status: int) -> Exception:
    import huggingface_hub.errors as hub

    response = SimpleNamespace(status_code=status, headers={}, request=None)
    found: Exception = getattr(hub, kind)("refused", response=response)
    return found


@pytest.mark.parametrize(
    ("kind", "status", "error", "message"),
    [
        ("GatedRepoError", 403, AuthError, "it is gated and this account has no access"),
        ("RepositoryNotFoundError", 404, ConfigError, "has no model 'some/model'"),
        ("HfHubHTTPError", 401, AuthError, "with HTTP 401"),
        ("HfHubHTTPError", 503, ServiceError, "The hub answered HTTP 503"),
    ],
)
@pytest.mark.parametrize("where", ["info", "snapshot"])
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, kind: str, status: int, error: type[Exception], message: str
) -> None:
    fail = raising(http_error(kind, status))
    Hub(monkeypatch, fail if where == "info" else lambda: SimpleNamespace(safetensors=None), fail)
    with pytest.raises(error, match=message):
        load("some/model", tmp_path)


def test_the_cache_is_used_where_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, qwen: Path) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[object] = []

    def snapshot(_name: str, *, local_files_only: bool, **_: object) -> str:
        asked.append(local_files_only)
        return str(qwen)

    Hub(monkeypatch, raising(ConnectError("no route")), snapshot)
    assert load("some/model", tmp_path).name == "some/model"
    assert asked == [True]
    Hub(monkeypatch, raising(ConnectError("no route")), raising(LocalEntryNotFoundError("none")))
    with pytest.raises(ServiceError, match=r"and the hub cannot be reached \(ConnectError\)") as caught:
        load("some/model", tmp_path)
    assert caught.value.retryable


def test_a_hub_model_is_downloaded_and_its_size_checked_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, qwen: Path) -> None:
    patterns: list[list[str]] = []

    def snapshot(_name: str, *, allow_patterns: list[str], local_files_only: bool, **_: object) -> str:
        assert not local_files_only
        patterns.append(allow_patterns)
        return str(qwen)

    Hub(monkeypatch, lambda: SimpleNamespace(safetensors=SimpleNamespace(parameters={"BF16": 10**13})), snapshot)
    with pytest.raises(BackendError, match=r"'some/model' needs 37252\.9 GiB"):
        load("some/model", tmp_path)
    assert not patterns
    Hub(monkeypatch, lambda: SimpleNamespace(safetensors=SimpleNamespace(parameters={"BF16": 1000})), snapshot)
    assert load("some/model", tmp_path).source == "some/model"
    assert bases.load_tokenizer("some/model", cache=tmp_path).encode("x")
    assert ["*.safetensors" in found for found in patterns] == [True, False]
    assert not any(".bin" in pattern or ".py" in pattern for found in patterns for pattern in found)


# ------------------------------------------------------------------------------------------------------------ skeletons
def test_tiny_has_the_same_weights_with_and_without_modules() -> None:
    bare, modules = loading.tiny_model(modules=False), loading.tiny_model()
    assert [name for name, _ in bare.named_parameters()] == [name for name, _ in modules.named_parameters()]
    assert all(torch.equal(one, other) for one, other in zip(bare.parameters(), modules.parameters(), strict=True))
    places = torch.arange(9)[None]
    for ours, theirs in zip(*(model.get_submodule("model.rotary_emb")(torch.zeros(1), places) for model in (bare, modules)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "bare"),
    [
        ({}, True),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, False),
        ({"hidden_act": "gelu"}, False),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, False),
    ],
    ids=["plain", "scaled positions", "gelu", "window"],
)
def test_what_is_unusual_is_loaded_by_transformers(changes: dict[str, Any], bare: bool, tmp_path: Path) -> None:
    base = load(make_qwen(tmp_path / "model", **changes), tmp_path)
    assert isinstance(base.model, Skeleton) is bare


def test_a_folder_of_our_cache_is_compared_with_its_manifest_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    publish(kept, lambda target: shutil.copytree(folder, target, dirs_exist_ok=True))
    compared = list[Path]()

    def verify(path: Path) -> object:
        compared.append(path)
        return files.verify(path)

    monkeypatch.setattr(loading, "verify", verify)
    for _ in range(3):
        loading.read_folder(kept, "kept", torch.float32, cache=tmp_path, ours=True)
    assert compared == [kept]
    loading.read_folder(kept, "kept", torch.float32, cache=tmp_path, ours=False)
    assert compared == [kept, kept]
    weights = kept / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CorruptError, match="Delete that folder: it is made again"):
        loading.read_folder(kept, "kept", torch.float32, cache=tmp_path, ours=True)

"""What is exported answers as the sampler does: in PEFT, in transformers, and in llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crucible_framework import events, files
from crucible_framework.backends.local import LocalBackend
from crucible_framework.backends.local.export import Format, Precision, export_checkpoint
from crucible_framework.errors import CapabilityError, ConfigError, CorruptError, NotFoundError
from crucible_framework.records import AdamConfig, Checkpoint, LoraConfig, SamplingParams

from .models_for_tests import CE, VOCAB, batch, make_qwen, save_model

PROMPT = (5, 99, 17, 200, 42, 7)
PARAMS = SamplingParams(max_tokens=24, temperature=0.0)
SHORT = 3
"""Tokens that are compared with llama.cpp, whose kernels differ in the last bits: random weights come to near ties later on."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with grouped heads and a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    return save_model(tmp_path_factory.mktemp("llama") / "model", LlamaForCausalLM(LlamaConfig(**settings)), 5)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3: norms on queries and keys, heads wider than the model would make them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "max_position_embeddings": 128, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    return save_model(tmp_path_factory.mktemp("qwen3") / "model", Qwen3ForCausalLM(Qwen3Config(**settings)), 6)


CASES = [
    ("tiny", ("q_proj", "v_proj")),
    ("qwen", ("all-linear",)),
    ("qwen", ("down_proj", "lm_head")),
    ("llama", ("all-linear",)),
    ("qwen3", ("q_proj", "k_proj", "lm_head")),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1][-1]}")
def trained(request: pytest.FixtureRequest, shared: LocalBackend, tmp_path: Path) -> tuple[Checkpoint, tuple[int, ...]]:
    """A trained checkpoint with its files, and the greedy answer of its sampler."""
    name, targets = request.param
    base = "tiny" if name == "tiny" else str(request.getfixturevalue(name))
    session = shared.train(base, LoraConfig(rank=4, alpha=10.0, dropout=0.0, target_modules=targets, seed=7))
    for seed in range(4):
        session.forward_backward(batch(9, 12, seed=seed, weighted=None), CE)
        session.optim_step(AdamConfig(lr=0.1))
    made = shared.download(session.save("trained", "sampler").result(), tmp_path / "adapter")
    answer = session.sampler().sample(PROMPT, PARAMS).result()[0].tokens
    assert len(set(answer)) > 1
    plain = shared.sampler(base).sample(PROMPT, PARAMS).result()[0].tokens
    assert answer != plain, "the adapter must change the answer, or nothing is tested"
    session.close()
    return made, answer


def in_transformers(folder: Path, length: int) -> tuple[int, ...]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(length):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(PROMPT) :])


LLAMA_CPP = """
import json, sys
import xllamacpp
model, adapter, prompts, length = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup, params.fit_params = model, 128, 1, 1, False, False
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it computes in 16 bits
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if adapter:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
server = xllamacpp.Server(params)
for prompt in prompts:
    answer = server.handle_completions({"prompt": prompt, "n_predict": length, "temperature": 0.0, "logprobs": 1, "cache_prompt": False})
    print(json.dumps([token["id"] for token in answer["choices"][0]["logprobs"]["content"]]))
"""


def in_llama_cpp(model: Path, *prompts: str | tuple[int, ...], length: int, adapter: Path | None = None) -> list[tuple[int, ...]]:
    """Greedy token ids of llama.cpp itself, in a process of its own: what it does not like ends the process."""
    pytest.importorskip("xllamacpp")
    asked = json.dumps([str(model), str(adapter or ""), prompts, length])
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP, asked], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_a_merged_model_answers_as_the_sampler(trained: tuple[Checkpoint, tuple[int, ...]], shared: LocalBackend, tmp_path: Path) -> None:
    checkpoint, answer = trained
    with events.collect() as seen:
        folder = export_checkpoint(checkpoint, tmp_path / "merged")
    assert in_transformers(folder, len(answer)) == answer
    assert shared.sampler(str(folder)).sample(PROMPT, PARAMS).result()[0].tokens == answer
    files.verify(folder)
    exported = [event for event in seen if event["name"] == "model.exported"]
    assert [(event["format"], event["precision"]) for event in exported] == [("merged", "float32")]
    base = shared.tokenizer(checkpoint.base_model)
    assert shared.tokenizer(str(folder)).encode("<|im_start|>user ünïcode 123") == base.encode("<|im_start|>user ünïcode 123")


def test_gguf_answers_as_the_sampler(trained: tuple[Checkpoint, tuple[int, ...]], tmp_path: Path) -> None:
    checkpoint, answer = trained
    if checkpoint.base_model == "tiny":
        with pytest.raises(CapabilityError, match="bytes"):
            export_checkpoint(checkpoint, tmp_path / "model.gguf", "gguf")
        return
    path = export_checkpoint(checkpoint, tmp_path / "model.gguf", "gguf")
    assert in_llama_cpp(path, PROMPT, length=SHORT) == [answer[:SHORT]]


def test_a_gguf_adapter_changes_its_base_in_the_same_way(shared: LocalBackend, llama: Path, tmp_path: Path) -> None:
    session = shared.train(str(llama), LoraConfig(rank=4, alpha=10.0, dropout=0.0, target_modules=("all-linear",)))
    plain = shared.download(session.save("plain", "sampler").result(), tmp_path / "plain")
    for seed in range(4):
        session.forward_backward(batch(9, 12, seed=seed, weighted=None), CE)
        session.optim_step(AdamConfig(lr=0.1))
    made = shared.download(session.save("trained", "sampler").result(), tmp_path / "trained")
    answer = session.sampler().sample(PROMPT, PARAMS).result()[0].tokens
    session.close()
    base = export_checkpoint(plain, tmp_path / "base.gguf", "gguf")
    adapter = export_checkpoint(made, tmp_path / "adapter.gguf", "gguf-adapter")
    assert in_llama_cpp(base, PROMPT, length=SHORT, adapter=adapter) == [answer[:SHORT]]
    assert in_llama_cpp(base, PROMPT, length=SHORT) != [answer[:SHORT]]


def test_a_trained_head_is_separated_from_the_embedding(shared: LocalBackend, qwen: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    session = shared.train(str(qwen), LoraConfig(rank=2, dropout=0.0, target_modules=("lm_head",)))
    session.forward_backward(batch(9), CE)
    session.optim_step(AdamConfig(lr=0.1))
    made = shared.download(session.save("head", "sampler").result(), tmp_path / "adapter")
    session.close()
    folder = export_checkpoint(made, tmp_path / "merged")
    merged, before = load_file(folder / "model.safetensors"), load_file(qwen / "model.safetensors")
    assert files.read_json(folder / "config.json")["tie_word_embeddings"] is False  # type: ignore[call-overload, index]
    assert torch.equal(merged["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    with pytest.raises(CapabilityError, match="shares its output layer"):
        export_checkpoint(made, tmp_path / "adapter.gguf", "gguf-adapter")


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "q8_0"])
def test_smaller_numbers_stay_near(shared: LocalBackend, llama: Path, tmp_path: Path, precision: Precision) -> None:
    gguf = pytest.importorskip("gguf")
    session = shared.train(str(llama), LoraConfig(rank=2, target_modules=("q_proj",)))
    made = shared.download(session.save("plain", "sampler").result(), tmp_path / "adapter")
    session.close()
    whole = export_checkpoint(made, tmp_path / "whole.gguf", "gguf")
    small = export_checkpoint(made, tmp_path / "small.gguf", "gguf", precision=precision)
    assert small.stat().st_size < 0.8 * whole.stat().st_size
    for one, other in zip(gguf.GGUFReader(whole).tensors, gguf.GGUFReader(small).tensors, strict=True):
        near = gguf.quants.dequantize(other.data, other.tensor_type)
        assert one.name == other.name
        assert np.abs(near - one.data).max() <= 0.02 * np.abs(one.data).max()
    if precision != "q8_0":
        from safetensors.torch import load_file

        folder = export_checkpoint(made, tmp_path / "merged", precision=precision)
        assert {str(tensor.dtype) for tensor in load_file(folder / "model.safetensors").values()} == {f"torch.{precision}"}


def test_llama_cpp_reads_text_as_we_do(shared: LocalBackend, qwen: Path, tmp_path: Path) -> None:
    session = shared.train(str(qwen), LoraConfig(rank=2, target_modules=("q_proj",)))
    made = shared.download(session.save("plain", "sampler").result(), tmp_path / "adapter")
    session.close()
    encode = shared.tokenizer(str(qwen)).encode
    texts = ("water boils at 100 degrees", "<|im_start|>user\nÜmläut 🎉  two  blanks<|im_end|>\n", "it's\tthe claim's")
    path = export_checkpoint(made, tmp_path / "model.gguf", "gguf")
    found = in_llama_cpp(path, *texts, *(tuple(encode(text)) for text in texts), length=6)
    assert found[:3] == found[3:]
    assert len(set(found[:3])) == 3


def test_peft_reads_its_two_files(trained: tuple[Checkpoint, tuple[int, ...]], tmp_path: Path) -> None:
    checkpoint, _ = trained
    folder = export_checkpoint(checkpoint, tmp_path / "peft", "peft")
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    assert checkpoint.local_path is not None
    assert (folder / "adapter_model.safetensors").read_bytes() == (checkpoint.local_path / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("to", "kind", "precision", "message"),
    [
        ("x", "onnx", "float32", "kind is 'onnx'"),
        ("x", "peft", "float16", "'peft' has float32"),
        ("x", "merged", "q8_0", "'merged' has float32, bfloat16, float16"),
        ("x", "gguf", "float32", r"a file that ends in .gguf"),
        ("x.gguf", "merged", "float32", "expected a folder"),
        (".", "merged", "float32", "exists already"),
    ],
)
def test_what_cannot_be_written_is_said_before_any_work(tmp_path: Path, to: str, kind: Format, precision: Precision, message: str) -> None:
    checkpoint = Checkpoint(name="a", uri="", kind="sampler", step=1, base_model="tiny", lora=LoraConfig(), local_path=tmp_path / "none")
    with pytest.raises(ConfigError, match=message):
        export_checkpoint(checkpoint, tmp_path / to, kind, precision=precision)


def test_what_is_not_there_or_not_sound_is_said_and_nothing_is_left(shared: LocalBackend, tmp_path: Path) -> None:
    checkpoint = Checkpoint(name="a", uri="", kind="sampler", step=1, base_model="tiny", lora=LoraConfig(), local_path=tmp_path / "none")
    for kind in ("peft", "merged"):
        with pytest.raises(NotFoundError, match="has no folder"):
            export_checkpoint(checkpoint, tmp_path / "out", kind)
    session = shared.train("tiny", LoraConfig(rank=2))
    made = shared.download(session.save("plain", "sampler").result(), tmp_path / "adapter")
    session.close()
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(CorruptError):
        export_checkpoint(made, tmp_path / "x.gguf", "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_what_llama_cpp_does_not_know_is_refused(shared: LocalBackend, tmp_path: Path) -> None:
    base = make_qwen(tmp_path / "base", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    session = shared.train(str(base), LoraConfig(rank=2))
    made = shared.download(session.save("plain", "sampler").result(), tmp_path / "adapter")
    session.close()
    with pytest.raises(CapabilityError, match="positions of type 'linear'"):
        export_checkpoint(made, tmp_path / "x.gguf", "gguf")
    tokenizer = (base / "tokenizer.json").read_text()
    (base / "config.json").write_text((base / "config.json").read_text().replace('"linear"', '"default"'))
    (base / "tokenizer.json").write_text(tokenizer.replace('"use_regex": true', '"use_regex": false'))
    with pytest.raises(CapabilityError, match="no known name in llama"):
        export_checkpoint(made, tmp_path / "x.gguf", "gguf")
    assert not (tmp_path / "x.gguf").exists()

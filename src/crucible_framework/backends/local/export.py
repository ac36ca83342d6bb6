"""A checkpoint for other programs: PEFT's two files, a merged Hugging Face model, or GGUF for llama.cpp (merged, or the adapter alone).

Weights are merged in fp32, W + alpha/rank · B A, and rounded once to what was asked for. Where the output layer was trained and the base
shares it with the embedding, the two are separated first: the embedding stays as it was.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import nn

from ... import events, files
from ...config import places
from ...data.byte_files import byte_tokenizer_files
from ...errors import CapabilityError, ConfigError, NotFoundError
from ...records import Checkpoint, record
from .adapters import ADAPTER, CONFIG, read_snapshot
from .bases import ALIASES, TINY, canonical, locate
from .gguf_files import Kept, write_adapter_gguf, write_model_gguf
from .loading import head_name, quiet, read_folder, tiny_model
from .lora import Adapter, layer_names, tensor_name

__all__ = ["Format", "Precision", "export_checkpoint"]

Format = Literal["peft", "merged", "gguf", "gguf-adapter"]
Precision = Literal["float32", "bfloat16", "float16", "q8_0"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json",
              "tokenizer.model", "generation_config.json")  # fmt: skip


@record
class _Loaded:
    """A base in fp32 with what is known of the adapter."""

    model: nn.Module
    adapter: Adapter
    names: tuple[str, ...]
    head: str
    folder: Path | None
    scale: float


def export_checkpoint(checkpoint: Checkpoint, to: str | Path, kind: Format = "merged", *, precision: Precision = "float32") -> Path:
    """Writes a checkpoint in another program's form and returns what was written.

    Args:
        checkpoint: with its files here.
        to: a folder that does not exist yet ("peft", "merged"), or a .gguf file.
        kind: "peft" loads in PEFT and vLLM beside the base; "merged" in transformers and everything that reads its folders; "gguf" in
            llama.cpp; "gguf-adapter" there beside a GGUF of the same base.
        precision: of the weights; "q8_0" (8 bits with a scale for 32 of them) for GGUF only. Greedy answers of fp32 are the sampler's own.

    Raises:
        ConfigError: a kind that there is not, a precision that it does not have, another ending, or a target that exists.
        CapabilityError: GGUF of an architecture or tokenizer that is not written here.
        NotFoundError, CorruptError: the checkpoint's or the base model's files are not there, or changed.
        StorageFullError: no room; nothing is left behind.
    """
    to = Path(to)
    _check(to, kind, precision)
    if kind == "peft":
        _peft(checkpoint, to)
    elif kind == "merged":
        loaded = _merge(_load(checkpoint))
        files.publish(to, lambda folder: _write_folder(loaded, folder, precision), {"exported": checkpoint.uri, "base_model": checkpoint.base_model})
    else:
        loaded = _load(checkpoint)
        kept = _kept(loaded, checkpoint)
        with files.storage_errors(to):
            to.parent.mkdir(parents=True, exist_ok=True)
            partial = to.with_name(f".tmp-{to.name}")
            try:
                if kind == "gguf":
                    write_model_gguf(partial, _merge(loaded).model.state_dict(), kept, precision)
                else:
                    _check_head(loaded)
                    write_adapter_gguf(partial, loaded.adapter, loaded.names, kept, alpha=checkpoint.lora.alpha)
                files.move(partial, to)
            finally:
                partial.unlink(missing_ok=True)
    size = to.stat().st_size if to.is_file() else sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    events.emit("model.exported", checkpoint=checkpoint.name, format=kind, precision=precision, path=str(to), size_bytes=size)
    return to


def _check(to: Path, kind: str, precision: str) -> None:
    if kind not in get_args(Format):
        raise ConfigError(f"kind is {kind!r}; expected one of {', '.join(get_args(Format))}.")
    allowed = {"merged": ("float32", "bfloat16", "float16"), "gguf": get_args(Precision)}.get(kind, ("float32",))
    if precision not in allowed:
        raise ConfigError(f"precision is {precision!r}; {kind!r} has {', '.join(allowed)}.")
    if kind.startswith("gguf") != (to.suffix == ".gguf"):
        expected = "a file that ends in .gguf" if kind.startswith("gguf") else "a folder"
        raise ConfigError(f"Cannot export {kind!r} to {str(to)!r}; expected {expected}.")
    if to.exists():
        raise ConfigError(f"{str(to)!r} exists already. Choose another name.")


def _peft(checkpoint: Checkpoint, to: Path) -> None:
    folder = checkpoint.local_path
    if folder is None or not folder.is_dir():
        raise NotFoundError(f"Checkpoint {checkpoint.name!r} has no folder {str(folder)!r}. Download it first.")
    if (folder / files.MANIFEST).exists():
        files.verify(folder)
    source = folder

    def write(new: Path) -> None:
        for name in (CONFIG, ADAPTER):
            if not (source / name).is_file():
                raise NotFoundError(f"{str(source)!r} holds no {name}: it is no LoRA checkpoint. Expected one that a local or Tinker backend saved.")
            shutil.copyfile(source / name, new / name)

    files.publish(to, write, {"exported": checkpoint.uri, "base_model": checkpoint.base_model})


def _load(checkpoint: Checkpoint) -> _Loaded:
    name = canonical(checkpoint.base_model)
    folder = None if name == TINY else locate(name, places().cache, 4)
    model = tiny_model() if folder is None else read_folder(folder, name, torch.float32, cache=None, ours=name in ALIASES)
    head = head_name(model, name)
    layers = {key: (module.out_features, module.in_features) for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    adapter = dict(read_snapshot(checkpoint, layers, head, torch.device("cpu"), state=False).adapter)
    names = layer_names(layers, checkpoint.lora, head)
    return _Loaded(model=model, adapter=adapter, names=names, head=head, folder=folder, scale=checkpoint.lora.alpha / checkpoint.lora.rank)


@torch.no_grad()
def _merge(loaded: _Loaded) -> _Loaded:
    """Adds the adapter to the weights of its model, in place."""
    model = loaded.model
    if loaded.head in loaded.names and getattr(model.config, "tie_word_embeddings", False):
        layer = cast("nn.Linear", model.get_submodule(loaded.head))
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        model.config.tie_word_embeddings = False  # type: ignore[union-attr] # transformers' own
        if hasattr(model, "all_tied_weights_keys"):
            model.all_tied_weights_keys = {}  # type: ignore[assignment] # transformers looks here which tensors it may leave out
    for name in loaded.names:
        low, high = (loaded.adapter[tensor_name(name, part)] for part in "AB")
        weight = cast("nn.Linear", model.get_submodule(name)).weight
        weight.add_(loaded.scale * (high @ low))
    return loaded


def _write_folder(loaded: _Loaded, folder: Path, precision: str) -> None:
    dtype = _DTYPES[precision]
    model = loaded.model.to(dtype)
    setattr(model.config, "dtype", dtype)  # noqa: B010 - transformers' own, which type checkers take for a module
    with quiet():
        model.save_pretrained(str(folder), max_shard_size="4GB")  # type: ignore[operator] # transformers' own
    _write_tokenizer(loaded.folder, folder)


def _write_tokenizer(source: Path | None, folder: Path) -> None:
    if source is None:
        byte_tokenizer_files(folder)
        return
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _check_head(loaded: _Loaded) -> None:
    if loaded.head in loaded.names and getattr(loaded.model.config, "tie_word_embeddings", False):
        raise CapabilityError(
            f"The base shares its output layer {loaded.head!r} with the embedding, and llama.cpp has no adapter for one of the two alone. "
            "Export 'gguf', which is merged."
        )


def _kept(loaded: _Loaded, checkpoint: Checkpoint) -> Kept:
    return Kept(name=f"{checkpoint.base_model} {checkpoint.name}", config=loaded.model.config.to_dict(), folder=loaded.folder)  # type: ignore[operator, union-attr]

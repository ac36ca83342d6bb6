"""The judges of `entailment.py` as Hugging Face models by hub name or folder: a cross-encoder for entailment, a sentence encoder for similarity.

They run on the processor and need `crucible-framework[local]`; torch and transformers are imported when a model is made. What a model reads at
most, its labels and its pooling come from its own files. This file does not know claims.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..config import places
from ..errors import ConfigError, CorruptError, DataError, NotFoundError
from ..files import read_json
from ..records import Json, record
from .entailment import Inference, Pair

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EmbeddingSimilarity", "NliModel", "label_order"]

_Tokens: TypeAlias = dict[str, list[int]]  # one text or window: "input_ids", "attention_mask" and what else the model takes
_BATCH = 16
_CAP = 512  # tokens; longer windows cost more than they see
_OVERLAP = 128  # tokens that two windows share at most: a few sentences


def label_order(id2label: dict[int, str], name: str = "model") -> tuple[int, int, int]:
    """Where (entailment, neutral, contradiction) stand among a model's outputs, by the labels of its configuration, never by position.

    Raises:
        ConfigError: the labels do not name the three, each once (LABEL_0 says nothing, and two-way models cannot tell refutation from silence).
    """
    found: list[int] = []
    for wanted in ("entail", "neutral", "contradict"):
        hits = [index for index, label in id2label.items() if label.lower().startswith(wanted)]
        if len(hits) != 1 or len(id2label) != 3:
            raise ConfigError(
                f"The model {name!r} has the labels {list(id2label.values())}; expected entailment, neutral and contradiction, each once. "
                "Take a natural-language-inference model, or correct id2label in its config.json."
            )
        found.append(int(hits[0]))
    return found[0], found[1], found[2]


# --------------------------------------------------------------------------------------------------------------- loading
def _transformers(name: str) -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"The model {name!r} needs transformers and torch. Install crucible-framework[local].") from error


def _not_loaded(name: str, error: Exception) -> NotFoundError:
    why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return NotFoundError(f"The model {name!r} cannot be loaded: {why} Expected a hub name, or a folder with safetensors: correct the name.")


class _Encoder:
    """A model with its tokenizer. Tensors whose names begin with `spare` may be untrained; every other decides answers."""

    def __init__(self, name: str, head: str, max_length: int | None, *, usual: int = _CAP, subfolder: str = "", spare: tuple[str, ...] = ()) -> None:
        transformers = _transformers(name)
        from ..backends.local.loading import quiet

        self.name, local = name, places().offline or Path(name).is_dir()
        try:
            with quiet():
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local, subfolder=subfolder)
                self.model, report = getattr(transformers, head).from_pretrained(
                    name, local_files_only=local, subfolder=subfolder, use_safetensors=True, output_loading_info=True
                )
        except (OSError, ValueError, ImportError) as error:
            raise _not_loaded(name, error) from error
        except Exception as error:  # safetensors and torch raise bare errors on broken or ill-fitting tensors
            raise CorruptError(f"The weights of {name!r} cannot be read: {error} Expected those of its config.json. Download them again.") from error
        self.model.eval()
        if missing := sorted(key for key in report["missing_keys"] if not key.startswith(spare)):
            raise ConfigError(
                f"The model {name!r} has no trained {missing[0]!r} ({len(missing)} tensors are missing) and would answer by chance; expected all of "
                f"{type(self.model).__name__}. Take a model that was trained for this, or train that part and save it with save_pretrained."
            )
        if not self.tokenizer.is_fast or self.tokenizer.pad_token_id is None:
            raise ConfigError(
                f"The tokenizer of {name!r}, {type(self.tokenizer).__name__}, {'has no padding token' if self.tokenizer.is_fast else 'is not a fast one'}; "
                "expected a fast one that pads. Save one beside the model (tokenizer.json with a pad_token)."
            )
        most = self._reads()
        if max_length is not None and not 1 <= max_length <= most:
            raise ConfigError(f"max_length is {max_length} tokens; {name!r} reads 1 to {most}. Change it, or leave it out.")
        self.max_length = min(most, usual) if max_length is None else max_length
        one_type = getattr(self.model.config, "type_vocab_size", 2) < 2
        self._takes = inspect.signature(self.model.forward).parameters.keys() - ({"token_type_ids"} if one_type else set())
        self._lock = threading.Lock()  # a call sets the fast tokenizer's truncation, which fails ("Already borrowed") while another call encodes

    def _reads(self) -> int:
        """The most tokens that the model has places for; those of RoBERTa begin behind its padding id."""
        import torch

        most: int = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize)
        for path, module in self.model.named_modules():
            if path.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                most = min(most, module.num_embeddings - module.padding_idx - 1)
        return most

    def encode(self, *texts: list[str], **cut: object) -> list[_Tokens]:
        """One entry per text or pair, uncut; with `cut`, the tokenizer's own settings, what they make of it."""
        with self._lock:
            found = self.tokenizer(*texts, padding=False, return_attention_mask=True, verbose=False, **({"truncation": False} | cut))
        keys = [key for key in ("input_ids", "token_type_ids", "attention_mask") if key in found and key in self._takes]
        return [dict(zip(keys, values, strict=True)) for values in zip(*(found[key] for key in keys), strict=True)]

    def run(self, entries: Sequence[_Tokens], read: Callable[[dict[str, Tensor]], Tensor]) -> NDArray[np.float64]:
        """`read(inputs)` [B, D] of every entry [N, D], in order; entries of like length go through together, so that little is padding."""
        import torch

        order = sorted(range(len(entries)), key=lambda i: len(entries[i]["input_ids"]), reverse=True)
        fill = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        found: dict[int, NDArray[np.float64]] = {}
        for start in range(0, len(order), _BATCH):
            some = order[start : start + _BATCH]
            rows = {key: [torch.tensor(entries[i][key]) for i in some] for key in entries[some[0]]}
            inputs = {key: torch.nn.utils.rnn.pad_sequence(row, batch_first=True, padding_value=fill.get(key, 0)) for key, row in rows.items()}
            with torch.no_grad():
                found.update(zip(some, read(inputs).double().numpy(), strict=True))
        return np.stack([found[i] for i in range(len(entries))])


# ------------------------------------------------------------------------------------------------------------ entailment
class NliModel:
    """A natural-language-inference cross-encoder, for example "cross-encoder/nli-deberta-v3-base".

    A premise that is too long is read in overlapping windows, and the one that says most counts, the one with the least neutral share.

    Args:
        name: hub name or folder with config.json, safetensors and tokenizer.
        max_length: tokens of premise and hypothesis together; None takes what the model reads, 512 at most.

    Raises:
        ConfigError: no transformers, no trained head, a max_length that the model cannot read, or the labels are not the three (`label_order`).
        NotFoundError: there is no such model here.
        CorruptError: its weights cannot be read.
        DataError (when it is asked): a hypothesis leaves its premise no token.
    """

    def __init__(self, name: str | Path, *, max_length: int | None = None) -> None:
        self._encoder = _Encoder(str(name), "AutoModelForSequenceClassification", max_length)
        self.order = label_order(dict(self._encoder.model.config.id2label), self.name)

    @property
    def name(self) -> str:
        """The hub name or folder."""
        return self._encoder.name

    def _windows(self, premise: str, hypothesis: str) -> list[_Tokens]:
        """A pair that is too long, with one part of its premise each."""
        encode, most = self._encoder.encode, self._encoder.max_length
        length = len(encode([""], [hypothesis])[0]["input_ids"])
        if length >= most:
            raise DataError(
                f"A claim has {length} tokens; {self.name!r} reads {most} with its premise. Shorten {hypothesis[:40]!r}, "
                "or let BySentence ask for its sentences."
            )
        stride = min(_OVERLAP, (most - length) // 2)
        return encode([premise], [hypothesis], truncation="only_first", max_length=most, stride=stride, return_overflowing_tokens=True)

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[Inference]:
        """One inference per (premise, hypothesis)."""
        import torch

        if not pairs:
            return []
        whole = self._encoder.encode([premise for premise, _ in pairs], [hypothesis for _, hypothesis in pairs])
        short = [len(entry["input_ids"]) <= self._encoder.max_length for entry in whole]
        parts = [[entry] if fits else self._windows(*pair) for entry, fits, pair in zip(whole, short, pairs, strict=True)]
        model = self._encoder.model
        shares = self._encoder.run([entry for some in parts for entry in some], lambda inputs: torch.softmax(model(**inputs).logits.double(), dim=-1))
        answers = iter(Inference(entailment=row[0], neutral=row[1], contradiction=row[2]) for row in shares[:, list(self.order)].tolist())
        return [min((next(answers) for _ in some), key=lambda found: found.neutral) for some in parts]


# ------------------------------------------------------------------------------------------------------------ similarity
@record
class _Layout:
    """How the files beside a sentence encoder say that it is used."""

    pooling: str = "mean"
    subfolder: str = ""
    max_length: int = _CAP


def _beside(name: str, file: str) -> Json:
    """A JSON file of a model, None where the model has none.

    Raises:
        NotFoundError: the model is on the hub, and whether it has the file cannot be told here.
    """
    if Path(name).is_dir():
        path = Path(name) / file
        return read_json(path) if path.is_file() else None
    import huggingface_hub as hub

    try:
        kept = hub.try_to_load_from_cache(name, file)
        if kept is not None:  # a path, or the mark that the hub was asked and has no such file
            return read_json(Path(kept)) if isinstance(kept, str) else None
        return read_json(Path(hub.hf_hub_download(name, file, local_files_only=places().offline)))
    except hub.errors.EntryNotFoundError as error:
        if not isinstance(error, hub.errors.LocalEntryNotFoundError):
            return None
        why = "the hub may not be asked or does not answer"
        raise NotFoundError(f"{file!r} of {name!r} is not in the cache, and {why}; expected it, or that there is none. Load the model online once.") from error
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from error


def _object(name: str, file: str, *, needed: bool = False) -> dict[str, Json]:
    found = _beside(name, file)
    if found is None and not needed:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{file!r} of {name!r} is {'missing' if found is None else 'no JSON object'}; modules.json names it. Download the model again.")
    return found


def _layout(name: str) -> _Layout:
    """What sentence-transformers' own files say; mean pooling where there are none.

    Raises:
        ConfigError: they ask for parts or pooling that are not here.
    """
    _transformers(name)
    modules = _beside(name, "modules.json")
    if modules is None:
        return _Layout()
    listed = [module for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    paths = {str(module.get("type")).rpartition(".")[2]: str(module.get("path") or "") for module in listed}
    if not {"Transformer", "Pooling"} <= paths.keys() <= {"Transformer", "Pooling", "Normalize"}:
        raise ConfigError(
            f"The encoder {name!r} consists of {', '.join(paths) or 'nothing'} (modules.json); expected Transformer, Pooling and maybe Normalize. "
            "Take an encoder of these, or merge the rest into one."
        )
    settings = _object(name, f"{paths['Pooling']}/config.json", needed=True)
    given = settings.get("pooling_mode", [key.removeprefix("pooling_mode_") for key, on in settings.items() if key.startswith("pooling_mode_") and on is True])
    modes = [str(mode).removesuffix("_tokens").removesuffix("_token") for mode in (given if isinstance(given, list) else [given])]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ConfigError(f"The encoder {name!r} pools by {', '.join(modes) or 'nothing'}; expected one of {', '.join(_POOLING)}. Take another encoder.")
    inner = paths["Transformer"]
    length = _object(name, f"{inner}/sentence_bert_config.json".lstrip("/")).get("max_seq_length")
    return _Layout(pooling=modes[0], subfolder=inner, max_length=length if isinstance(length, int) and length > 0 else _CAP)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


def _cls(states: Tensor, mask: Tensor) -> Tensor:
    del mask
    return states[:, 0]


def _max(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask == 0, -math.inf).amax(1)


_POOLING = {"mean": _mean, "cls": _cls, "max": _max}


class EmbeddingSimilarity:
    """Cosine of sentence embeddings, for example of "sentence-transformers/all-MiniLM-L6-v2"; each different text goes through once.

    Pooling (mean, cls or max) and length are those of the model's own sentence-transformers files, mean pooling where it has none.

    Args:
        name: hub name or folder with config.json, safetensors and tokenizer.
        max_length: tokens per text, the rest is cut; None takes what the model's files say, else what it reads, 512 at most.

    Raises:
        ConfigError: no transformers, weights are missing, a max_length that the model cannot read, or it needs other parts or pooling.
        NotFoundError: there is no such model here.
        CorruptError: its files cannot be read.

    Source: Reimers & Gurevych 2019, arXiv 1908.10084.
    """

    def __init__(self, name: str | Path, *, max_length: int | None = None) -> None:
        layout = _layout(str(name))
        self._pool = _POOLING[layout.pooling]
        self._encoder = _Encoder(str(name), "AutoModel", max_length, usual=layout.max_length, subfolder=layout.subfolder, spare=("pooler.",))

    @property
    def name(self) -> str:
        """The hub name or folder."""
        return self._encoder.name

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[float]:
        """Cosine in [−1, 1] per pair."""
        import torch

        if not pairs:
            return []
        texts = {text: number for number, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}

        def read(inputs: dict[str, Tensor]) -> Tensor:
            states: Tensor = self._encoder.model(**inputs).last_hidden_state
            return torch.nn.functional.normalize(self._pool(states, inputs["attention_mask"].unsqueeze(-1).to(states)).double(), dim=-1)

        units = self._encoder.run(self._encoder.encode([*texts], truncation=True, max_length=self._encoder.max_length), read)
        return [float(np.clip(units[texts[a]] @ units[texts[b]], -1.0, 1.0)) for a, b in pairs]

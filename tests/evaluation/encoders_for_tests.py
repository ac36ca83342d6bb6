"""Encoders of one layer with random weights, made here: words are tokens, so that windows can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

FILLERS = [f"w{i}" for i in range(40)]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "coffee", "tea", "milk", "delays", "sleep", "not", "a", "the", "by", "minutes", ".", *FILLERS]
LABELS = ("contradiction", "entailment", "neutral")
SPECIALS = 3  # tokens around a pair


def save_tokenizer(folder: Path, **settings: object) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names: dict[str, object] = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **(names | settings)).save_pretrained(folder)


def shape(labels: tuple[str, ...], **settings: object) -> dict[str, object]:
    names = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "initializer_range": 0.5}
    return {"vocab_size": len(WORDS), "max_position_embeddings": 64, **size, **names, **settings}


def save(folder: Path, labels: tuple[str, ...] = LABELS, **settings: object) -> Path:
    """A BERT cross-encoder; output `labels[i]` is row LABELS.index(labels[i]) of one fixed head."""
    save_tokenizer(folder)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**shape(labels, **settings)))
    if sorted(labels) == sorted(LABELS):
        head = torch.randn((3, 16), generator=torch.Generator().manual_seed(1)) / 4
        with torch.no_grad():
            model.classifier.weight.copy_(head[[LABELS.index(label) for label in labels]])
    model.save_pretrained(folder)
    return folder


def save_headless(folder: Path) -> Path:
    """A BERT with the three labels in its configuration, and no head that gives them."""
    save_tokenizer(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(**shape(LABELS))).save_pretrained(folder)
    return folder


def save_roberta(folder: Path, positions: int) -> Path:
    """A RoBERTa cross-encoder: its positions begin behind the padding id, and it knows one type of token."""
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = RobertaConfig(**shape(LABELS, max_position_embeddings=positions, type_vocab_size=1, pad_token_id=0, bos_token_id=2, eos_token_id=3))
    RobertaForSequenceClassification(config).save_pretrained(folder)
    return folder


def save_sentence_encoder(
    folder: Path,
    pooling: dict[str, object] | None,
    *,
    types: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"),
    inner: str = "",
    length: int | None = None,
) -> Path:
    """A sentence encoder with sentence-transformers' files around it, those of the model in the folder `inner`."""
    save_headless(folder / inner)
    paths = {"Transformer": inner, "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    modules = [{"idx": i, "name": str(i), "path": paths[kind], "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(types)]
    (folder / "modules.json").write_text(json.dumps(modules))
    if length is not None:
        (folder / inner / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length, "do_lower_case": False}))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder

"""The judges that are models, on tiny models made here: label order from the configuration, cutting, batches, failure."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from crucible_framework.errors import ConfigError, DataError, NotFoundError
from crucible_framework.evaluation import EmbeddingSimilarity, NliModel, Outcome, validate
from crucible_framework.evaluation.encoders import label_order
from crucible_framework.records import Example

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "coffee", "tea", "milk", "delays", "sleep", "not", "a", "the", "by", "minutes"]
LABELS = ("contradiction", "entailment", "neutral")
PAIRS = [("coffee delays sleep", "tea delays sleep"), ("the milk", "not sleep"), ("a", "a tea by the minutes not coffee"), *[("tea", "milk")] * 20]


def save(folder: Path, labels: tuple[str, ...] = LABELS) -> Path:
    """A BERT of one layer and its tokenizer; output `labels[i]` is row LABELS.index(labels[i]) of one fixed head."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=64,
        num_labels=len(labels), id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    if sorted(labels) == sorted(LABELS):
        head = torch.randn((3, 16), generator=torch.Generator().manual_seed(1)) * 3
        with torch.no_grad():
            model.classifier.weight.copy_(head[[LABELS.index(label) for label in labels]])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_order_of_a_models_labels_makes_no_difference(tmp_path: Path) -> None:
    """Six folders of one model whose outputs are permuted: reading by position would give six different answers."""
    answers = []
    for number, labels in enumerate(permutations(LABELS)):
        judge = NliModel(save(tmp_path / str(number), labels))
        assert judge.order == tuple(labels.index(label) for label in ("entailment", "neutral", "contradiction"))
        answers.append([(found.entailment, found.neutral, found.contradiction) for found in judge(PAIRS)])
    rows = np.array(answers)
    assert np.ptp(rows, axis=0).max() < 1e-6
    assert np.allclose(rows.sum(-1), 1)
    assert np.ptp(rows[0], axis=1).max() > 0.1, "the model does prefer some answers, so the comparison can fail"


def test_batches_and_padding_do_not_change_an_answer(tmp_path: Path) -> None:
    judge = NliModel(save(tmp_path))
    whole = judge(PAIRS)
    for pair, together in zip(PAIRS[:4], whole, strict=False):
        (alone,) = judge([pair])
        assert alone.entailment == pytest.approx(together.entailment, abs=1e-5)
    assert judge([]) == []


def test_a_long_premise_is_cut_and_a_long_claim_refused(tmp_path: Path) -> None:
    judge = NliModel(save(tmp_path), max_length=12)
    (short,) = judge([("coffee delays sleep a a", "tea")])
    assert judge([("coffee delays sleep " + "a " * 50, "tea")])[0].neutral != short.neutral
    with pytest.raises(DataError, match="Shorten 'tea tea"):
        judge([("coffee", "tea " * 30)])


@pytest.mark.parametrize("labels", [("LABEL_0", "LABEL_1", "LABEL_2"), ("entailment", "not_entailment"), ("entailment", "entailment_2", "neutral")])
def test_labels_that_do_not_name_the_three_are_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="expected entailment, neutral and contradiction"):
        label_order(dict(enumerate(labels)))
    assert label_order({0: "CONTRADICTION", 1: "Neutral", 2: "ENTAILMENT"}) == (2, 1, 0)


def test_a_model_of_other_labels_or_none_at_all_says_what_to_do(tmp_path: Path) -> None:
    folder = save(tmp_path / "two", ("entailment", "not_entailment"))
    with pytest.raises(ConfigError, match="not_entailment"):
        NliModel(folder)
    with pytest.raises(NotFoundError, match="cannot be loaded"):
        NliModel("nobody/no-such-model")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    with pytest.raises(NotFoundError):
        EmbeddingSimilarity(empty)


def test_embeddings_give_a_cosine(tmp_path: Path) -> None:
    judge = EmbeddingSimilarity(save(tmp_path))
    pairs = [("coffee", "coffee"), ("coffee delays sleep", "milk"), ("milk", "coffee delays sleep"), ("tea", "the milk by the minutes")]
    same, one, back, padded = judge(pairs)
    assert same == pytest.approx(1)
    assert one == pytest.approx(back)
    assert -1 <= one < 1
    assert judge(pairs[-1:])[0] == pytest.approx(padded, abs=1e-5), "padding counts for nothing"
    assert judge.name == str(tmp_path)


def test_models_validate_claims(tmp_path: Path) -> None:
    folder = save(tmp_path)
    text = "CLAIM[c1]: coffee delays sleep\nCLAIM[c2] (Document 3): tea\nRELATION: c2 supports c1"
    example = Example(id="e", prompt="Document 3: coffee delays sleep by minutes", target=text)
    found = validate(example, text, entailment=NliModel(folder), similarity=EmbeddingSimilarity(folder))
    assert (found["entailment"].judge, found["similarity"].judge) == (str(folder), str(folder))
    assert found["similarity"].outcome is Outcome.PASSED
    assert len(found["entailment"].checks) == 2

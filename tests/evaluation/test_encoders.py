"""The judges that are models, on tiny models made here: labels, windows, order, threads, pooling, and what is refused."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import permutations
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from crucible_framework.errors import ConfigError, CorruptError, DataError, NotFoundError
from crucible_framework.evaluation import BySentence, EmbeddingSimilarity, Inference, NliModel, Outcome, validate
from crucible_framework.evaluation.encoders import label_order
from crucible_framework.records import Example

from .encoders_for_tests import FILLERS, LABELS, SPECIALS, save, save_headless, save_roberta, save_sentence_encoder, save_tokenizer

PAIRS = [("coffee delays sleep", "tea delays sleep"), ("the milk", "not sleep"), ("a", "a tea by the minutes not coffee"), *[("tea", "milk")] * 20]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("nli") / "model")


def shares(found: Sequence[Inference]) -> np.ndarray:
    return np.array([(one.entailment, one.neutral, one.contradiction) for one in found])


def some_pairs(n: int, longest: int, seed: int = 0) -> list[tuple[str, str]]:
    dice = random.Random(seed)
    return [(" ".join(dice.choices(FILLERS, k=dice.randint(1, longest))), " ".join(dice.choices(FILLERS, k=dice.randint(1, 6)))) for _ in range(n)]


# -------------------------------------------------------------------------------------------------------------- labels
def test_the_order_of_a_models_labels_makes_no_difference(tmp_path: Path) -> None:
    """Six folders of one model whose outputs are permuted: reading by position would give six different answers."""
    answers = []
    for number, labels in enumerate(permutations(LABELS)):
        judge = NliModel(save(tmp_path / str(number), labels))
        assert judge.order == tuple(labels.index(label) for label in ("entailment", "neutral", "contradiction"))
        answers.append(shares(judge(PAIRS)))
    rows = np.array(answers)
    assert np.ptp(rows, axis=0).max() < 1e-12
    assert np.allclose(rows.sum(-1), 1)
    assert np.ptp(rows[0], axis=1).max() > 0.1, "the model does prefer some answers, so the comparison can fail"


@pytest.mark.parametrize("labels", [("LABEL_0", "LABEL_1", "LABEL_2"), ("entailment", "not_entailment"), ("entailment", "entailment_2", "neutral")])
def test_labels_that_do_not_name_the_three_are_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="expected entailment, neutral and contradiction"):
        label_order(dict(enumerate(labels)))
    assert label_order({0: "CONTRADICTION", 1: "Neutral", 2: "ENTAILMENT"}) == (2, 1, 0)


# ------------------------------------------------------------------------------------------------------------- windows
def test_short_pairs_get_the_models_own_answer(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    pairs = some_pairs(40, 50)
    found = shares(NliModel(folder)(pairs))
    for pair, row in zip(pairs, found, strict=True):
        with torch.no_grad():
            plain = torch.softmax(model(**tokenizer(*pair, return_tensors="pt")).logits.double(), -1)[0].numpy()
        assert np.allclose(row, plain[[LABELS.index(label) for label in ("entailment", "neutral", "contradiction")]], atol=1e-6)


def test_a_long_premise_is_read_in_overlapping_windows(folder: Path) -> None:
    """Words are tokens here, so the windows can be cut by hand; each is then a short pair."""
    judge, dice = NliModel(folder), random.Random(1)
    for words in (62, 63, 100, 200, 500):
        premise, hypothesis = dice.choices(FILLERS, k=words), "tea delays sleep"
        room = 64 - SPECIALS - 3
        step = room - room // 2
        starts = range(0, max(1, words - room + step), step)
        windows = judge([(" ".join(premise[start : start + room]), hypothesis) for start in starts])
        assert len(windows) > 1
        (found,) = judge([(" ".join(premise), hypothesis)])
        assert np.allclose(shares([found]), shares([min(windows, key=lambda one: one.neutral)]), atol=1e-6)


def test_what_stands_at_the_end_of_a_long_premise_is_seen(folder: Path) -> None:
    judge, hypothesis, room = NliModel(folder), "tea delays sleep", 64 - SPECIALS - 3
    filler, most = max(((word, judge([(f"{word} " * room, hypothesis)])[0].neutral) for word in FILLERS), key=lambda pair: pair[1])
    fact, least = min(((word, judge([(f"{word} " * room, hypothesis)])[0].neutral) for word in FILLERS), key=lambda pair: pair[1])
    assert most - least > 0.05, "the two can be told apart"
    half = room // 2
    last = judge([(f"{filler} " * half + f"{fact} " * half, hypothesis), (f"{fact} " * room, hypothesis)])
    (found,) = judge([(f"{filler} " * half * 20 + f"{fact} " * room, hypothesis)])
    assert found.neutral == pytest.approx(min(one.neutral for one in last), abs=1e-6)
    assert found.neutral < most - 0.05, "cut at its end, the premise would be all filler"


def test_a_claim_that_leaves_no_room_is_refused(folder: Path) -> None:
    judge = NliModel(folder, max_length=12)
    assert len(judge([("coffee " * 40, "tea " * 8)])) == 1
    with pytest.raises(DataError, match=r"A claim has 12 tokens.* reads 12 .*Shorten 'tea tea.*BySentence"):
        judge([("coffee", "tea " * 9)])
    assert len(BySentence(judge)([("coffee", "tea tea tea . " * 9)])) == 1


def test_a_model_reads_what_it_has_places_for(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_length is 65 tokens; .* reads 1 to 64"):
        NliModel(folder, max_length=65)
    roberta = save_roberta(tmp_path / "roberta", positions=41)
    judge = NliModel(roberta)
    assert np.allclose(shares(judge(some_pairs(30, 200))).sum(-1), 1), "one place more and the model would fail"
    with pytest.raises(ConfigError, match="reads 1 to 40"):
        NliModel(roberta, max_length=41)
    large, pair = save(tmp_path / "large", max_position_embeddings=700), (" ".join(FILLERS * 20), "tea")
    assert NliModel(large)([pair]) == NliModel(large, max_length=512)([pair])
    assert NliModel(large)([pair]) != NliModel(large, max_length=700)([pair])


# ----------------------------------------------------------------------------------------------------- order, threads
def test_batches_and_their_order_do_not_change_an_answer(folder: Path) -> None:
    judge, pairs = NliModel(folder), some_pairs(70, 150)
    whole, alone = shares(judge(pairs)), shares([judge([pair])[0] for pair in pairs])
    assert np.allclose(whole, alone, atol=1e-6)
    assert np.ptp(whole, axis=0).max() > 0.1, "answers differ, so a wrong order would show"
    assert judge([]) == []


def test_threads_may_ask_at_once(folder: Path) -> None:
    judge, alike = NliModel(folder), EmbeddingSimilarity(folder)
    parts = [some_pairs(12, 120, seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found, near = [*pool.map(judge, parts)], [*pool.map(alike, parts)]
    for part, answers, values in zip(parts, found, near, strict=True):
        assert np.allclose(shares(answers), shares(judge(part)), atol=1e-6)
        assert np.allclose(values, alike(part), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- refused
def test_a_head_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no trained 'classifier\.bias' \(2 tensors are missing\).*by chance.*save_pretrained"):
        NliModel(save_headless(tmp_path / "headless"))
    folder = save_headless(tmp_path / "torn")
    weights = {key: tensor for key, tensor in load_file(folder / "model.safetensors").items() if "intermediate" not in key}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"no trained 'encoder\.layer\.0\.intermediate"):
        EmbeddingSimilarity(folder)


def test_a_pooler_is_not_needed_for_similarity(tmp_path: Path) -> None:
    folder = save_headless(tmp_path / "bare")
    before = EmbeddingSimilarity(folder)(PAIRS)
    weights = {key: tensor for key, tensor in load_file(folder / "model.safetensors").items() if not key.startswith("pooler.")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert EmbeddingSimilarity(folder)(PAIRS) == before


def test_a_model_of_other_labels_or_none_at_all_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not_entailment"):
        NliModel(save(tmp_path / "two", ("entailment", "not_entailment")))
    with pytest.raises(NotFoundError, match="cannot be loaded"):
        NliModel("nobody/no-such-model")
    with pytest.raises(NotFoundError, match=r"'modules\.json' of 'nobody/no-such-model' is not in the cache"):
        EmbeddingSimilarity("nobody/no-such-model")
    with pytest.raises(NotFoundError, match="cannot be loaded"):
        EmbeddingSimilarity("no/such/model")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    with pytest.raises(NotFoundError):
        EmbeddingSimilarity(empty)


def test_weights_that_do_not_fit_and_tokenizers_that_do_not_pad_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "torn")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CorruptError, match="cannot be read"):
        NliModel(folder)
    folder = save(tmp_path / "unpadded")
    save_tokenizer(folder, pad_token=None)
    with pytest.raises(ConfigError, match="has no padding token; expected a fast one that pads"):
        NliModel(folder)


# ---------------------------------------------------------------------------------------------------------- similarity
def test_embeddings_give_a_cosine(folder: Path) -> None:
    judge = EmbeddingSimilarity(folder)
    pairs = [("coffee", "coffee"), ("coffee delays sleep", "milk"), ("milk", "coffee delays sleep"), ("tea", "the milk by the minutes")]
    same, one, back, padded = judge(pairs)
    assert same == pytest.approx(1)
    assert one == pytest.approx(back)
    assert -1 <= one < 1
    assert judge(pairs[-1:])[0] == pytest.approx(padded, abs=1e-5), "padding counts for nothing"
    assert judge.name == str(folder)
    assert judge([]) == []


def plain_cosines(folder: Path, mode: str, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """One text at a time, without padding: nothing of the judge's own."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def vector(text: str) -> torch.Tensor:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled: torch.Tensor = {"mean": states.mean(0), "cls": states[0], "max": states.max(0).values}[mode]
        return pooled

    return [float(torch.cosine_similarity(vector(a), vector(b), dim=0)) for a, b in pairs]


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("mean", {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "word_embedding_dimension": 16, "include_prompt": True}),
        ("cls", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
        ("max", {"pooling_mode_max_tokens": True}),
        ("cls", {"embedding_dimension": 16, "pooling_mode": "cls"}),
        ("mean", None),
    ],
)
def test_pooling_is_that_of_the_models_own_files(tmp_path: Path, mode: str, settings: dict[str, object] | None) -> None:
    folder, pairs = tmp_path / "encoder", [("coffee delays sleep", "milk"), ("tea", "the milk by the minutes"), ("a", "not a")]
    save_headless(folder) if settings is None else save_sentence_encoder(folder, settings)
    found = EmbeddingSimilarity(folder)(pairs)
    assert found == pytest.approx(plain_cosines(folder, mode, pairs), abs=1e-5)
    other = "cls" if mode == "mean" else "mean"
    assert found != pytest.approx(plain_cosines(folder, other, pairs), abs=1e-3)


def test_length_and_folder_are_those_of_the_models_own_files(tmp_path: Path) -> None:
    folder = save_sentence_encoder(tmp_path / "encoder", {"pooling_mode_mean_tokens": True}, inner="0_Transformer", length=5)
    assert EmbeddingSimilarity(folder)([("coffee tea milk", "coffee tea milk not sleep")])[0] == pytest.approx(1)
    assert EmbeddingSimilarity(folder, max_length=20)([("coffee tea milk", "coffee tea milk not sleep")])[0] < 0.999
    longer = save_sentence_encoder(tmp_path / "longer", {"pooling_mode_mean_tokens": True}, length=500)
    assert EmbeddingSimilarity(longer)([("coffee " * 100, "coffee " * 200)])[0] == pytest.approx(1), "the model has 64 places, whatever the file says"


@pytest.mark.parametrize(
    ("settings", "types", "message"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, ("Transformer", "Pooling"), "pools by weightedmean; expected one of mean, cls, max"),
        ({"pooling_mode": ["cls", "max"]}, ("Transformer", "Pooling"), "pools by cls, max; expected one"),
        ({"pooling_mode_mean_tokens": False}, ("Transformer", "Pooling"), "pools by nothing"),
        ({"pooling_mode_mean_tokens": True}, ("Transformer", "Pooling", "Dense"), "consists of Transformer, Pooling, Dense"),
        ({"pooling_mode_mean_tokens": True}, ("Transformer",), "consists of Transformer "),
        (None, ("Transformer", "Pooling"), r"'1_Pooling/config\.json' of .* is missing"),
    ],
)
def test_pooling_that_is_not_known_is_refused(tmp_path: Path, settings: dict[str, object] | None, types: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmbeddingSimilarity(save_sentence_encoder(tmp_path / "encoder", settings, types=types))


def test_models_validate_claims(folder: Path) -> None:
    text = "CLAIM[c1]: coffee delays sleep\nCLAIM[c2] (Document 3): tea\nRELATION: c2 supports c1"
    example = Example(id="e", prompt="Document 3: coffee delays sleep by minutes", target=text)
    found = validate(example, text, entailment=NliModel(folder), similarity=EmbeddingSimilarity(folder))
    assert (found["entailment"].judge, found["similarity"].judge) == (str(folder), str(folder))
    assert found["similarity"].outcome is Outcome.PASSED
    assert len(found["entailment"].checks) == 2


# ----------------------------------------------------------------------------------------------------------------- hub
class Hub(ThreadingHTTPServer):
    """The files of the folders in a folder, as the hub gives those of the repositories "me/FOLDER"."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                found = re.fullmatch(r"/me/(\w+)/resolve/\w+/([^?]+)(\?.*)?", self.path)
                hub.asked.append(self.path)
                file = folder / found[1] / found[2] if found else folder
                there = file.is_file()
                data = file.read_bytes() if there else b"{}"
                self.send_response(200 if there else 404)
                told = {"X-Repo-Commit": "a" * 40, "ETag": f'"{sha256(data).hexdigest()}"', **({} if there else {"X-Error-Code": "EntryNotFound"})}
                for key, value in {"Content-Length": str(len(data)), **told}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


def asked_by_name(hub: Hub, tmp_path: Path, code: str, **settings: str) -> str:
    """The client reads its address when it is imported, so it gets a process of its own."""
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path),
        "PATH": "", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", **settings,
    }  # fmt: skip
    start = "from crucible_framework.evaluation import EmbeddingSimilarity\n"
    done = subprocess.run([sys.executable, "-c", start + code], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_pooling_of_a_model_on_the_hub_comes_with_it_and_stays(tmp_path: Path) -> None:
    pair = ("coffee delays sleep", "milk")
    save_sentence_encoder(tmp_path / "hub" / "cls", {"pooling_mode": "cls"}, types=("Transformer", "Pooling"))
    save_headless(tmp_path / "hub" / "plain")
    ask = f"for name in ('me/cls', 'me/plain'):\n    print(EmbeddingSimilarity(name)([{pair!r}])[0])"
    with Hub(tmp_path / "hub") as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            online = asked_by_name(hub, tmp_path, ask)
        finally:
            hub.shutdown()
            thread.join()
    expected = [plain_cosines(tmp_path / "hub" / mode, how, [pair])[0] for mode, how in (("cls", "cls"), ("plain", "mean"))]
    assert [float(line) for line in online.split()] == pytest.approx(expected, abs=1e-5)
    asked = len(hub.asked)
    assert asked_by_name(hub, tmp_path, ask, CRUCIBLE_OFFLINE="1") == online, "with the hub gone, also that the second has no such files"
    assert len(hub.asked) == asked

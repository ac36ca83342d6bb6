"""Checkpoints and samplers: what is saved comes back bit for bit, and what is drawn comes from the model."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from ..data import render_prompt
from ..errors import BackendError, CorruptError, CrucibleError, NotFoundError
from ..files import read_json
from ..losses import resolve
from ..protocols import Backend, Sampler, Tokenizer, TrainingSession
from ..records import Batch, LoraConfig, Message, SamplingParams
from .backend_parts import BackendFixtures, close, distribution, done, finish, train

__all__ = ["CheckpointContract", "SamplingContract"]

PROMPT = "Say a word."
SEEDED = SamplingParams(max_tokens=8, seed=7)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


class CheckpointContract(BackendFixtures):
    """Save, resume, download."""

    def test_checkpoint_says_what_it_is(self, session: TrainingSession, base_model: str, lora: LoraConfig, batch: Batch) -> None:
        """Name, kind, step, base model, adapter; every URI is new."""
        train(session, batch, 2)
        saved = finish([session.save("one"), session.save("one"), session.save("two", "sampler")])
        assert [(checkpoint.name, checkpoint.kind) for checkpoint in saved] == [("one", "state"), ("one", "state"), ("two", "sampler")]
        assert all((checkpoint.step, checkpoint.base_model, checkpoint.lora) == (2, base_model, lora) for checkpoint in saved)
        assert len({checkpoint.uri for checkpoint in saved}) == 3

    def test_checkpoint_needs_a_name(self, session: TrainingSession) -> None:
        """An empty one is refused."""
        with pytest.raises(CrucibleError):
            done(session.save(""))

    @pytest.mark.parametrize("where", ["memory", "files"])
    def test_resume_is_bit_exact(self, backend: Backend, base_model: str, lora: LoraConfig, batch: Batch, *, tmp_path: Path, where: str) -> None:
        """Weights, optimizer, generator and step go on as if nothing had happened, from memory and from files alone."""
        if backend.capabilities.dropout:
            lora = replace(lora, dropout=0.3)
        session = backend.train(base_model, lora)
        train(session, batch, 3)
        checkpoint = done(session.save("middle"))
        if where == "files":
            checkpoint = replace(backend.download(checkpoint, tmp_path / "files"), uri="file:elsewhere")
        expected = [output.loss for output in train(session, batch, 3)]
        resumed = backend.resume(checkpoint)
        assert [output.loss for output in train(resumed, batch, 3)] == expected
        last = [done(each.forward(batch, resolve("cross_entropy"))) for each in (session, resumed)]
        for left, right in zip(last[0].logprobs, last[1].logprobs, strict=True):
            assert (left == right).all()
        assert done(resumed.save("end")).step == 6

    def test_fresh_session_can_be_saved(self, backend: Backend, session: TrainingSession, batch: Batch, tmp_path: Path) -> None:
        """Before the first step there is a state too."""
        checkpoint = backend.download(done(session.save("start")), tmp_path / "files")
        assert checkpoint.step == 0
        expected = [output.loss for output in train(session, batch, 2)]
        assert [output.loss for output in train(backend.resume(checkpoint), batch, 2)] == expected

    def test_resumed_twins_are_independent(self, backend: Backend, session: TrainingSession, batch: Batch) -> None:
        """A checkpoint can be resumed twice, and training one does not move the checkpoint."""
        train(session, batch, 2)
        checkpoint = done(session.save("fork"))
        losses = [[output.loss for output in train(backend.resume(checkpoint), batch, 2)] for _ in range(2)]
        assert losses[0] == losses[1]

    def test_save_keeps_the_weights_of_its_moment(self, backend: Backend, session: TrainingSession, batch: Batch) -> None:
        """Submitted between steps, without waiting."""
        train(session, batch, 1)
        before = done(session.forward(batch, resolve("cross_entropy"))).loss
        saving = session.save("now")
        train(session, batch, 3)
        assert done(backend.resume(done(saving)).forward(batch, resolve("cross_entropy"))).loss == before

    def test_sampler_checkpoint_cannot_be_resumed(self, backend: Backend, session: TrainingSession) -> None:
        """It holds no optimizer."""
        with pytest.raises(BackendError):
            backend.resume(done(session.save("weights", "sampler")))

    def test_checkpoint_samples_as_the_session_did(self, backend: Backend, session: TrainingSession, batch: Batch, tmp_path: Path) -> None:
        """From memory and from files."""
        train(session, batch, 5)
        checkpoint = done(session.save("weights", "sampler"))
        downloaded = replace(backend.download(checkpoint, tmp_path / "files"), uri="file:elsewhere")
        samplers: list[Sampler] = [session.sampler(), backend.sampler(checkpoint), backend.sampler(downloaded)]
        answers = [done(sampler.compute_logprobs(PROMPT, "A word")) for sampler in samplers]
        assert answers[0] == answers[1] == answers[2]
        assert len({done(sampler.sample(PROMPT, SEEDED))[0].tokens for sampler in samplers}) == 1

    @pytest.mark.parametrize("kind", ["state", "sampler"])
    def test_files_are_in_peft_layout(self, backend: Backend, session: TrainingSession, lora: LoraConfig, batch: Batch, *, tmp_path: Path, kind: str) -> None:
        """JSON and safetensors only; fp32 pairs A [rank, in] and B [out, rank]; the same bytes each time."""
        from safetensors.numpy import load_file

        train(session, batch, 2)
        checkpoint = done(session.save("files", "state" if kind == "state" else "sampler"))
        folders = [backend.download(checkpoint, tmp_path / name) for name in ("first", "second")]
        assert [folder.local_path for folder in folders] == [tmp_path / "first", tmp_path / "second"]
        files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
        assert {Path(name).suffix for name in files} == {".json", ".safetensors"}
        assert folders[0].size_bytes == sum(map(len, files.values()))
        assert (len(files) > 2) == (kind == "state")
        config = cast("dict[str, object]", read_json(tmp_path / "first" / "adapter_config.json"))
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", lora.rank, lora.alpha)
        tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
        assert tensors
        for name, values in tensors.items():
            assert values.dtype == np.float32
            assert values.shape[0 if name.endswith(".lora_A.weight") else 1] == lora.rank
            assert name.replace(".lora_A.", ".lora_B.") in tensors

    def test_missing_and_broken_files(self, backend: Backend, session: TrainingSession, batch: Batch, tmp_path: Path) -> None:
        """A checkpoint that is nowhere, and one whose bytes changed, are refused."""
        train(session, batch, 1)
        checkpoint = done(session.save("here"))
        with pytest.raises(NotFoundError):
            backend.resume(replace(checkpoint, uri=f"{checkpoint.uri}-gone"))
        with pytest.raises(NotFoundError):
            backend.download(replace(checkpoint, uri=f"{checkpoint.uri}-gone"), tmp_path / "none")
        folder = backend.download(checkpoint, tmp_path / "files")
        for path in sorted((tmp_path / "files").glob("*.safetensors")):
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            with pytest.raises(CorruptError):
                backend.resume(folder)
            path.unlink()
            with pytest.raises(NotFoundError):
                backend.resume(folder)
            path.write_bytes(whole)
        assert done(backend.resume(folder).save("again")).step == 1


class SamplingContract(BackendFixtures):
    """What a sampler answers."""

    @pytest.fixture
    def sampler(self, session: TrainingSession, batch: Batch) -> Sampler:
        """A model that is a little trained."""
        train(session, batch, 3)
        return session.sampler()

    def test_same_seed_same_samples(self, sampler: Sampler) -> None:
        """And another seed, or none, gives others; the samples of one request differ.

        Log-probs agree to 1e-5 nats only: how a processor adds up may depend on how many samples it decodes together.
        """
        first, again = finish([sampler.sample(PROMPT, SEEDED, 3) for _ in range(2)])
        assert [one.tokens for one in first] == [one.tokens for one in again]
        for one, other in zip(first, again, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, rel=0, abs=1e-5)
        assert len({one.tokens for one in first}) == 3
        assert done(sampler.sample(PROMPT, replace(SEEDED, seed=8)))[0].tokens != first[0].tokens
        fresh = finish([sampler.sample(PROMPT, replace(SEEDED, seed=None)) for _ in range(2)])
        assert fresh[0][0].tokens != fresh[1][0].tokens

    def test_completion_says_what_it_is(self, sampler: Sampler, tokenizer: Tokenizer) -> None:
        """Tokens, a log-prob for each, text, reason, length of the prompt."""
        for one in done(sampler.sample(PROMPT, SEEDED, 2)):
            assert 0 < len(one.tokens) == len(one.logprobs) <= SEEDED.max_tokens
            assert all(math.isfinite(logp) and logp <= 1e-6 for logp in one.logprobs)
            assert one.prompt_tokens == len(render_prompt(PROMPT, tokenizer))
            assert (one.stop_reason == "length") == (len(one.tokens) == SEEDED.max_tokens and one.tokens[-1] not in tokenizer.eos_ids)
            if one.stop_reason == "length":
                assert one.text == tokenizer.decode(one.tokens)
        assert done(sampler.sample(PROMPT, replace(SEEDED, max_tokens=1)))[0].stop_reason in ("length", "stop")

    def test_logprobs_are_those_of_the_model(self, sampler: Sampler) -> None:
        """At temperature 1 what sampling reports is what `compute_logprobs` computes for the same tokens."""
        for one in done(sampler.sample(PROMPT, SEEDED, 2)):
            close(done(sampler.compute_logprobs(PROMPT, one.tokens)), one.logprobs, tolerance=1e-3)

    def test_logprobs_are_after_temperature(self, sampler: Sampler, session: TrainingSession, tokenizer: Tokenizer) -> None:
        """log softmax(z / T), before top-k and top-p."""
        logp = distribution(session, tokenizer, PROMPT)
        for params in (SamplingParams(temperature=0.5), SamplingParams(temperature=2.0, top_k=5), SamplingParams(temperature=0.8, top_p=0.5)):
            scaled = logp / params.temperature
            scaled -= np.logaddexp.reduce(scaled)
            for one in done(sampler.sample(PROMPT, replace(params, max_tokens=1, seed=3), 4)):
                assert one.logprobs[0] == pytest.approx(scaled[one.tokens[0]], abs=2e-3)

    def test_draws_follow_the_distribution(self, sampler: Sampler, session: TrainingSession, tokenizer: Tokenizer) -> None:
        """The mean log-prob of 300 first tokens is minus the entropy, within four standard errors."""
        logp = distribution(session, tokenizer, PROMPT)
        drawn = np.array([one.logprobs[0] for one in done(sampler.sample(PROMPT, SamplingParams(max_tokens=1, seed=11), 300))])
        mean = float((np.exp(logp) * logp).sum())
        spread = math.sqrt(float((np.exp(logp) * (logp - mean) ** 2).sum()) / len(drawn))
        assert abs(drawn.mean() - mean) < 4 * spread + 1e-3

    def test_greedy(self, sampler: Sampler, session: TrainingSession, tokenizer: Tokenizer) -> None:
        """Temperature 0, top-k 1 and a tiny top-p all take the likeliest token, whatever the seed."""
        likeliest = done(sampler.sample(PROMPT, GREEDY))[0].tokens
        assert likeliest[0] == int(distribution(session, tokenizer, PROMPT).argmax())
        for params in (replace(GREEDY, seed=1), replace(GREEDY, temperature=1.0, top_k=1), replace(GREEDY, temperature=1.0, top_p=1e-6, seed=5)):
            assert [one.tokens for one in done(sampler.sample(PROMPT, params, 2))] == [likeliest] * 2

    def test_top_k_and_top_p_cut(self, sampler: Sampler, session: TrainingSession, tokenizer: Tokenizer) -> None:
        """Only the k likeliest, and only the smallest set with mass p, are drawn."""
        logp = distribution(session, tokenizer, PROMPT)
        order = np.argsort(-logp, kind="stable")
        drawn = {one.tokens[0] for one in done(sampler.sample(PROMPT, SamplingParams(max_tokens=1, seed=1, top_k=3), 60))}
        assert drawn == {int(token) for token in order[:3]} or (len(drawn) > 1 and drawn < {int(token) for token in order[:3]})
        kept = int(np.searchsorted(np.cumsum(np.exp(logp[order])), 0.1)) + 1
        drawn = {one.tokens[0] for one in done(sampler.sample(PROMPT, SamplingParams(max_tokens=1, seed=1, top_p=0.1), 60))}
        assert drawn <= {int(token) for token in order[: kept + 1]}

    def test_stops(self, session: TrainingSession, batch: Batch, tokenizer: Tokenizer) -> None:
        """At a string or a token id, which is not part of the text, and at the end of a turn."""
        train(session, batch, 60, lr=2e-2)
        sampler, params = session.sampler(), replace(GREEDY, max_tokens=40)
        whole = done(sampler.sample("Which colour has grass?", params))[0]
        visible = [place for place, token in enumerate(whole.tokens) if tokenizer.decode([token]).isalnum()]
        assert len(visible) > 1, "the trained model says something"
        letter = whole.tokens[visible[1]]
        string = tokenizer.decode([letter])
        for stop in (string, letter):
            one = done(sampler.sample("Which colour has grass?", replace(params, stop=(stop,))))[0]
            assert one.stop_reason == "stop"
            assert one.text == whole.text[: whole.text.index(string)]
            assert len(one.tokens) < len(whole.tokens) or whole.stop_reason == "stop"
            close(one.logprobs, whole.logprobs[: len(one.logprobs)], tolerance=1e-3)

    def test_end_of_turn_is_learnt(self, session: TrainingSession, batch: Batch, tokenizer: Tokenizer) -> None:
        """What ends an answer in training ends it in sampling; its token is among the tokens and not in the text."""
        target = replace(batch, data=batch.data[:1])
        train(session, target, 150, lr=2e-2)
        for one in done(session.sampler().sample("Which colour has grass?", SamplingParams(max_tokens=80, seed=2), 4)):
            if one.stop_reason == "stop":
                assert one.tokens[-1] in tokenizer.eos_ids
                assert one.text == tokenizer.decode(one.tokens[:-1])
                return
        pytest.fail("none of four trained answers ended")

    def test_prompts_of_all_kinds(self, sampler: Sampler, tokenizer: Tokenizer) -> None:
        """Text, its tokens and, with a chat template, one user turn are the same prompt."""
        prompts: list[str | tuple[int, ...] | tuple[Message, ...]] = [PROMPT, tuple(render_prompt(PROMPT, tokenizer))]
        if tokenizer.chat_template is not None:
            prompts.append((Message(role="user", content=PROMPT),))
        assert len({done(sampler.sample(prompt, SEEDED))[0].tokens for prompt in prompts}) == 1
        assert len({done(sampler.compute_logprobs(prompt, "A word")) for prompt in prompts}) == 1

    def test_compute_logprobs(self, sampler: Sampler, tokenizer: Tokenizer) -> None:
        """One per token, text or ids; nothing for nothing."""
        ids = tuple(tokenizer.encode("A word"))
        seen = done(sampler.compute_logprobs(PROMPT, "A word"))
        assert len(seen) == len(ids)
        assert all(logp < 0 for logp in seen)
        assert done(sampler.compute_logprobs(PROMPT, ids)) == seen
        assert done(sampler.compute_logprobs(PROMPT, "")) == ()
        longer = done(sampler.compute_logprobs(PROMPT, (*ids, ids[0])))
        close(longer[:-1], seen)

    def test_wrong_requests(self, sampler: Sampler) -> None:
        """No prompt, a token outside the vocabulary, no completions."""
        with pytest.raises(CrucibleError):
            done(sampler.sample("", SEEDED))
        with pytest.raises(CrucibleError):
            done(sampler.sample((10**8,), SEEDED))
        with pytest.raises(CrucibleError):
            done(sampler.compute_logprobs(PROMPT, (10**8,)))
        with pytest.raises(CrucibleError):
            done(sampler.sample(PROMPT, SEEDED, 0))

    def test_snapshot_stays(self, session: TrainingSession, batch: Batch) -> None:
        """Later steps do not change a sampler, also when all was submitted ahead."""
        train(session, batch, 1)
        snapshot = session.sampler()
        early = snapshot.compute_logprobs(PROMPT, "A word")
        train(session, batch, 5)
        assert done(snapshot.compute_logprobs(PROMPT, "A word")) == done(early)
        assert done(session.sampler().compute_logprobs(PROMPT, "A word")) != done(early)

    def test_sampling_does_not_disturb_training(self, backend: Backend, base_model: str, lora: LoraConfig, batch: Batch) -> None:
        """Draws and dropout have generators of their own."""
        if backend.capabilities.dropout:
            lora = replace(lora, dropout=0.3)
        quiet, asked = backend.train(base_model, lora), backend.train(base_model, lora)
        losses: list[float] = []
        for _ in range(3):
            losses += [output.loss for output in train(asked, batch, 1)]
            done(asked.sampler().sample(PROMPT, replace(SEEDED, seed=None)))
        assert losses == [output.loss for output in train(quiet, batch, 3)]

    def test_many_threads_ask_at_once(self, sampler: Sampler) -> None:
        """Answers depend on the request, not on who else asks."""
        alone = [done(sampler.sample(PROMPT, replace(SEEDED, seed=seed)))[0] for seed in range(6)]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda seed: done(sampler.sample(PROMPT, replace(SEEDED, seed=seed)))[0], range(6)))
        assert [one.tokens for one in together] == [one.tokens for one in alone]
        for left, right in zip(together, alone, strict=True):
            close(left.logprobs, right.logprobs, tolerance=1e-3)

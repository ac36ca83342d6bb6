"""The suite that every backend joins: `fake`, `local`, a service, and yours."""

from __future__ import annotations

import pytest

from .. import events
from ..errors import SessionClosedError
from ..losses import resolve
from ..protocols import Backend, Tokenizer, TrainingSession
from ..records import AdamConfig, Batch, Capabilities, LoraConfig, SamplingParams
from .backend_failures import FailureContract
from .backend_parts import done, train
from .backend_sampling import CheckpointContract, SamplingContract
from .backend_streams import StreamContract
from .backend_training import NumbersContract, TrainingContract

__all__ = ["BackendContract"]


class BackendContract(NumbersContract, TrainingContract, FailureContract, CheckpointContract, SamplingContract, StreamContract):
    """Override the fixtures `backend` (fresh, closed after the test) and `base_model` (its smallest); `lora` where "q_proj" means nothing.

    Tests of what a backend says it cannot do (`Capabilities`) are skipped, or check that it says so.
    """

    def test_says_what_it_can(self, backend: Backend) -> None:
        """Capabilities with a name."""
        assert isinstance(backend.capabilities, Capabilities)
        assert backend.capabilities.name

    def test_tokenizer_comes_back_to_the_text(self, tokenizer: Tokenizer) -> None:
        """Encode, decode, and tokens inside the vocabulary."""
        assert isinstance(tokenizer, Tokenizer)
        text = "Two and two are 4 — naïve, isn't it?\n"
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert 0 <= min(tokens) <= max(tokens) < tokenizer.vocab_size
        assert tokenizer.eos_ids
        assert all(0 <= token < tokenizer.vocab_size for token in tokenizer.eos_ids)

    def test_every_request_emits_its_event(self, session: TrainingSession, batch: Batch) -> None:
        """In the caller's run."""
        with events.collect() as seen, events.in_run("the-run"):
            train(session, batch, 1)
            done(session.save("saved"))
            done(session.sampler().sample("Say a word.", SamplingParams(max_tokens=2, seed=1)))
            done(session.sampler().compute_logprobs("Say a word.", (1, 2, 3)))
        requests = {"training.forward_backward", "training.optim_step", "checkpoint.saved", "inference.sample", "inference.logprobs"}
        found = {str(event["name"]): event for event in seen}
        assert requests <= found.keys()
        assert {str(event["run"]) for event in seen if event["name"] in requests} == {"the-run"}
        assert found["training.optim_step"]["step"] == 1
        assert found["inference.logprobs"]["completion_tokens"] == 3

    def test_closed_session(self, backend: Backend, base_model: str, lora: LoraConfig, session: TrainingSession, batch: Batch) -> None:
        """What was submitted is finished, what comes later is refused; other sessions go on."""
        output = session.forward_backward(batch, resolve("cross_entropy"))
        sampler = session.sampler()
        session.close()
        session.close()
        assert done(output).loss > 0
        assert done(sampler.sample("Say a word.", SamplingParams(max_tokens=2)))
        with pytest.raises(SessionClosedError):
            done(session.forward(batch, resolve("cross_entropy")))
        with pytest.raises(SessionClosedError):
            done(session.save("late"))
        with pytest.raises(SessionClosedError):
            done(session.optim_step(AdamConfig()))
        assert train(backend.train(base_model, lora), batch, 1)[0].loss > 0

    def test_closed_backend(self, backend: Backend, session: TrainingSession, base_model: str, lora: LoraConfig, batch: Batch) -> None:
        """Requests are finished, not dropped; afterwards everything is refused."""
        outputs = [session.forward(batch, resolve("cross_entropy")) for _ in range(3)]
        sampler = session.sampler()
        backend.close()
        backend.close()
        assert len({done(output).loss for output in outputs}) == 1
        with pytest.raises(SessionClosedError):
            backend.train(base_model, lora)
        with pytest.raises(SessionClosedError):
            done(sampler.sample("Say a word.", SamplingParams()))
        with pytest.raises(SessionClosedError):
            done(session.forward_backward(batch, resolve("cross_entropy")))

"""Whatever is saved, pinned, damaged and pruned in whatever order: what must stay stays, and nothing else does."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from crucible_framework.errors import CrucibleError
from crucible_framework.records import Checkpoint, LoraConfig
from crucible_framework.store import Checkpoints


class Pruning(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.patch = mock.patch("os.fsync")  # no power fails here
        self.patch.start()
        self.folder = Path(tempfile.mkdtemp())
        self.store = Checkpoints(self.folder)
        self.loss: dict[int, float] = {}
        self.parent: dict[int, int] = {}
        self.pinned: set[int] = set()
        self.damaged: set[int] = set()
        self.next = 1

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.patch.stop()
            shutil.rmtree(self.folder)

    @rule(loss=st.one_of(st.just(math.nan), st.sampled_from([0.1, 0.2, 0.3, 0.4])), gap=st.integers(1, 3), pick=st.integers(0, 99), how=st.integers(0, 4))
    def publish(self, loss: float, gap: int, pick: int, how: int) -> None:
        step, self.next = self.next, self.next + gap
        parent = ""
        if how and self.loss:
            of = sorted(self.loss)[pick % len(self.loss)]
            known = self.store.get(of)
            parent = [known.name, Path(known.uri).name, known.uri, known.sha256][how - 1]
            self.parent[step] = of
        new = Checkpoint(name=f"n{step}", uri="", kind="state", step=step, base_model="m", lora=LoraConfig())
        self.store.publish(new, lambda to: (to / "w").write_bytes(b"w%d" % step), metrics={"loss": loss}, fingerprint="", parent=parent)
        self.loss[step] = loss

    @precondition(lambda self: self.loss)
    @rule(pick=st.integers(0, 99), on=st.booleans())
    def pin(self, pick: int, on: bool) -> None:
        step = sorted(self.loss)[pick % len(self.loss)]
        assert self.store.pin(step, pinned=on).pinned == on
        (self.pinned.add if on else self.pinned.discard)(step)

    @precondition(lambda self: self.loss.keys() - self.damaged)
    @rule(pick=st.integers(0, 99))
    def damage(self, pick: int) -> None:
        sound = sorted(self.loss.keys() - self.damaged)
        step = sound[-1 - pick % min(2, len(sound))]  # mostly the newest
        path = self.store.get(step).local_path
        assert path is not None
        (path / "w").write_bytes(b"x" * os.path.getsize(path / "w"))  # noqa: PTH202
        self.damaged.add(step)

    @precondition(lambda self: self.loss)
    @rule(keep=st.integers(1, 4), direction=st.sampled_from(["min", "max"]), by_metric=st.booleans())
    def prune(self, keep: int, direction: str, by_metric: bool) -> None:
        before = sorted(self.loss)
        removed = {c.step for c in self.store.prune(keep, metric="loss" if by_metric else None, direction="min" if direction == "min" else "max")}
        left = set(before) - removed
        must = set(before[-keep:]) | (self.pinned & set(before))
        must |= set([s for s in before if s not in self.damaged][-1:])
        finite = [s for s in before if math.isfinite(self.loss[s])]
        if by_metric and finite:
            must.add((min if direction == "min" else max)(finite, key=lambda s: (self.loss[s], s if direction == "min" else -s)))
        must |= {self.parent[s] for s in must if self.parent.get(s) in before}
        if len(before) <= keep:
            must = set(before)
        assert left == must
        for step in removed:
            del self.loss[step]
        self.pinned -= removed
        self.damaged -= removed

    @invariant()
    def what_is_listed_is_what_is_left(self) -> None:
        if not hasattr(self, "folder"):
            return
        found = self.store.list()
        assert [c.step for c in found] == sorted(self.loss)
        assert {c.step for c in found if c.pinned} == self.pinned
        for checkpoint in found:
            try:
                self.store.verify(checkpoint)
                sound = True
            except CrucibleError:
                sound = False
            assert sound == (checkpoint.step not in self.damaged)
        assert not list(self.folder.glob(".tmp-*"))


TestPruning = Pruning.TestCase
TestPruning.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)

"""What was made from what, read from the files of runs, studies and the registry."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.store.conftest import save_checkpoint

from crucible_framework.errors import NotFoundError
from crucible_framework.store import Ancestor, Tracker, open_run
from crucible_framework.store.lineage import ancestry, around, run_of

pytestmark = pytest.mark.usefixtures("quick")
CARD = {"name": "minifact", "split": "train", "sha256": "abcdef0123456789"}


def trained(folder: Path) -> None:
    with open_run(folder, {"base_model": "tiny"}) as run:
        run.write_json("data.json", {"train": CARD, "dev": None})
        save_checkpoint(run.checkpoints, 2)


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    root = tmp_path / "runs"
    trained(root / "first")
    trained(root / "study" / "cells" / "a1" / "run")
    (root / "study" / "plan.json").write_text("{}")
    tracker = Tracker(root)
    tracker.models.register(tracker_checkpoint(root / "first"), "judge")
    tracker.models.register(tracker_checkpoint(root / "study" / "cells" / "a1" / "run"), "cell")
    tracker.models.register(tracker.models.get("judge:1").checkpoint, "judge", parents=["cell:1"])
    return tracker


def tracker_checkpoint(run: Path):  # type: ignore[no-untyped-def] # the store's own type
    from crucible_framework.store import Checkpoints

    return Checkpoints(run / "checkpoints").latest()


def told(nodes: tuple[Ancestor, ...]) -> list[tuple[str, str]]:
    return [(node.kind, node.title) for node in nodes]


def test_a_version_goes_back_to_data_and_base(tracker: Tracker) -> None:
    assert told(ancestry(tracker.models, "judge:1", tracker.root)) == [
        ("model", "judge:1"), ("checkpoint", "00000002"), ("run", "first"), ("base model", "tiny"), ("data set", "minifact train abcdef01"),
    ]  # fmt: skip
    kinds = {node.title: node.kind for node in ancestry(tracker.models, "judge:2", tracker.root)}
    assert kinds["study/cells/a1/run"] == "run"
    assert kinds["cell:1"] == "model"


def test_a_data_set_goes_on_to_runs_models_and_studies(tracker: Tracker) -> None:
    found = tracker.lineage("minifact train abcdef01")
    assert found[0].kind == "data set"
    assert {(kind, title) for kind, title in told(found[1:])} == {
        ("run", "first"), ("run", "study/cells/a1/run"), ("study", "study"), ("checkpoint", "00000002"), ("model", "judge:1"), ("model", "judge:2"),
        ("model", "cell:1"),
    }  # fmt: skip
    run = tracker.lineage("first")
    assert told(run)[:3] == [("run", "first"), ("base model", "tiny"), ("data set", "minifact train abcdef01")]
    assert ("study", "study") not in told(run)
    assert told(tracker.lineage("study"))[:2] == [("study", "study"), ("run", "study/cells/a1/run")]
    with pytest.raises(NotFoundError, match="No node is called 'nothing'"):
        tracker.lineage("nothing")
    with pytest.raises(NotFoundError, match="2 have that title"):
        tracker.lineage("00000002")


def test_only_a_path_inside_is_a_run_of_the_workspace(tracker: Tracker, tmp_path: Path) -> None:
    root = tracker.root
    assert run_of(f"file:{root}/first/checkpoints/00000002", root) == "first"
    assert run_of(f"file:{root}/study/cells/a1/run/checkpoints/00000002", root) == ""
    inside, outside = f"file:{root}", f"file:{tmp_path}/first/checkpoints/1"
    for uri in (f"{inside}/first", f"{inside}/none/checkpoints/00000002", outside, "tinker://run/1", "file:checkpoints/1/2"):
        assert run_of(uri, root) == ""


def test_a_circle_ends() -> None:
    nodes = [Ancestor(id=one, title=one, kind="model", made_from=(other,)) for one, other in ("ab", "ba")]
    assert [node.id for node in around(nodes, "a")] == ["a", "b"]

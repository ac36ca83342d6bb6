"""Brings live sessions back after a kill: what their clients were told is true, and what they sent goes on. Knows no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import cast

from .. import events
from ..config import from_dict
from ..errors import CrucibleError
from ..files import read_json, read_lines, read_manifest, sweep
from ..records import Checkpoint, Json, LoraConfig
from .desk import Desk, SamplerCard, Session
from .journal import Journal, Recorded
from .ledger import Answer
from .steps import KINDS, model_for
from .turns import STATEFUL, Start

__all__ = ["revive"]


async def _ready(answer: Answer) -> Answer:
    return answer


def _as_before(answer: Answer) -> Start:
    """A request whose answer is known and that need not run again."""

    async def begin() -> object:
        return _ready(answer)

    return cast("Start", begin)


async def _samplers(desk: Desk, session: Session, folder: Path) -> None:
    """Samplers of names, and those whose weights lie in the session's folder."""
    for row in read_lines(folder / "samplers.jsonl"):
        base, path = cast("str | None", row["base_model"]), cast("str | None", row["model_path"])
        with contextlib.suppress(CrucibleError):  # its checkpoint was deleted: asking it says so
            sampler, name, model = await desk.open_sampler(session.owner, base_model=base, path=path)
            desk.add_sampler(session, cast("int", row["seq"]), lambda key, s=sampler, n=name, m=model, p=path: SamplerCard(key, s, n, m, p))  # type: ignore[misc]
    sweep(folder)
    for each in sorted(folder.glob("sampler-*")):
        with contextlib.suppress(CrucibleError):
            meta = read_manifest(each).meta
            lora = from_dict(LoraConfig, cast("dict[str, object]", meta["lora"]))
            model, base = str(meta["model"]), str(meta["base_model"])
            weights = Checkpoint(
                name=each.name, uri=str(meta["uri"]), kind="sampler", step=cast("int", meta["step"]), base_model=model, lora=lora, local_path=each
            )
            opened = await asyncio.to_thread(desk.backend.sampler, weights)
            number = int(each.name.partition("-")[2])
            desk.add_sampler(session, number, lambda key, s=opened, n=base, m=model: SamplerCard(key, s, n, m, None, own=True))  # type: ignore[misc]


async def _model(desk: Desk, session: Session, folder: Path) -> None:
    """A model with its state, its answers, and the requests that were still to run."""
    journal = Journal(folder)
    found: Recorded = await asyncio.to_thread(journal.read)
    if 0 not in found.requests:
        journal.close()  # its creation was never acknowledged: the client sends it again
        return
    kind, body = found.requests[0]
    if found.snapshot is None:
        model = model_for(desk, session, KINDS[kind].parse(body))
    else:
        model = desk.revived(session, folder.name, cast("dict[str, Json]", found.snapshot.meta["run"]))
        model.training = await asyncio.to_thread(desk.keeper.resume_snapshot, model, found.snapshot)
        model.next = found.snapshot.seq + 1
    model.journal = journal
    for seq, answer in sorted(found.answers.items()):
        if seq < model.next:
            was = found.requests.get(seq, ("request", b""))[0]
            desk.ledger.restore(f"{model.run.id}:{seq}", session.owner, session.id, kind=was, answer=answer, model=model.run.id)
    for seq, (kind, body) in sorted(found.requests.items()):
        if seq < model.next:
            continue
        known = found.answers.get(seq)
        again = known is None or kind in ("create_model", "forward_backward", *STATEFUL)
        begin = KINDS[kind].begin(desk, model, KINDS[kind].parse(body)) if again or known is None else _as_before(known)
        entry = desk.turns.take(model, seq, kind, begin, len(body))
        if known is not None:
            entry.resolve(known)
    desk.turns.open(model)


async def revive(desk: Desk) -> int:
    """Sessions that came back. One that cannot is left on disk, and an event says why."""
    root = desk.config.folder / "live"
    count = 0
    for folder in sorted(root.glob("s-*")):
        try:
            card = cast("dict[str, Json]", read_json(folder / "session.json"))
            session = desk.restore(folder.name, card)
            await _samplers(desk, session, folder)
            for each in sorted(folder.glob("train-*")):
                await _model(desk, session, each)
            count += 1
        except (CrucibleError, KeyError, ValueError, TypeError) as error:
            desk.sessions.pop(folder.name, None)
            events.emit("server.failed", request=folder.name, kind="revive", tenant="", error=f"{type(error).__name__}: {error}")
    return count

"""The commands about what is kept: checkpoints of a run, and registered models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Group

from ..config import places
from ..errors import ConfigError, CorruptError, NotFoundError
from ..files import write_atomic
from ..reports.cards import model_card
from ..store import Checkpoints, Models, load_checkpoint, pull, push
from . import show
from .jobs import resolve_model
from .reply import Reply

__all__ = ["pair", "register"]

Stage = Literal["none", "staging", "production", "archived"]
Direction = Literal["min", "max"]


# --------------------------------------------------------------------------------------------------------- checkpoints
def _kept(run: Path) -> Checkpoints:
    if not run.is_dir():
        raise NotFoundError(f"There is no run folder {str(run)!r}. List the runs of the workspace: crucible runs")
    return Checkpoints(run / "checkpoints")


def checkpoints_list(folder: Path, /) -> Reply:
    """List a run's checkpoints.

    Args:
        folder: the run folder.
    """
    kept = _kept(folder)
    rows = [(c.name, c.step, show.figure(c.metrics.get("train/loss")), show.size(c.size_bytes), "pinned" if c.pinned else "") for c in kept.list()]
    broken = "".join(f"\nnot sound: {path} ({why})" for path, why in kept.broken())
    shown = show.table(("checkpoint", "step", "train/loss", "size", ""), rows, f"No checkpoints in {folder}.")
    return Reply({"checkpoints": list(kept.list()), "broken": [str(path) for path, _ in kept.broken()]}, Group(shown, broken) if broken else shown)


def checkpoints_best(folder: Path, /, *, metric: str = "train/loss", direction: Direction = "min") -> Reply:
    """The best checkpoint by a metric.

    Args:
        folder: the run folder.
        metric: one that was written with the checkpoints.
        direction: whether less or more is better.
    """
    best = _kept(folder).best(metric, direction)
    return Reply(best, f"{best.name}: {metric} {show.figure(best.metrics[metric])}\n{best.local_path}")


def checkpoints_verify(folder: Path, /) -> Reply:
    """Compare every byte of a run's checkpoints with what was saved.

    Args:
        folder: the run folder, or one checkpoint's.
    """
    if (folder / "manifest.json").exists():
        return Reply(load_checkpoint(folder), f"{folder}: sound")
    kept = _kept(folder)
    for one in kept.list():
        kept.verify(one)
    for path, why in kept.broken():
        raise CorruptError(f"{str(path)!r} is not sound: {why}")
    return Reply({"verified": [one.name for one in kept.list()]}, f"{len(kept.list())} checkpoints, every byte as it was saved.")


def checkpoints_prune(folder: Path, /, *, keep: int = 3, metric: str = "train/loss", direction: Direction = "min") -> Reply:
    """Remove old checkpoints; the newest, the best, the pinned and their parents stay.

    Args:
        folder: the run folder.
        keep: how many of the newest stay.
        metric: what the best is judged by.
        direction: whether less or more is better.
    """
    removed = _kept(folder).prune(keep, metric=metric, direction=direction)
    return Reply({"removed": [one.name for one in removed]}, f"Removed {len(removed)}: {', '.join(one.name for one in removed) or 'nothing'}.")


# -------------------------------------------------------------------------------------------------------------- models
def _models() -> Models:
    return Models(places().runs / "models")


def models_list(
    *, stage: Stage | None = None, tag: list[str] | None = None, where: list[str] | None = None, order_by: str | None = None,
    direction: Direction | None = None, limit: int | None = None,
) -> Reply:  # fmt: skip
    """List registered models.

    Args:
        stage: none, staging, production or archived.
        tag: `key=value`; may be given again.
        where: a condition over metrics, `"dev/loss < 0.5"`; may be given again.
        order_by: a metric; the best comes first.
        direction: whether less (`min`) or more (`max`) of it is better, where neither the registration nor its name says so.
        limit: at most so many.
    """
    tags = dict(pair(one) for one in tag or ())
    found = _models().find(stage=stage, tags=tags, where=where or (), order_by=order_by, direction=direction, limit=limit)
    aliases = {name: _models().aliases(name) for name in {one.name for one in found}}
    rows = []
    for one in found:
        words = " ".join(f"@{word}" for word, at in aliases[one.name].items() if at == one.version)
        score = show.figure(one.metrics.get(order_by)) if order_by else ""
        labels = ", ".join(f"{k}={v}" for k, v in one.tags.items())
        rows.append((f"{one.name}:{one.version}", one.stage, words, one.checkpoint.base_model, labels, score, show.when(one.created_at)))
    headers = ("model", "stage", "aliases", "base model", "tags", order_by or "", "registered")
    return Reply({"models": list(found), "aliases": aliases}, show.table(headers, rows, "No models are registered."))


def models_register(checkpoint: str, name: str, /, *, description: str = "", tag: list[str] | None = None) -> Reply:
    """Register a run's latest checkpoint, or a checkpoint folder, under a name.

    Args:
        checkpoint: a run or checkpoint folder.
        name: of the model; each registration is a new version.
        description: one sentence.
        tag: `key=value`; may be given again.
    """
    found = resolve_model(checkpoint)
    if isinstance(found, str):
        raise ConfigError(f"{checkpoint!r} is neither a run nor a checkpoint folder. List runs: crucible runs")
    made = _models().register(found, name=name, tags=dict(pair(one) for one in tag or ()), description=description)
    return Reply(made, f"{made.name}:{made.version}")


def pair(text: str) -> tuple[str, str]:
    """The two sides of `key=value`."""
    key, sign, value = text.partition("=")
    if not (key and sign):
        raise ConfigError(f"The tag {text!r} has no value; expected key=value.")
    return key, value


def models_show(reference: str, /) -> Reply:
    """Show a registered model and where it comes from.

    Args:
        reference: `name`, `name:version` or `name@stage`.
    """
    one, above = _models().get(reference), _models().lineage(reference)
    about = {"model": f"{one.name}:{one.version}", "stage": one.stage, "base model": one.checkpoint.base_model, "description": one.description}
    scores = {key: show.figure(value) for key, value in one.metrics.items()}
    rows = [*about.items(), *one.tags.items(), *scores.items(), ("files", one.checkpoint.local_path), ("made from", ", ".join(one.parents))]
    return Reply({"model": one, "lineage": above}, show.table(("key", "value"), rows, ""))


def models_tag(reference: str, tags: list[str], /) -> Reply:
    """Put tags on a registered model.

    Args:
        reference: `name`, `name:version` or `name@stage`.
        tags: `key=value` each.
    """
    made = _models().tag(reference, dict(pair(one) for one in tags))
    return Reply(made, ", ".join(f"{key}={value}" for key, value in made.tags.items()))


def models_promote(reference: str, stage: Stage, /) -> Reply:
    """Move a registered model to a stage; the production version before it is archived.

    Args:
        reference: `name`, `name:version` or `name@stage`.
        stage: where to.
    """
    made = _models().promote(reference, stage)
    return Reply(made, f"{made.name}:{made.version} is now in {made.stage}.")


def models_alias(name: str, alias: str, version: int | None = None, /) -> Reply:
    """Point an alias at a version, so that `name@alias` means it; without a version it is taken away.

    Args:
        name: of the model.
        alias: a word such as `champion`.
        version: the version's number.
    """
    _models().alias(name, alias, version)
    known = _models().aliases(name)
    return Reply({"model": name, "aliases": known}, ", ".join(f"{name}@{word} is {name}:{at}" for word, at in known.items()) or f"{name} has no alias.")


def models_card(reference: str, /, *, out: Path | None = None) -> Reply:
    """Write a model's card as Markdown: what it is, how it was made, what it scores.

    Args:
        reference: `name`, `name:version`, `name@stage` or `name@alias`.
        out: a file; standard output where none is given.
    """
    text = model_card(_models(), reference, places().runs)
    if out is not None:
        write_atomic(out, text.encode())
    return Reply({"card": text, "path": str(out) if out else None}, str(out) if out else text)


def models_export(
    model: str, to: Path, /, *, kind: Annotated[Literal["peft", "merged", "gguf", "gguf-adapter"], Parameter(name="--format")] = "merged",
    precision: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32",
) -> Reply:  # fmt: skip
    """Write a model for other programs: PEFT, merged safetensors, or GGUF for llama.cpp.

    Args:
        model: a registered model, or a run or checkpoint folder.
        to: a new folder, or a .gguf file.
        kind: `merged` loads in transformers and vLLM, `peft` beside its base, `gguf` in llama.cpp, `gguf-adapter` there beside its base.
        precision: of the weights; q8_0 for gguf only.
    """
    from ..backends.local.export import export_checkpoint

    found = resolve_model(model)
    if isinstance(found, str):
        raise ConfigError(f"{model!r} is a base model, which has nothing to merge. Name a registered model, or a run or checkpoint folder.")
    path = export_checkpoint(found, to, kind, precision=precision)
    return Reply({"path": str(path), "format": kind, "precision": precision}, str(path))


def models_push(reference: str, to: str, /, *, public: bool = False) -> Reply:
    """Copy a registered model, with its card, to a folder or a repository of the Hugging Face hub.

    Args:
        reference: `name`, `name:version`, `name@stage` or `name@alias`.
        to: a new folder, or `hf://owner/name`.
        public: whether everybody may read a repository that is made for it.
    """
    where = push(_models(), reference, to, card=model_card(_models(), reference, places().runs), private=not public)
    return Reply({"to": where}, where)


def models_pull(source: str, name: str = "", /, *, revision: str | None = None) -> Reply:
    """Register what `models push` wrote.

    Args:
        source: a folder, or `hf://owner/name`.
        name: of the model here; the name that it had where none is given.
        revision: of the repository.
    """
    made = pull(_models(), source, name, revision=revision)
    return Reply(made, f"{made.name}:{made.version}")


def register(app: App) -> None:
    """Adds the commands to the tree."""
    kept = App(name="checkpoints", help="List, verify and prune a run's checkpoints.")
    of_run: dict[str, Callable[..., Reply]] = {"list": checkpoints_list, "best": checkpoints_best, "verify": checkpoints_verify, "prune": checkpoints_prune}
    for verb, function in of_run.items():
        kept.command(function, name=verb)
    registry = App(name="models", help="Register, find, tag, promote and share models.")
    verbs: dict[str, Callable[..., Reply]] = {
        "list": models_list, "register": models_register, "show": models_show, "tag": models_tag, "promote": models_promote, "alias": models_alias,
        "card": models_card, "export": models_export, "push": models_push, "pull": models_pull,
    }  # fmt: skip
    for verb, function in verbs.items():
        registry.command(function, name=verb)
    app.command(kept)
    app.command(registry)

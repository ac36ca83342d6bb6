"""What happened and why, as a graph: spans inside spans, events in them, and decisions with their causes.

Built from events (see `crucible_framework.events`); a span whose own event is missing (its process died) still holds its children. Views
as Mermaid and PROV-JSON show the graph's true edges; the HTML view is `crucible_framework.dashboard.render_trace`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from .errors import ConfigError, NotFoundError
from .records import Json, record
from .sinks import read_events

__all__ = ["Kind", "Trace", "TraceDiff", "TraceNode", "diff_traces", "load_trace"]

Kind = Literal["span", "decision", "event"]
Edge: TypeAlias = tuple[str, str, Literal["in", "because"]]
_KNOWN = frozenset(("ts", "name", "run", "span", "parent", "trace", "kind", "seq", "id", "causes", "duration_s", "crc"))


@record
class TraceNode:
    """A span, a decision or an event.

    Attributes:
        parent: the span that it happened in, "" for a root.
        causes: ids of what led to it, as the one who recorded it said.
        start_s, end_s: seconds since the epoch; equal for what has no duration.
        fields: everything else that the event carries.
    """

    id: str
    kind: Kind
    name: str
    parent: str
    causes: tuple[str, ...]
    start_s: float
    end_s: float
    fields: Mapping[str, Json]

    @property
    def title(self) -> str:
        """A decision's question with its answer, else the name."""
        return f"{_text(self.fields.get('what'))}: {_text(self.fields.get('chose'))}" if self.kind == "decision" else self.name

    def shown(self, key: str) -> str:
        """A field's value in one short line; "–" where there is none."""
        value = self.fields.get(key)
        return f"{value:.6g}" if isinstance(value, float) else _line(_text(value), 80) if key in self.fields else "–"

    def label(self, *, fields: bool = True) -> str:
        """The node in one line without control characters: its title, how long it took, and what else is known of it."""
        took = f"  {_seconds(self.end_s - self.start_s)}" if self.end_s > self.start_s else ""
        known = [key for key, value in self.fields.items() if value not in ("", None)] if fields else []
        if self.kind == "decision":
            known = [key for key in known if key not in ("what", "chose")]
        told = "".join(f"  {_line(key, 40)}={self.shown(key)}" for key in known)
        return f"{_line(self.title, 120)}{took}{told}"

    @property
    def confidence(self) -> float | None:
        """How sure a decision was, where that was recorded."""
        return _number(self.fields.get("confidence", self.fields.get("probability")))

    @property
    def because(self) -> str:
        """Why a decision was made, "" where nobody said."""
        return _text(self.fields.get("because", self.fields.get("reason")))


@record
class Trace:
    """The graph, in the order in which things began. `problems` names each line of the file that was damaged and is not in it."""

    nodes: tuple[TraceNode, ...]
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Json]], problems: Sequence[str] = ()) -> Trace:
        """The graph of some events."""
        found: dict[str, TraceNode] = {}
        for index, event in enumerate(events):
            node = _node(event, index)
            found[node.id] = node
        for node in list(found.values()):
            if node.parent and node.parent not in found:  # its end was never written
                found[node.parent] = TraceNode(
                    id=node.parent, kind="span", name="(unfinished)", parent="", causes=(), start_s=node.start_s, end_s=node.end_s, fields={}
                )
        return cls(nodes=tuple(sorted(found.values(), key=lambda n: (n.start_s, -n.end_s))), problems=tuple(problems))

    def __getitem__(self, identity: str) -> TraceNode:
        for node in self.nodes:
            if node.id == identity:
                return node
        raise NotFoundError(f"The trace has no node {identity!r}. Take an id from its nodes.")

    def roots(self) -> tuple[TraceNode, ...]:
        """What happened in no span."""
        return tuple(node for node in self.nodes if not node.parent)

    def children(self, identity: str) -> tuple[TraceNode, ...]:
        """What happened directly in a span."""
        return tuple(node for node in self.nodes if node.parent == identity)

    def within(self, identity: str) -> Trace:
        """The part of the graph below a node, itself included.

        Raises:
            NotFoundError: there is no such node.
        """
        inside = {self[identity].id}
        for node in self._parents_first():
            if node.parent in inside:
                inside.add(node.id)
        return Trace(nodes=tuple(node for node in self.nodes if node.id in inside))

    def _parents_first(self) -> Iterator[TraceNode]:
        below: dict[str, list[TraceNode]] = {}
        for node in self.nodes:
            below.setdefault(node.parent, []).append(node)
        ahead, seen = [""], {""}
        for parent in ahead:
            for node in below.get(parent, ()):
                yield node
                if node.id not in seen:
                    seen.add(node.id)
                    ahead.append(node.id)

    def why(self, identity: str) -> tuple[TraceNode, ...]:
        """Everything that led to a node, nearest first: its causes, their causes, and so on. Each stands once, also in a circle."""
        by_id = {node.id: node for node in self.nodes}
        found: dict[str, TraceNode] = {}
        ahead = list(self[identity].causes)
        for cause in ahead:
            if cause in by_id and cause not in found and cause != identity:
                found[cause] = by_id[cause]
                ahead += by_id[cause].causes
        return tuple(found.values())

    def query(
        self, *, kind: Kind | None = None, name: str = "", text: str = "", min_confidence: float | None = None, max_confidence: float | None = None,
        where: Callable[[TraceNode], bool] | None = None,
    ) -> tuple[TraceNode, ...]:  # fmt: skip
        """The nodes that fit all conditions.

        Args:
            kind: span, decision or event.
            name: the whole name, or its start followed by `*`.
            text: part of the title or of any field, without regard to case.
            min_confidence, max_confidence: of decisions; those without a confidence never fit.
            where: any further test.
        """

        def fits(node: TraceNode) -> bool:
            sure = node.confidence
            return (
                (kind is None or node.kind == kind)
                and (not name or node.name == name or (name.endswith("*") and node.name.startswith(name[:-1])))
                and (not text or text.lower() in f"{node.title} {' '.join(map(str, node.fields.values()))}".lower())
                and (min_confidence is None or (sure is not None and sure >= min_confidence))
                and (max_confidence is None or (sure is not None and sure <= max_confidence))
                and (where is None or where(node))
            )

        return tuple(node for node in self.nodes if fits(node))

    def edges(self) -> tuple[Edge, ...]:
        """(from, to, kind): from a span to what happened in it, from a cause to what it led to; only between nodes that are there."""
        known = {node.id for node in self.nodes}
        inside: list[Edge] = [(node.parent, node.id, "in") for node in self.nodes if node.parent in known]
        because: list[Edge] = [(cause, node.id, "because") for node in self.nodes for cause in node.causes if cause in known]
        return (*inside, *because)

    def counts(self) -> dict[str, int]:
        """How many spans, decisions and events there are."""
        return {f"{kind}s": sum(node.kind == kind for node in self.nodes) for kind in ("span", "decision", "event")}

    # ------------------------------------------------------------------------------------------------------------ views
    def to_tree(self, most: int = 400) -> str:
        """One line a node, indented below the span that it happened in; more than `most` lines are cut and counted."""
        known = {node.id for node in self.nodes}
        below: dict[str, list[TraceNode]] = {}
        for node in self.nodes:
            below.setdefault(node.parent if node.parent in known else "", []).append(node)
        lines: list[str] = []
        ahead = [(node, "", frozenset[str]()) for node in reversed(below.get("", ()))]
        while ahead:
            node, indent, path = ahead.pop()
            lines.append(f"{indent}{node.label()}")
            inner = [one for one in below.get(node.id, ()) if node.kind == "span" and one.id not in path | {node.id}]
            ahead += [(one, f"{indent}  ", path | {node.id}) for one in reversed(inner)]
        cut = [f"… and {len(lines) - most} more"] if len(lines) > most else []
        return "".join(f"{line}\n" for line in (*lines[:most], *cut))

    def to_mermaid(self, most: int = 200) -> str:
        """A Mermaid flow chart; names are quoted, so that no sign in them is syntax. More than `most` nodes are cut and counted."""
        shown = self.nodes[:most]
        names = {node.id: f"n{index}" for index, node in enumerate(shown)}
        shapes = {"span": ("[", "]"), "decision": ("{{", "}}"), "event": ("(", ")")}
        lines = ["flowchart LR"]
        for node in shown:
            opening, closing = shapes[node.kind]
            lines.append(f'  {names[node.id]}{opening}"{_quoted(node.title)}"{closing}')
        for start, end, kind in self.edges():
            if start in names and end in names:
                lines.append(f"  {names[start]} {'-->' if kind == 'in' else '-.->|because|'} {names[end]}")
        if len(self.nodes) > most:
            lines.append(f'  more["{len(self.nodes) - most} more"]')
        return "\n".join(lines) + "\n"

    def to_prov(self) -> dict[str, Json]:
        """PROV-JSON: spans are activities, decisions and events are entities that they generated.

        Source: https://www.w3.org/submissions/prov-json/
        """
        return _prov(self)


def _text(value: Json) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _line(text: str, most: int) -> str:
    """Text in one line that moves no cursor and colours nothing."""
    plain = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(text.split()))
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


def _seconds(duration_s: float) -> str:
    return f"{duration_s:.3g} s" if duration_s >= 1 else f"{1000 * duration_s:.3g} ms"


def _number(value: Json) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _node(event: Mapping[str, Json], index: int) -> TraceNode:
    name, span = _text(event.get("name")), _text(event.get("span"))
    end = _number(event.get("ts")) or 0.0
    duration = _number(event.get("duration_s")) or 0.0
    fields = {key: value for key, value in event.items() if key not in _KNOWN}
    causes = tuple(map(_text, found)) if isinstance(found := event.get("causes"), list) else ()
    if event.get("kind") == "span":
        return TraceNode(id=span, kind="span", name=name, parent=_text(event.get("parent")), causes=causes, start_s=end - duration, end_s=end, fields=fields)
    kind: Kind = "decision" if name == "decision" or ("what" in event and "chose" in event) else "event"
    identity = _text(event.get("id")) or f"e{index}"
    return TraceNode(id=identity, kind=kind, name=name, parent=span, causes=causes, start_s=end - duration, end_s=end, fields=fields)


def load_trace(path: str | Path) -> Trace:
    """The graph of a run folder's events.jsonl, or of an events file.

    Raises:
        NotFoundError: there is no such file.
    """
    path = Path(path)
    file = path / "events.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise NotFoundError(f"There are no events at {str(file)!r}. Expected a run folder, or a file that an event sink wrote.")
    log = read_events(file)
    return Trace.of(log.events, log.problems)


# ------------------------------------------------------------------------------------------------------------------ diff
@record
class TraceDiff:
    """What two traces do not share. `changed` pairs nodes of the same place with the fields that differ: (left, right, fields)."""

    added: tuple[TraceNode, ...]
    removed: tuple[TraceNode, ...]
    changed: tuple[tuple[TraceNode, TraceNode, tuple[str, ...]], ...]
    same: int

    @property
    def summary(self) -> str:
        """ "1 added, 0 removed, 2 changed, 14 the same"."""
        return f"{len(self.added)} added, {len(self.removed)} removed, {len(self.changed)} changed, {self.same} the same"


def _paths(trace: Trace) -> dict[tuple[str, ...], TraceNode]:
    """Each node under its place: the names from the root, and which one of that name it is in its span. Ids and times play no part."""
    places: dict[str, tuple[str, ...]] = {"": ()}
    found: dict[tuple[str, ...], TraceNode] = {}
    counted: dict[tuple[str, ...], int] = {}
    for node in trace._parents_first():
        label = f"decision {_text(node.fields.get('what'))}" if node.kind == "decision" else node.name
        place = (*places.get(node.parent, ()), label)
        counted[place] = counted.get(place, 0) + 1
        place = (*place[:-1], f"{label} #{counted[place]}")
        places.setdefault(node.id, place)
        found[place] = node
    return found


_VOLATILE = re.compile(r"(_s|_bytes|^pid|^path)$|_per_s$")


def diff_traces(left: Trace, right: Trace, *, ignore: Sequence[str] = ()) -> TraceDiff:
    """Compares two traces by the places of their nodes.

    Args:
        left, right: nodes of `right` that `left` lacks are added.
        ignore: fields whose values do not matter; durations, sizes and paths never do.
    """
    if not isinstance(left, Trace) or not isinstance(right, Trace):
        raise ConfigError(f"Cannot compare {type(left).__name__} with {type(right).__name__}; expected two traces. Read them with load_trace.")
    old, new = _paths(left), _paths(right)
    changed, same = [], 0
    for place, node in old.items():
        other = new.get(place)
        if other is None:
            continue
        keys = {k for k in node.fields.keys() | other.fields.keys() if not _VOLATILE.search(k)} - set(ignore)
        differing = tuple(sorted(key for key in keys if node.fields.get(key) != other.fields.get(key)))
        if differing:
            changed.append((node, other, differing))
        else:
            same += 1
    return TraceDiff(
        added=tuple(node for place, node in new.items() if place not in old),
        removed=tuple(node for place, node in old.items() if place not in new),
        changed=tuple(changed),
        same=same,
    )


def _quoted(text: str, most: int = 60) -> str:
    """Text inside a Mermaid label: the signs that end or open something become entities."""
    short = _line(text, most)
    return "".join(sign if sign.isalnum() or sign in " .,:;_-+/=()…" else f"#{ord(sign)};" for sign in short)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _prov(trace: Trace) -> dict[str, Json]:
    names = {node.id: f"crucible:n{index}" for index, node in enumerate(trace.nodes)}
    parts: dict[str, dict[str, Json]] = {"activity": {}, "entity": {}, "wasGeneratedBy": {}, "wasInformedBy": {}, "wasDerivedFrom": {}}
    kinds = {node.id: node.kind for node in trace.nodes}
    for node in trace.nodes:
        told: dict[str, Json] = {"prov:label": node.title, "crucible:id": node.id, "crucible:kind": node.kind}
        if node.kind == "span":
            told |= {"prov:startTime": _time(node.start_s), "prov:endTime": _time(node.end_s)}
        told |= {f"crucible:{re.sub(r'[^A-Za-z0-9_.-]', '_', key)}": str(value) for key, value in node.fields.items() if value is not None}
        parts["activity" if node.kind == "span" else "entity"][names[node.id]] = told
    for index, (start, end, kind) in enumerate(trace.edges()):
        key = f"_:r{index}"
        if kinds[end] == "span" and kinds[start] == "span":
            parts["wasInformedBy"][key] = {"prov:informed": names[end], "prov:informant": names[start]}
        elif kind == "in":
            parts["wasGeneratedBy"][key] = {"prov:entity": names[end], "prov:activity": names[start]}
        elif kinds[start] != "span" and kinds[end] != "span":
            parts["wasDerivedFrom"][key] = {"prov:generatedEntity": names[end], "prov:usedEntity": names[start]}
    found: dict[str, Json] = {"prefix": {"crucible": "https://crucible-framework.invalid/trace#"}}
    filled: dict[str, Json] = {key: part for key, part in parts.items() if part}
    return found | filled

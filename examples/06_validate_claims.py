"""Are a model's claims borne out? Parse them, look at their graph, validate in four stages, let the antagonist object, and gate."""

import crucible_framework as cf
from crucible_framework.evaluation import CLAIM_TARGETS, Thresholds, attack, check_quality, parse_claims, topology, validate, validation_scorers
from crucible_framework.records import Dataset

PROMPT = """Passage:
Document 11: Coffee and sleep

Coffee at night delays sleep by forty minutes. Tea does not delay sleep.

Task:
1. Restate the central hypothesis as CLAIM[c1]."""
TARGET = """CLAIM[c1]: Coffee delays sleep.
CLAIM[c2] (Document 11): Coffee at night delays sleep by forty minutes.
RELATION: c2 supports c1"""
ANSWERS = {
    "right": TARGET,
    "circular": TARGET + "\nRELATION: c1 supports c2",
    "invented": TARGET.replace("Document 11", "Document 99"),
    "chatty": "Sure! Here are the claims:\n" + TARGET,
    "unsupported": TARGET.replace("RELATION: c2", "CLAIM[c3] (Document 11): Milk cures cancer in mice.\nRELATION: c2"),
}

# The baselines compare words, so they take a lower bar. For meaning, pass models:
#   entailment=BySentence(NliModel("cross-encoder/nli-deberta-v3-base")), similarity=EmbeddingSimilarity("sentence-transformers/all-MiniLM-L6-v2")
BAR = Thresholds(entailment=0.5, similarity=0.5)
example = cf.Example(id="coffee", prompt=PROMPT, target=TARGET)

for name, text in ANSWERS.items():
    shape = topology(parse_claims(text))
    found = validate(example, text, thresholds=BAR)
    stages = ", ".join(f"{stage.name} {stage.outcome.value}" for stage in found.stages)
    issues = ", ".join(f"{issue.kind.value} ({issue.severity.name})" for issue in attack(found.signals))
    print(f"{name:11} circuit rank {shape.circuit_rank}, β₁ {shape.betti1}; {stages}\n{'':11} antagonist: {issues or 'no objection'}")
    assert found.passed == (name in ("right", "circular")), "the stages look at claims one by one; circles are the graph's business"

# The same as scorers on a model's answers, with intervals, and a gate on them. A model that was never trained on claims does not pass.
rows = tuple(cf.Example(id=f"coffee-{i}", prompt=f"{PROMPT}\n({i})", target=TARGET) for i in range(4))
card = cf.load_dataset("minifact", limit=4).card
scorers = [*validation_scorers(thresholds=BAR), "schema_compliance", "citation_accuracy", "invented_documents", "cyclic"]
with cf.connect("local") as backend:
    evaluation = cf.evaluate(backend.sampler("tiny"), Dataset(examples=rows, card=card), scorers)
gate = check_quality(evaluation, CLAIM_TARGETS)
print("the gate:", "passed" if gate.passed else "; ".join(f"{short.target}: {short.reason}" for short in gate.shortfalls))
assert not gate.passed

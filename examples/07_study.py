"""A study: two ranks × two seeds, a claim made beforehand, and a report. It can be killed at any moment and resumed."""

import crucible_framework as cf
from crucible_framework import experiments
from crucible_framework.reports.study import write_study_report

experiment = experiments.Experiment(
    name="Does a higher rank learn the claims better?",
    train=cf.TrainConfig(base_model="tiny", max_steps=8, batch_size=4, max_length=512, adam=cf.AdamConfig(lr=5e-3), checkpoint_interval=0),
    matrix={"lora.rank": (2, 16)},
    seeds=(0, 1),
    data=(experiments.DataPlan(name="minifact", train_limit=32, test_limit=24),),
    perplexity=True,
    primary="target_nll",
    sampling=cf.SamplingParams(max_tokens=4, temperature=0.0),
    hypotheses=(
        experiments.Hypothesis(better="lora.rank=16", than="base", because="any training should help"),
        experiments.Hypothesis(better="lora.rank=16", than="lora.rank=2", because="more parameters fit more"),
    ),
)

study = experiments.run(experiment, "runs/study", jobs=0)  # jobs=2: two worker processes; resume=True goes on where a run ended
analysis = experiments.analyse(study)

for contrast in analysis.contrasts:
    kind = "declared" if contrast.declared else "exploratory"
    if contrast.finding is None:
        print(f"{kind:11}  {contrast.name} in {contrast.metric}: {contrast.note}")
        continue
    low, high = contrast.finding.interval
    print(f"{kind:11}  {contrast.name} in {contrast.metric}: {contrast.finding.effect:+.3f} [{low:+.3f}, {high:+.3f}] {contrast.verdict}")

html, _ = write_study_report("runs/study")
print("report:", html)
assert study.finished
assert len(study.of("done")) == 4

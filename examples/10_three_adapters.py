"""Three adapters on one `smollm2-135m`: is their ensemble better than the best of them? Chosen on dev, compared on test, paired, with an interval.

16 steps each take a few minutes and teach next to nothing, so that no difference is shown; STEPS=120 trains as long as the demo does."""

import os
import time

import crucible_framework as cf
from crucible_framework.inference import ChoiceSampler, Ensemble, LogOdds, Member, Pool, learn_accuracies
from crucible_framework.protocols import Sampler
from crucible_framework.records import Ballot

train, dev, test = (cf.load_dataset("minifact", split=split, limit=limit) for split, limit in (("train", 144), ("dev", 27), ("test", 54)))
labels = test.card.labels
greedy = cf.SamplingParams(max_tokens=8, temperature=0.0)


def adapter(backend: cf.Backend, seed: int) -> Sampler:
    """Trained on the same claims in another order, from another start."""
    lora = cf.LoraConfig(rank=8, dropout=0.0, target_modules=("all-linear",), seed=seed)
    config = cf.TrainConfig(
        base_model="smollm2-135m", max_steps=int(os.environ.get("STEPS", "16")), batch_size=9, batching="prefix", schedule="linear", warmup_steps=2, seed=seed,
        adam=cf.AdamConfig(lr=2.5e-3), lora=lora,
    )  # fmt: skip
    with cf.Trainer(backend, config) as trainer:
        trainer.train(train)
        return ChoiceSampler(trainer.sampler(), labels, by="mean")


started = time.monotonic()
with cf.connect("local") as backend:
    members = {f"adapter {seed}": adapter(backend, seed) for seed in (1, 2, 3)}
    print(f"trained in {time.monotonic() - started:.0f} s")

    on_dev = {name: cf.evaluate(sampler, dev, ["label_accuracy"], params=greedy, label=name) for name, sampler in members.items()}
    best = max(on_dev, key=lambda name: on_dev[name]["label_accuracy"].value)
    for name, ran in on_dev.items():
        print(f"dev   {name}: {ran['label_accuracy'].value:.3f}{'  ← best, chosen here' if name == best else ''}")

    history = [[Ballot(member=name, answer=ran.items[i].completion) for name, ran in on_dev.items()] for i in range(len(dev))]
    weights = learn_accuracies(history, [row.target for row in dev])  # from the answers that are there: nobody is asked again
    ensemble = Ensemble(Pool([Member(name=name, sampler=one) for name, one in members.items()]), LogOdds(accuracies=weights, answers=len(labels)), read="text")

    alone = cf.evaluate(members[best], test, ["label_accuracy"], params=greedy, label=best)
    together = cf.evaluate(ensemble, test, ["label_accuracy"], params=greedy, label="ensemble", in_flight=8)
    for ran in (alone, together):
        accuracy = ran["label_accuracy"]
        print(f"test  {ran.model}: {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]")
    found = cf.compare(alone, together, "label_accuracy")
    low, high = found.interval
    print(f"ensemble - best member: {found.effect:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}] on {found.n} claims\n({found.why})")
    print("better" if low > 0 else "worse" if high < 0 else "no difference was shown", f"; {time.monotonic() - started:.0f} s in all", sep="")

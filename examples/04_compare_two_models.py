"""Does the adapter beat its base? Both answer the same items; the difference is paired and clustered by document."""

import crucible_framework as cf

train = cf.load_dataset("minifact", split="train", limit=180)
test = cf.load_dataset("minifact", split="test", limit=54)
config = cf.TrainConfig(base_model="tiny", max_steps=30, batch_size=8, adam=cf.AdamConfig(lr=5e-3), lora=cf.LoraConfig(target_modules=("all-linear",)))
greedy = cf.SamplingParams(max_tokens=20, temperature=0.0)

with cf.connect("local") as backend:
    base = cf.evaluate(backend.sampler("tiny"), test, ["label_accuracy"], params=greedy, label="base")
    with cf.Trainer(backend, config) as trainer:
        trainer.train(train)
        adapter = cf.evaluate(trainer.sampler(), test, ["label_accuracy"], params=greedy, label="adapter")

for evaluation in (base, adapter):
    accuracy = evaluation["label_accuracy"]
    print(f"{accuracy.value:.3f}  [{accuracy.low:.3f}, {accuracy.high:.3f}]  {accuracy.method}")
finding = cf.compare(base, adapter, "label_accuracy")
print(f"difference {finding.effect:+.3f}, 95 % interval [{finding.interval[0]:+.3f}, {finding.interval[1]:+.3f}]: {finding.why}")

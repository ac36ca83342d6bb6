"""Fine-tune an adapter, save it, ask it. Runs in seconds with the built-in tiny model; `smollm2-135m` is the real one."""

import os

import crucible_framework as cf

model = os.environ.get("MODEL", "tiny")
config = cf.TrainConfig(base_model=model, lora=cf.LoraConfig(rank=16), max_steps=10)
dataset = cf.load_dataset("minifact", split="train")

with cf.connect("local") as backend, cf.Trainer(backend, config, folder="runs/first") as trainer:
    result = trainer.train(dataset)
    checkpoint = trainer.save("test-run")
    answers = cf.generate(trainer.sampler(), "Does the Sun heat the Earth?")

print(f"loss {result.initial_loss:.3f} -> {result.final_loss:.3f} nats per token in {result.steps} steps")
print(f"checkpoint: {checkpoint.local_path}")
print(f"answer: {answers[0].text!r}")
assert result.final_loss < result.initial_loss

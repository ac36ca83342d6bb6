"""Stop, resume, pick the best checkpoint, register it and promote it."""

import crucible_framework as cf

config = cf.TrainConfig(base_model="tiny", max_steps=30, checkpoint_interval=10, adam=cf.AdamConfig(lr=5e-3))
dataset = cf.load_dataset("minifact", split="train", limit=60)


def until_15(progress):
    """A callback that ends training early; what was learned is saved first."""
    return "stop" if progress.step >= 15 else None


with cf.connect("local") as backend:
    with cf.Trainer(backend, config, folder="runs/kept", callbacks=[until_15]) as trainer:
        print("stopped at step", trainer.train(dataset).steps)
    with cf.Trainer(backend, config, folder="runs/kept", resume=True) as trainer:
        result = trainer.train(dataset)
print("resumed and finished at step", result.steps)

checkpoints = cf.Checkpoints("runs/kept/checkpoints")
best = checkpoints.best("train/loss")
checkpoints.verify(best)
print("best:", best.name, best.metrics["train/loss"])

models = cf.Models("runs/models")
version = models.register(best, name="claims", tags={"task": "verify"})
models.promote(f"claims:{version.version}", "production")
print("in production:", models.get("claims@production").version)

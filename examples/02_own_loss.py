"""Train with a loss of your own: a function from (data, log-probs) to a summed scalar and metrics."""

import torch

import crucible_framework as cf


def focal(data, logprobs):
    """Cross-entropy that counts what is already likely less: −(1 − p)² log p. Source: Lin et al. 2017, arXiv 1708.02002."""
    total = torch.zeros(())
    for datum, lp in zip(data, logprobs, strict=True):
        weights = torch.as_tensor(datum.weights)
        total = total - (weights * (1 - lp.exp()) ** 2 * lp).sum()
    return total, {}


config = cf.TrainConfig(base_model="tiny", max_steps=20, adam=cf.AdamConfig(lr=5e-3))
dataset = cf.load_dataset("minifact", split="train", limit=40)

with cf.connect("local") as backend, cf.Trainer(backend, config, loss=focal) as trainer:
    result = trainer.train(dataset)
print(f"focal loss {result.initial_loss:.3f} -> {result.final_loss:.3f}")
assert result.final_loss < result.initial_loss

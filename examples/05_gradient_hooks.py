"""Look into the gradients of a run, clip and freeze by layer, take gradients of single examples, and train with privacy."""

import crucible_framework as cf
from crucible_framework.data import render_all
from crucible_framework.training import (
    PrivacyConfig,
    chain,
    clip_layers,
    example_norms,
    freeze,
    health,
    measure_noise_scale,
    noise_multiplier,
    noise_scale,
    train_privately,
)

config = cf.TrainConfig(base_model="tiny", max_steps=8, adam=cf.AdamConfig(lr=5e-3))
dataset = cf.load_dataset("minifact", split="train", limit=24)

# Hooks run in order between backward and step. What they report becomes metrics of the step, under "grad/".
hook = chain(
    "norms",  # per layer, before anything is changed
    "cosine",  # with the step before
    noise_scale(batch_size=config.batch_size, window=4),
    health(exploding=100.0, fail_on=["exploding"]),  # refuses a step instead of ruining the adapter
    freeze("layers.0.*"),
    clip_layers(max_norm=0.5),
)
rows = []


def watch(progress):
    if progress.kind == "step":
        rows.append(progress.metrics)


with cf.connect("local") as backend:
    with cf.Trainer(backend, config, hook=hook, callbacks=[watch]) as trainer:
        trainer.train(dataset)
    for name in ("grad/norm/layers.1.self_attn.q_proj", "grad/cosine/all", "grad/clipped", "grad/noise_trace"):
        print(f"{name:36}", " ".join(f"{row[name]:8.3f}" if name in row else "       –" for row in rows))
    assert all(row["grad/frozen"] == 0.5 for row in rows)

    # The gradient of each example on its own, on weights that stand still.
    data = render_all(dataset, backend.tokenizer("tiny"), 512).data
    session = backend.train("tiny", cf.LoraConfig(dropout=0.0))
    norms = example_norms(session, data)
    print(f"pulls hardest: {data[int(norms.argmax())].id} with {norms.max():.2f}; the median has {sorted(norms)[len(norms) // 2]:.2f}")
    print("noise scale:", measure_noise_scale(session, data))

    # DP-SGD: the least noise for an ε, and what a run with it costs. With so few examples and ε this small, it learns next to nothing.
    noise = noise_multiplier(target=8.0, sampling_rate=0.25, steps=4, delta=1e-3)
    private = PrivacyConfig(clip=1.0, noise=noise, sampling_rate=0.25, steps=4, delta=1e-3)
    result = train_privately(session, data, private)
    print(f"private: ε = {result.epsilon:.2f} at δ = {result.delta:g} with noise {noise:.2f}")
    assert result.epsilon <= 8.0

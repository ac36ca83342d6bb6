"""Training: one loop, schedules, progress. Torch is never imported here; backends have the tensors."""

from .edits import add_noise, clip_layers, freeze, mask, pcgrad, project
from .environment import describe_environment
from .examplewise import NoiseScale, example_gradients, example_norms, gradient_of, measure_noise_scale
from .gradients import chain, cosine, distribution, flow, gradient_hooks, health, noise_scale, norms
from .privacy import PrivacyConfig, PrivateResult, epsilon, noise_multiplier, train_privately
from .progress import progress_bar
from .rates import learning_rate, schedules
from .signals import received_signal
from .trainer import Callback, Progress, Trainer
from .watching import Watched, read_watched, watch

__all__ = [
    "Callback",
    "NoiseScale",
    "PrivacyConfig",
    "PrivateResult",
    "Progress",
    "Trainer",
    "Watched",
    "add_noise",
    "chain",
    "clip_layers",
    "cosine",
    "describe_environment",
    "distribution",
    "epsilon",
    "example_gradients",
    "example_norms",
    "flow",
    "freeze",
    "gradient_hooks",
    "gradient_of",
    "health",
    "learning_rate",
    "mask",
    "measure_noise_scale",
    "noise_multiplier",
    "noise_scale",
    "norms",
    "pcgrad",
    "progress_bar",
    "project",
    "read_watched",
    "received_signal",
    "schedules",
    "train_privately",
    "watch",
]

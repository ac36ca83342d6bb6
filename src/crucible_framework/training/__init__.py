"""Training: one loop, schedules, progress. Torch is never imported here; backends have the tensors."""

from .environment import describe_environment
from .progress import progress_bar
from .rates import learning_rate, schedules
from .signals import received_signal
from .trainer import Callback, Progress, Trainer

__all__ = ["Callback", "Progress", "Trainer", "describe_environment", "learning_rate", "progress_bar", "received_signal", "schedules"]

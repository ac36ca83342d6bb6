"""Asking models: one alone, several that vote, twice where once is slow, and the one that suits. All are Samplers made of Samplers."""

from .answers import Reading, by_embedding, merge_by_meaning, read_answer, read_ranking, same_answer
from .bandits import EXP3, KLUCB, BestPerforming, LeastLoaded, RoundRobin, SlidingWindow, Thompson, Weighted, routers
from .calibration import (
    Abstention,
    Calibration,
    CallCurve,
    abstain_at,
    calls_needed,
    dawid_skene,
    fit_confidence,
    learn_accuracies,
    majority_is_safe,
    samples_needed,
)
from .choices import ChoiceSampler
from .consistency import SelfConsistent
from .ensemble import Ensemble
from .generation import generate
from .hedging import HedgedSampler
from .latency import HedgePlan, Survival, best_hedge
from .ledger import HedgeStats
from .linear import LinUCB
from .offpolicy import OffPolicy, always, off_policy, replayed
from .policies import Adaptive, Fixed, Never, Percentile, default_policy
from .pool import Breaker, Member, Pool, Price, token_confidence
from .routing import Ceiling, Routed, RoutedSampler, load_router, prompt_features, read_routes, save_router
from .streaming import Streamed
from .voting import LogOdds, best_confidence, borda, instant_runoff, majority, plurality, settled, unanimous, votes, weighted

__all__ = [
    "EXP3", "KLUCB", "Abstention", "Adaptive", "BestPerforming", "Breaker", "Calibration", "CallCurve", "Ceiling", "ChoiceSampler", "Ensemble",
    "Fixed", "HedgePlan", "HedgeStats", "HedgedSampler", "LeastLoaded", "LinUCB", "LogOdds", "Member", "Never", "OffPolicy", "Percentile", "Pool",
    "Price", "Reading", "RoundRobin", "Routed", "RoutedSampler", "SelfConsistent", "SlidingWindow", "Streamed", "Survival", "Thompson", "Weighted",
    "abstain_at", "always", "best_confidence", "best_hedge", "borda", "by_embedding", "calls_needed", "dawid_skene", "default_policy",
    "fit_confidence", "generate", "instant_runoff", "learn_accuracies", "load_router", "majority", "majority_is_safe", "merge_by_meaning",
    "off_policy", "plurality", "prompt_features", "read_answer", "read_ranking", "read_routes", "replayed", "routers", "same_answer",
    "samples_needed", "save_router", "settled", "token_confidence", "unanimous", "votes", "weighted",
]  # fmt: skip

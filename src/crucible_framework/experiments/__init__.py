"""Experiments: a plan of arms × seeds × data sets, run so that nothing is lost, and analysed as it was declared beforehand.

Importing it loads no torch and no scipy.
"""

from __future__ import annotations

from .analysis import Analysis, ArmSummary, Contrast, analyse, load_analysis
from .arms import BASE, Arm, Cell, EnsemblePlan, Hypothesis
from .cost import CellCost, Cost, Usage, estimate
from .design import Budget, DataPlan, Experiment, Stopping, experiment_from, load_experiment
from .overview import CellState, StudyOverview, study_overview
from .rankings import Ranking
from .runner import run
from .search import Found, Range, Trial, search
from .study import CellResult, Failure, Study, load_study

__all__ = [
    "BASE",
    "Analysis",
    "Arm",
    "ArmSummary",
    "Budget",
    "Cell",
    "CellCost",
    "CellResult",
    "CellState",
    "Contrast",
    "Cost",
    "DataPlan",
    "EnsemblePlan",
    "Experiment",
    "Failure",
    "Found",
    "Hypothesis",
    "Range",
    "Ranking",
    "Stopping",
    "Study",
    "StudyOverview",
    "Trial",
    "Usage",
    "analyse",
    "estimate",
    "experiment_from",
    "load_analysis",
    "load_experiment",
    "load_study",
    "run",
    "search",
    "study_overview",
]

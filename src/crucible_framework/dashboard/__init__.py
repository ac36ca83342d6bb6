"""The dashboard: a workspace of runs and its model registry as a local web page, live while runs go on; traces and model cards beside it.

Whatever it shows, files say: nothing here trains, decides or keeps state. Importing this folder loads no web library.
"""

from __future__ import annotations

from ..reports.cards import model_card
from ..traces import Trace, TraceDiff, TraceNode, diff_traces, load_trace
from .playground import Answer, Playground
from .server import beside, make_app
from .serving import Dashboard
from .trace_page import render_trace

__all__ = [
    "Answer",
    "Dashboard",
    "Playground",
    "Trace",
    "TraceDiff",
    "TraceNode",
    "beside",
    "diff_traces",
    "load_trace",
    "make_app",
    "model_card",
    "render_trace",
]

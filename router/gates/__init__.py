"""The gates: which experts a row goes to, and with what weights. `registry` has the table of them."""

from __future__ import annotations

from .adaptive import Threshold, TopP
from .base import Gate
from .cosine import Cosine
from .custom import Custom
from .expert_choice import ExpertChoice
from .fixed import Fixed
from .hashed import Hash
from .linear import LinearGate
from .noisy import NoisyTopK
from .registry import GATES, build
from .routing import Routing, join
from .sigmoid import Sigmoid
from .softmax import Switch, TopK

__all__ = [
    "GATES",
    "Cosine",
    "Custom",
    "ExpertChoice",
    "Fixed",
    "Gate",
    "Hash",
    "LinearGate",
    "NoisyTopK",
    "Routing",
    "Sigmoid",
    "Switch",
    "Threshold",
    "TopK",
    "TopP",
    "build",
    "join",
]

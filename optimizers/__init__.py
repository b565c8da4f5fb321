"""OLion, Muon, AdaMuon, Lion and AdamW: one update rule each, one engine for all of them."""

from .adamuon import AdaMuon
from .adamw import AdamW
from .build import build_optimizer
from .engine import RuleOptimizer
from .lion import Lion
from .muon import Muon
from .olion import OLion
from .polar import orthogonalize
from .probe import Probe, probe
from .roles import roles_of
from .rule import RULES, UpdateRule, register
from .wire import count_bytes

__all__ = [
    "RULES",
    "AdaMuon",
    "AdamW",
    "Lion",
    "Muon",
    "OLion",
    "Probe",
    "RuleOptimizer",
    "UpdateRule",
    "build_optimizer",
    "count_bytes",
    "orthogonalize",
    "probe",
    "register",
    "roles_of",
]

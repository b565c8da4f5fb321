"""OLion, Muon, AdaMuon, Lion, AdamW and related optimizers: one update rule each, one engine for all."""

from .adamuon import AdaMuon
from .adamw import AdamW
from .build import build_optimizer
from .curvature import Curvature
from .engine import RuleOptimizer
from .lion import Lion
from .lionmuon import LionMuon
from .muon import Muon
from .normuon import NorMuon
from .olion import OLion
from .polar import orthogonalize
from .polargrad import PolarGrad, PolarSGDM
from .probe import Probe, probe
from .roles import roles_of
from .rule import RULES, UpdateRule, register
from .signum import Signum
from .wire import count_bytes

__all__ = [
    "RULES",
    "AdaMuon",
    "AdamW",
    "Curvature",
    "Lion",
    "LionMuon",
    "Muon",
    "NorMuon",
    "OLion",
    "PolarGrad",
    "PolarSGDM",
    "Probe",
    "RuleOptimizer",
    "Signum",
    "UpdateRule",
    "build_optimizer",
    "count_bytes",
    "orthogonalize",
    "probe",
    "register",
    "roles_of",
]

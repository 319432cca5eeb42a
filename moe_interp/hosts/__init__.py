"""HOW WE GET IN: hosts carry values to and from points. They know no architecture."""

from moe_interp.hosts.experts import Experts, ExpertWeights, expert_weights
from moe_interp.hosts.local import HookPoint, LocalHost
from moe_interp.hosts.session import Session

__all__ = ["ExpertWeights", "Experts", "HookPoint", "LocalHost", "Session", "expert_weights"]

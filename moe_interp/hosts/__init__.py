"""HOW WE GET IN: hosts carry values to and from points. They know no architecture."""

from moe_interp.hosts.calls import Session
from moe_interp.hosts.local import LocalHost, Opening, open_host
from moe_interp.hosts.standing import Standing, Standings
from moe_interp.hosts.taps import HookPoint

__all__ = ["HookPoint", "LocalHost", "Opening", "Session", "Standing", "Standings", "open_host"]

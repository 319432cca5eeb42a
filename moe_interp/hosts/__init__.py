"""HOW WE GET IN: hosts carry values to and from points. They know no architecture."""

from moe_interp.hosts.local import LocalHost, close_host, open_host
from moe_interp.hosts.session import Session
from moe_interp.hosts.taps import HookPoint

__all__ = ["HookPoint", "LocalHost", "Session", "close_host", "open_host"]

"""Token texts as they may be shown: whitespace made visible, everything else escaped.

Tokens come from untrusted texts and untrusted tokenizers. Figures read a small HTML of their own, so texts are escaped
for them as for a page.
"""

import html

_VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}


def shown(token: str, limit: int = 24) -> str:
    """A token for a reader: whitespace as signs, control characters as their code, at most ``limit`` characters."""
    visible = "".join(_VISIBLE.get(sign) or (sign if sign.isprintable() else f"\\x{ord(sign):02x}") for sign in token)
    cut = visible if len(visible) <= limit else visible[: limit - 1] + "…"
    return cut or "∅"


def printable(text: str) -> str:
    """A name for a terminal: control characters, which could steer it, as their code; all else as it is."""
    return "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in text)


def escaped(token: str, limit: int = 24) -> str:
    """The same, escaped for figures."""
    return html.escape(shown(token, limit))

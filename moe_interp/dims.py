"""The letters that name dimensions, in signatures, docstrings and suffixes (``scores_BSE``)."""

LEGEND = {
    "B": "batch",
    "S": "pos",
    "T": "token",  # T = B * S
    "L": "layer",
    "E": "expert",
    "K": "slot",  # the top-k experts of a token, in the model's own order
    "D": "d_model",
    "F": "neuron",
    "V": "vocab",
    "N": "document",
}


def names(dims: str) -> tuple[str, ...]:
    """Full names of space-separated dimension letters: ``names("B S D")`` is ``("batch", "pos", "d_model")``."""
    return tuple(LEGEND[letter] for letter in dims.split())

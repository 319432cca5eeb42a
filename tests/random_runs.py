"""Random runs: what a model might give, padding filled with NaN, and the same as lists for slow references."""

import torch

from moe_interp.run import Routing, Run, Tokens

LAYERS, EXPERTS, TOP_K, VOCABULARY = (1, 3), 6, 3, 9


def random_run(seed: int, lengths: list[int], padding: str = "right") -> Run:
    """A run of texts of these lengths; values of padding are NaN, its ids arbitrary."""
    draw = torch.Generator().manual_seed(seed)
    size = (len(lengths), max(lengths) + 2)
    place = torch.arange(size[1])[None]
    length = torch.tensor(lengths)[:, None]
    mask = place < length if padding == "right" else place >= size[1] - length
    routes = {}
    for layer in LAYERS:
        logits = 3 * torch.randn(*size, EXPERTS, generator=draw)
        scores = logits.softmax(dim=-1)
        ids = (scores + torch.rand(scores.shape, generator=draw)).argsort(dim=-1)[..., :TOP_K]  # not by score
        weights = 1.7 * scores.gather(2, ids)
        nan = torch.where(mask, 0.0, torch.nan)[..., None]
        routes[layer] = Routing(ids, weights + nan, mask, logits + nan, scores + nan)
    return Run(
        torch.zeros(*size, 1),
        torch.randint(VOCABULARY, size, generator=draw),
        Tokens.from_mask(mask, size[1]),
        routes,
        {},
    )


def choices_of(run: Run, documents: list[int]) -> list[dict]:
    """The same as lists, for the reference; padding left out."""
    found = []
    for layer, route in run.routing.items():
        for row, column in run.mask.nonzero().tolist():
            values = {
                name: getattr(route, name)[row, column].tolist() for name in ("ids", "weights", "logits", "scores")
            }
            about = {"token": int(run.token_ids[row, column]), "position": int(run.tokens.index[row, column])}
            found.append({"document": documents[row], "layer": layer, **about, **values})
    return found

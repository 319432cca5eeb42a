"""Rows of the residual stream decoded into what is kept of a distribution over the vocabulary.

`decode_top` takes rows some at a time and keeps only what is reported of them, so that memory grows with the
chunk times the vocabulary and never with parts or positions times the vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_interp.analyses.distributions import expected_log, log_probabilities
from moe_interp.errors import BadInput

Decode = Callable[[Tensor], Tensor]

# Rows decoded at a time: enough for the matrix product to run at full speed.
CHUNK = 1024
# Logits described at a time on a CPU: few enough to stay in its caches while they are passed over again and again.
TILE = 2**20


class Decoded(NamedTuple):
    """What is kept of decoded rows, N positions of P parts each.

    Attributes:
        ids, probabilities: [N, P, top], the most probable tokens.
        true_rank: [N, P], rank of the true next token, 1 for the first, NaN where there is none.
        final_rank: [N, P], rank of the model's own prediction.
        kl: [N, P], KL(final || row) in nats; infinity where the row rules out a token that the model does not.
    """

    ids: Int[Tensor, "N P top"]
    probabilities: Float[Tensor, "N P top"]
    true_rank: Float[Tensor, "N P"]
    final_rank: Int[Tensor, "N P"]
    kl: Float[Tensor, "N P"]


def check_top(top: int, vocabulary: int) -> None:
    """Refuse to keep more of the most probable tokens than there are, or none.

    Raises:
        BadInput: no such number of tokens.
    """
    if not 1 <= top <= vocabulary:
        raise BadInput("top out of range", expected=f"1 to {vocabulary} tokens", got=repr(top))


def decode_top(
    decode: Decode,
    rows: Float[Tensor, "N P D"],
    final: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    *,
    top: int = 5,
    chunk: int = CHUNK,
) -> Decoded:
    """Decode rows, ``chunk`` at a time, and keep what a lens reports of them.

    Args:
        decode: from [n, p, D] to logits [n, p, V], such as ``model.decode``.
        rows: N positions of P parts each.
        final: log-probabilities of the model's own output at each position, in float32.
        targets: the true next token at each position, -1 where there is none.
        top: how many of the most probable tokens to keep.
        chunk: at most so many rows are decoded at a time.

    Raises:
        BadCheckpoint: a row decodes to logits that are no distribution.
    """
    parts = rows.shape[1]
    positions = max(1, chunk // parts)
    blocks = zip(rows.split(positions), final.split(positions), targets.split(positions), strict=True)
    return _joined(
        [
            _joined([_decode(decode, some, own, true, top) for some in block.split(min(chunk, parts), 1)], dim=1)
            for block, own, true in blocks
        ]
    )


def _decode(decode: Decode, rows: Tensor, final: Tensor, targets: Tensor, top: int) -> Decoded:
    logits = decode(rows).to(rows.device)
    positions = max(1, TILE // logits[0].numel()) if logits.device.type == "cpu" else len(logits)
    tiles = zip(logits.split(positions), final.split(positions), targets.split(positions), strict=True)
    return _joined([describe(log_probabilities(tile), own, true, top) for tile, own, true in tiles])


def describe(
    log_p: Float[Tensor, "N P V"], final: Float[Tensor, "N V"], targets: Int[Tensor, " N"], top: int
) -> Decoded:
    """Log-probabilities as what a lens reports of them, beside those of the model's own output."""
    best = log_p.topk(top, dim=-1)
    scratch = torch.empty_like(log_p)
    true_rank = _rank(log_p, targets.clamp(min=0), scratch)
    p = final.exp()
    # 0 log 0 is 0: tokens that cannot come, as those that pad a vocabulary, add nothing.
    cross = torch.mul(log_p, p[:, None], out=scratch).masked_fill_(p[:, None] == 0, 0.0).sum(-1)
    return Decoded(
        ids=best.indices,
        probabilities=best.values.exp(),
        true_rank=true_rank.where(targets[:, None] >= 0, torch.nan),
        final_rank=_rank(log_p, final.argmax(-1), scratch).long(),
        # Rounding can leave a distribution that equals the final one just below zero.
        kl=(expected_log(p, final)[:, None] - cross).clamp(min=0.0),
    )


def _rank(log_p: Tensor, ids: Tensor, scratch: Tensor) -> Tensor:
    """1 + how many tokens are more probable."""
    threshold = log_p.gather(-1, ids[:, None, None].expand(-1, log_p.shape[1], 1))
    # Counted in floats, exact up to 2^24 tokens: summing booleans takes three to ten times as long on a CPU.
    return torch.gt(log_p, threshold, out=scratch).sum(-1) + 1


def _joined(pieces: Sequence[Decoded], dim: int = 0) -> Decoded:
    return Decoded(*(torch.cat(values, dim) for values in zip(*pieces, strict=True)))

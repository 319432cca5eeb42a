"""Next-token distributions from logits, and measures of them, for every analysis that takes logits.

A logit of minus infinity is a token that cannot come, such as those that pad a vocabulary: its probability is 0, and
it adds nothing to an entropy or a divergence, for p log p goes to 0 with p. NaN, plus infinity (which float16 overflows
to) and a row of minus infinity alone are no distribution, and are refused.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_interp.adapters.formulas import not_finite
from moe_interp.errors import BadCheckpoint


def check_logits(logits: Float[Tensor, "*rest V"], mask: Bool[Tensor, "*rest"] | None = None) -> None:
    """Refuse logits that are no distribution, where ``mask`` is True (None: anywhere).

    Raises:
        BadCheckpoint: NaN, plus infinity, or minus infinity at every token of the vocabulary.
    """
    largest = logits.detach().amax(dim=-1)
    found = not_finite(largest if mask is None else largest[mask.to(largest.device)])
    if found is not None:
        raise BadCheckpoint(
            f"logits of {found}",
            expected="finite logits, or minus infinity for tokens that cannot come",
            got=f"{found} in {logits.dtype}",
            do="Load in another dtype, dtype='float32' say; model.audit() says where values leave the range.",
        )


def log_probabilities(logits: Float[Tensor, "*rest V"]) -> Float[Tensor, "*rest V"]:
    """Log-probabilities in float32, in nats; minus infinity where the logit is.

    Raises:
        BadCheckpoint: as `check_logits`.
    """
    check_logits(logits)
    return logits.log_softmax(dim=-1, dtype=torch.float32)


def expected_log(p: Float[Tensor, "*rest V"], log_q: Float[Tensor, "*rest V"]) -> Float[Tensor, "*rest"]:
    """Sum of p log q over the vocabulary, in nats: 0 where p is 0, whatever q is; minus infinity where only q is 0.

    With ``log_q`` of p itself it is the negative entropy. It can be differentiated by ``log_q``.
    """
    return (p * log_q.masked_fill(p == 0, 0.0)).sum(dim=-1)


def divergence(log_p: Float[Tensor, "*rest V"], log_q: Float[Tensor, "*rest V"]) -> Float[Tensor, "*rest"]:
    """KL(p || q) of log-probabilities, in nats: 0 ... infinity, where q rules out what p does not.

    It can be differentiated by ``log_q``.
    """
    p = log_p.exp()
    # The difference first: it is exactly 0 where both are equal.
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(dim=-1)

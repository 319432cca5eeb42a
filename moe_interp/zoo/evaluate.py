"""How well a language model predicts texts it was not trained on, domain by domain, against counting.

Every document is read alone, from its leading `<|endoftext|>` to the end of the context, and all its other
tokens are scored. Per domain the mean is over tokens, in nats per token and in bits per UTF-8 byte (which
does not depend on the tokenizer).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moe_interp.zoo.baselines import NgramModel, bigram_nll, unigram_nll


@torch.no_grad()
def document_nll(model: PreTrainedModel, documents: Sequence[Tensor], batch: int = 16) -> list[Tensor]:
    """Nats [S - 1] of each token but the first, for each document of token ids [S]."""
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    scored: dict[int, Tensor] = {}
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        ids = torch.nn.utils.rnn.pad_sequence([documents[i] for i in chosen], batch_first=True)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nll = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        scored.update({i: row[: len(documents[i]) - 1] for i, row in zip(chosen, nll, strict=True)})
    return [scored[i] for i in range(len(documents))]


def domain_losses(model: PreTrainedModel, documents: dict[str, list[Tensor]]) -> dict[str, float]:
    """Domain -> mean nats per token over all tokens of its documents."""
    return {domain: torch.cat(document_nll(model, ids)).mean().item() for domain, ids in documents.items()}


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """UTF-8 bytes [V] that each token stands for (byte-level BPE writes a byte as one character)."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if i in tokenizer.all_special_ids else len(t) for i, t in enumerate(tokens)])


def compare(
    model: PreTrainedModel, ngrams: NgramModel, documents: list[Tensor], lengths: Tensor
) -> dict[str, int | float]:
    """One domain's row: nats per token and bits per byte of the model, the bigram and the unigram baseline.

    `lengths` [V] is `token_bytes`. Keys are `model_nats`, `model_bits_per_byte` and so on, then `documents`
    and `tokens`.
    """
    nats = {
        "model": torch.cat(document_nll(model, documents)),
        "bigram": torch.cat([bigram_nll(ngrams, ids) for ids in documents]),
        "unigram": torch.cat([unigram_nll(ngrams, ids) for ids in documents]),
    }
    size = sum(lengths[ids[1:]].sum().item() for ids in documents)
    row = {f"{name}_nats": values.mean().item() for name, values in nats.items()}
    bits = {name: values.sum().item() / math.log(2) for name, values in nats.items()}
    row |= {f"{name}_bits_per_byte": total / size for name, total in bits.items()}
    return row | {"documents": len(documents), "tokens": len(nats["model"])}

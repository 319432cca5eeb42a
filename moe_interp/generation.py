"""What a generation is given and gives, besides its edits."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from moe_interp.adapters import ModelSpec
from moe_interp.encode import Inputs


def count_of(model_inputs: Mapping[str, Any]) -> int | None:
    """How many texts model inputs have, as far as they say."""
    given = next((model_inputs[name] for name in ("input_ids", "inputs_embeds") if name in model_inputs), None)
    return None if given is None else len(given)


def continued(
    inputs: Inputs, ids: Any, mask: Tensor | None, spec: ModelSpec, tokenizer: Any
) -> str | list[str] | Tensor:
    """Text if text was given, else ids; ``mask`` [B, S] tells padding from the prompt, which is to the right."""
    texts = isinstance(inputs, Sequence) and bool(inputs) and isinstance(inputs[0], str)
    if not isinstance(ids, Tensor) or not texts:
        return ids
    rows = list(ids)
    if spec.kind == "causal" and mask is not None:  # others return no prompt
        padding = (mask == 0).sum(dim=1).repeat_interleave(len(rows) // len(mask)).tolist()
        rows = [row[left:] for row, left in zip(rows, padding, strict=True)]
    found = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    return found[0] if isinstance(inputs, str) and len(found) == 1 else found

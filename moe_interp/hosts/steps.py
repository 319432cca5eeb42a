"""Which edits fit the steps of a generation."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_interp.errors import BadInput
from moe_interp.interventions import Intervention

# Options of `generate` by which a step has several new tokens, of which some may be taken back.
_SEVERAL_AT_ONCE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")


def check_steps(edits: Sequence[Intervention], options: Mapping[str, Any], config: Any) -> None:
    """Refuse edits at the newest token of a step where steps are not single tokens.

    Args:
        edits: what acts at every step.
        options: arguments of transformers' ``generate``, which stand above what the configs say.
        config: the model's own ``generation_config``.

    Raises:
        BadInput: there are such edits.
    """
    given = [name for name in _SEVERAL_AT_ONCE if _option(name, options, config) is not None]
    last = [one for one in edits if any(position < 0 for position in getattr(one, "positions", None) or ())]
    if given and last:
        raise BadInput(
            "the newest token of a step is not known",
            expected="positions from the start of the text, or a token at each step",
            got=f"positions {last[0].positions} with {', '.join(given)}",  # type: ignore[attr-defined]
            do="Name positions from the start, mark tokens, or leave the option out.",
        )


def check_unguided(edits: Sequence[Intervention], options: Mapping[str, Any], config: Any) -> None:
    """Refuse edits given to a generation with guidance, which also runs the model without the prompt.

    transformers prepares no inputs for these passes, so that they would not have the edits.

    Raises:
        BadInput: classifier-free guidance (Sanchez et al. 2023, arXiv 2306.17806) under such edits.
    """
    scale = _option("guidance_scale", options, config)
    if edits and scale not in (None, 1, 1.0):
        raise BadInput(
            "generate(edit=...) does not edit the passes without the prompt that guidance makes",
            expected="no guidance_scale, or edits that stand",
            got=f"guidance_scale={scale}",
            do="Edit every pass: with model.edit(...): model.generate(..., guidance_scale=...).",
        )


def _option(name: str, options: Mapping[str, Any], config: Any) -> Any:
    """An option of ``generate``: as an argument, else as the config given or the model's own says."""
    if name in options:
        return options[name]
    found = (getattr(one, name, None) for one in (options.get("generation_config"), config))
    return next((value for value in found if value is not None), None)

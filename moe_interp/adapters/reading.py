"""What a model says of itself: its config, where it has one, and its modules."""

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from torch import Tensor, nn

from moe_interp.adapters.spec import Head, ModelSpec
from moe_interp.adapters.sums import Through
from moe_interp.errors import UnsupportedModel

UNBOUNDED = 2**31 - 1


def text_config(hf: nn.Module) -> Any:
    """The config of the language model in a model; None where there is none."""
    config: Any = getattr(hf, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def model_type(hf: nn.Module) -> str:
    """The ``model_type`` of its (text) config; without one, the name of its class."""
    return getattr(text_config(hf), "model_type", None) or type(hf).__name__


def outline(hf: nn.Module) -> str:
    """A model's class and the names of its first modules, for errors."""
    names = [name for name, _ in hf.named_modules() if name and name.count(".") <= 2] or ["no submodules"]
    return f"{type(hf).__name__} with modules {', '.join(names[:12])}"


def attribute(owner: Any, path: str) -> Any:
    """An attribute by its dotted name.

    Raises:
        UnsupportedModel: there is none.
    """
    found = owner
    for name in path.split("."):
        if not hasattr(found, name):
            raise UnsupportedModel(
                f"no attribute {path!r}",
                expected=f"it in {type(owner).__name__}",
                got=f"a {type(found).__name__} without {name!r}",
                do="Name the one that there is in the model's Family.",
            )
        found = getattr(found, name)
    return found


def count(owner: Any, path: str) -> int:
    """An attribute that is a number of something.

    Raises:
        UnsupportedModel: there is none, or it is no number.
    """
    found = attribute(owner, path)
    try:
        return int(found)
    except (TypeError, ValueError):
        raise UnsupportedModel(
            f"{path!r} of {type(owner).__name__} is no count",
            expected="a whole number",
            got=repr(found),
            do="A config may have left it out.",
        ) from None


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward can be given an argument of this name."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(one.name == argument or one.kind is one.VAR_KEYWORD for one in parameters)


def model_sizes(hf: nn.Module, spec: ModelSpec, given: Mapping[str, int]) -> dict[str, Any]:
    """``d_model``, ``vocab_size`` and ``context_length``: as given, else as the config says, else as weights show.

    D is how long the rows of a norm's or a router's weight are, V how many rows the embedding has (or the unembedding,
    where the embedding does not show it). V is 0 for a model that has neither tokens nor a head.

    Raises:
        UnsupportedModel: nothing says one of them.
    """
    ways = {
        "d_model": ("hidden_size", _weight_size(hf, _as_wide_as_the_residual(spec), -1)),
        "vocab_size": ("vocab_size", _rows(hf, spec)),
        "context_length": ("max_position_embeddings", UNBOUNDED),
    }
    config = text_config(hf)
    found = {name: given.get(name) or getattr(config, said, None) or shown for name, (said, shown) in ways.items()}
    for name, size in found.items():
        if size is None:
            raise UnsupportedModel(
                f"cannot tell {name} of {spec.model_type}",
                expected=f"config.{ways[name][0]}, or a weight that shows it",
                got=outline(hf),
                do=f'Give it: Family(sizes=lambda model: {{"{name}": ...}}).',
            )
    return found


def _as_wide_as_the_residual(spec: ModelSpec) -> list[str]:
    """Modules with a weight whose rows are D long: norms, then routers, which may read a narrower stream."""
    norms = [step.module for step in spec.final or () if isinstance(step, Through)]
    norms += [layer.sites["resid_mid"].module for layer in spec.layers if "resid_mid" in layer.sites]
    return norms + [layer.moe.router for layer in spec.layers if layer.moe]


def _rows(hf: nn.Module, spec: ModelSpec) -> int | None:
    embedded = None if spec.embed is None or spec.kind == "other" else _weight_size(hf, [spec.embed], 0)
    if embedded is not None:  # a head may have a row for each label of a classifier
        return embedded
    if spec.unembed is not None:
        return _weight_size(hf, [spec.unembed], 0)
    return 0 if spec.kind == "other" else None


def _weight_size(hf: nn.Module, paths: Iterable[str], dim: int) -> int | None:
    """The size of the first weight among those of some modules."""
    weights = (getattr(hf.get_submodule(path), "weight", None) for path in paths)
    return next((weight.shape[dim] for weight in weights if isinstance(weight, Tensor)), None)


_CLASSIFIERS: dict[str, Head] = {
    "ForSequenceClassification": "pooled",
    "ForTokenClassification": "labels",
    "ForQuestionAnswering": "labels",
}


def head_of(hf: nn.Module, spec: ModelSpec) -> Head:
    """What the output of the unembedding is: `ModelSpec.head`.

    transformers says which module gives logits over the vocabulary, and names the classes of classifiers. Another
    model's head is a language-model head if it has a row for each token of the vocabulary.
    """
    if spec.unembed is None:
        return "tokens"
    entry = hf.get_submodule(spec.entry)
    for name, head in _CLASSIFIERS.items():
        if any(name in kind.__name__ for kind in type(entry).__mro__):
            return head
    rows, tokens = _weight_size(hf, [spec.unembed], 0), spec.embed and _weight_size(hf, [spec.embed], 0)
    own = rows is None or not tokens or rows == spec.vocab_size
    return "tokens" if own or _gives_logits(hf, spec.unembed) else "labels"


def _gives_logits(hf: nn.Module, unembed: str) -> bool:
    """Whether the module that holds the head says that it is the output embedding."""
    says = getattr(hf.get_submodule(unembed.rpartition(".")[0]), "get_output_embeddings", None)
    return says is not None and says() is hf.get_submodule(unembed)


def loss_top_k(hf: nn.Module) -> int | None:
    """K of a model's own load-balance loss, which its class takes from the config; None where it has no such loss."""
    for module in (hf, *hf.children()):
        own = "load_balancing_loss_func" in vars(sys.modules[type(module).__module__])
        for owner in (module, text_config(hf)) if own else ():
            found = getattr(owner, "num_experts_per_tok", None)
            if isinstance(found, int):
                return found
    return None


def padding_id(hf: nn.Module) -> int | None:
    """The token id that a model takes for padding, as its text config or its config says; None where neither does."""
    for config in (text_config(hf), getattr(hf, "config", None)):
        found = getattr(config, "pad_token_id", None)
        if isinstance(found, int) and not isinstance(found, bool) and found >= 0:
            return found
    return None


def arguments_of(hf: nn.Module, spec: ModelSpec) -> frozenset[str] | None:
    """Names of the arguments that a model's forward pass takes; None where they cannot be known.

    A forward that takes any keyword (``**kwargs``) passes it on to the modules that hold the layers. The names that
    these take count as well, and so do those of a ``TypedDict`` that says what the keywords may be.
    """
    names, any_keyword = _named(hf.get_submodule(spec.entry))
    if not any_keyword:
        return frozenset(names)
    found = names.union(*(_named(hf.get_submodule(path))[0] for path in _above_the_layers(spec)))
    return frozenset(found) if names else None


def _above_the_layers(spec: ModelSpec) -> set[str]:
    """Paths of the modules between the one that is called and the layers."""
    split = [layer.path.split(".") for layer in spec.layers]
    above = {".".join(parts[:length]) for parts in split for length in range(1, len(parts))}
    return {path for path in above if path.startswith(spec.entry)}


def _named(module: nn.Module) -> tuple[set[str], bool]:
    """The arguments that a module's own forward names, and whether it takes any keyword."""
    forward = type(bare(module)).forward
    try:
        signature = inspect.signature(forward, eval_str=True)
    except NameError:  # an annotation of names that exist for type checkers alone
        signature = inspect.signature(forward)
    given = list(signature.parameters.values())[1:]
    names = {one.name for one in given if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    keywords = [one.annotation for one in given if one.kind is one.VAR_KEYWORD]
    for annotation in keywords:
        names |= {name for kind in get_args(annotation) for name in getattr(kind, "__annotations__", ())}
    return names, bool(keywords)


def bare(module: nn.Module) -> Any:
    """The module of transformers inside those that TransformerLens has put around it; else the module itself."""
    while isinstance(inner := getattr(module, "original_component", None), nn.Module):
        module = inner
    return module

"""Open a model that somebody has in hand: a transformers model, an nnsight model, a TransformerBridge."""

import sys
from os import PathLike
from typing import Any

from torch import nn

from moe_interp.adapters import is_known
from moe_interp.arguments import checked
from moe_interp.encode import check_tokenizer
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.model import MoEModel
from moe_interp.paths import without_credentials


@checked
def wrap(
    model: Any,
    tokenizer: Any = None,
    *,
    name: str | None = None,
    remote: bool | str = False,
    trust_server: bool = False,
) -> MoEModel:
    """Open a model that is already in memory; nothing in it is copied or changed for good.

    An architecture that is in no table is opened if its structure is a common one and an audit passes; that runs it a
    few times. A model that is open already keeps the description that it was opened by: close it to try another.

    Args:
        model: a transformers model; or an nnsight model or a TransformerBridge, of which the transformers model inside
            is opened.
        tokenizer: may be None; then only token ids are taken. An nnsight model or a bridge brings its own.
        name: for provenance and titles.
        remote: True, or the address of a server: run an nnsight model there, as nnsight's ``remote=`` does. It needs
            no weights here.
        trust_server: whether the server at the address may run code in this process, which nnsight lets it do: it
            unpickles replies. An address needs True.

    Raises:
        UnsupportedModel: its architecture cannot be opened correctly.
        BadInput: no such model, one without weights that is to run here, or what is no tokenizer.
    """
    _check_remote(remote, trust_server)
    check_tokenizer(tokenizer)
    if _is_nnsight(model):
        return _wrap_traced(model, tokenizer, name, remote)
    if remote:
        raise BadInput(
            "only nnsight models run on a server",
            expected="nnsight.TransformersModel(repo_id, task='text-generation', ...)",
            got=type(model).__name__,
        )
    if is_bridge(model):
        return _wrap_bridged(model, tokenizer, name)
    hf = getattr(model, "_orig_mod", model)
    if not isinstance(hf, nn.Module):
        raise BadInput(
            "not a model that is in memory",
            expected="a transformers model, an nnsight model or a TransformerBridge",
            got=repr(hf)[:80],
            do=_instead_of(model),
        )
    _check_weights_are_here(hf)
    return MoEModel(hf, tokenizer, name) if is_known(hf) or not _has_config(hf) else _wrap_unseen(hf, tokenizer, name)


def _check_remote(remote: Any, trust_server: Any) -> None:
    """Refuse what is no server, and an address that nobody said may run code here."""
    address = isinstance(remote, str) and remote.lower().startswith(("http://", "https://"))
    if not isinstance(remote, bool) and remote != "local" and not address:
        raise BadInput(
            "not a server",
            expected='True, or an address that begins with "http"',
            got=without_credentials(repr(remote)),
        )
    if address and not trust_server:
        raise BadInput(
            f"the server at {without_credentials(remote)} could run any code in this process",
            expected="trust_server=True: nnsight unpickles what a server replies",
            got="trust_server=False",
            do="Say so for a server that you run or trust as you trust your own code (docs/ndif.md).",
        )


def _instead_of(given: Any) -> str:
    if isinstance(given, type):
        return f"Pass a model: {given.__name__}.from_pretrained(name)."
    if isinstance(given, MoEModel):
        return "It is open already."
    if isinstance(given, str | PathLike) or hasattr(given, "tokenizer") or hasattr(given, "encode"):
        return "moe.load(name) opens a folder or a hub id, with its tokenizer."
    return "moe.load(name) opens a folder or a hub id."


def _check_weights_are_here(hf: nn.Module) -> None:
    """Refuse parameters on the meta device that nothing brings in: accelerate's offloading does, by its hooks."""
    offloaded = [module for module in hf.modules() if hasattr(module, "_hf_hook")]
    owned = {id(parameter) for module in offloaded for parameter in module.parameters()}
    missing = [name for name, one in hf.named_parameters() if one.is_meta and id(one) not in owned]
    if missing:
        raise BadInput(
            "a model without weights",
            expected="parameters in memory, or offloaded by accelerate",
            got=f"{len(missing)} parameters on the meta device, such as {missing[0]}",
            do="Load the checkpoint: moe.load(name), or from_pretrained.",
        )


def _is_nnsight(model: Any) -> bool:
    envoy = sys.modules.get("nnsight.intervention.envoy")  # whoever has such a model has imported it
    return envoy is not None and isinstance(model, envoy.Envoy)


def _wrap_traced(lm: Any, tokenizer: Any, name: str | None, remote: bool | str) -> MoEModel:
    if remote:
        from moe_interp.remote import RemoteMoEModel

        opened = RemoteMoEModel(lm, remote, name)
        opened.tokenizer = opened.tokenizer if tokenizer is None else tokenizer
        return opened
    if any(parameter.is_meta for parameter in lm._module.parameters()):
        raise BadInput(
            "an nnsight model without weights",
            expected="one that is dispatched, or remote=True",
            got="parameters on the meta device",
            do="Load it with dispatch=True, or moe.wrap(lm, remote=True).",
        )
    from moe_interp.hosts.apart import keep_apart

    model = wrap(lm._module, getattr(lm, "tokenizer", None) if tokenizer is None else tokenizer, name=name)
    model._host.undo.append(keep_apart(lm.interleaver))
    return model


def is_bridge(model: Any) -> bool:
    """Whether a model is a TransformerBridge."""
    lens = sys.modules.get("transformer_lens.model_bridge")
    return lens is not None and isinstance(model, lens.TransformerBridge)


def _wrap_bridged(bridge: Any, tokenizer: Any, name: str | None) -> MoEModel:
    from moe_interp.hosts.bridge import check_raw

    check_raw(bridge)
    return wrap(bridge.original_model, bridge.tokenizer if tokenizer is None else tokenizer, name=name)


def _has_config(hf: nn.Module) -> bool:
    return hasattr(hf, "config") and hasattr(hf.config, "get_text_config")


def _wrap_unseen(hf: nn.Module, tokenizer: Any, name: str | None) -> MoEModel:
    """The first proposal that an audit passes."""
    from moe_interp.adapters.unseen import proposals

    failed: list[str] = []
    for spec in proposals(hf):
        model = MoEModel(hf, tokenizer, name, spec)
        try:
            audit = model.audit()
        except BaseException:
            model.close()
            raise
        if audit.passed:
            return model
        model.close()
        failed.append(", ".join(check.name for check in audit.checks if not check.passed))
    raise UnsupportedModel(
        f"cannot open model type {spec.model_type!r}, which is in no table",
        expected="a structure that adds up",
        got=f"audits that fail: {min(failed, key=len)}",
        do="Describe it by moe.register_adapter(model_type, moe.Family(...)); model.audit() says if it is right.",
    )

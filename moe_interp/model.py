"""A mixture-of-experts model whose inside can be read and edited."""

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache, partial
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_interp import __version__
from moe_interp.adapters import ModelSpec, describe
from moe_interp.adapters.experts import Experts, ExpertWeights
from moe_interp.adapters.formats import check_weights, rounding_without_gradient
from moe_interp.adapters.formulas import logits_of, out_of_range, output_of, watched
from moe_interp.adapters.sums import follow
from moe_interp.arguments import checked, described, shown
from moe_interp.encode import Inputs, check_room, encode
from moe_interp.errors import BadCheckpoint, BadInput, UnsupportedModel
from moe_interp.generation import continued, count_of
from moe_interp.hosts import Session, Standing, Standings, open_host
from moe_interp.hosts.program import Program
from moe_interp.hosts.steps import check_unguided
from moe_interp.interventions import Intervention
from moe_interp.measured import code_version, edits_told, fingerprint
from moe_interp.run import Read, Run, positions_of

if TYPE_CHECKING:
    from moe_interp.audit import Audit

Reads = Sequence[str | Read]
Edits = Sequence[Intervention] | Intervention


def _open_instead(given: Any) -> str | None:
    if isinstance(given, nn.Module):
        return "Open it: moe.wrap(model, tokenizer)."
    return "Load it: moe.load(name)." if isinstance(given, str | PathLike) else None


@described("an opened model", _open_instead)
class MoEModel:
    """A transformers model, its tokenizer, and the points of its inside.

    The model stays instrumented until `close`, or the end of the ``with`` that it is used in. Wrapping one model twice
    is fine: it is restored when the last wrapper closes. Several threads and tasks may use it at a time: what one of
    them reads and edits is its own.

    Attributes:
        hf: the transformers model itself.
        spec: what its architecture computes.
        tokenizer: may be None; then only token ids are taken.
        name: for provenance and titles.
    """

    spec: ModelSpec
    here = True  # whether the weights are in this process

    @checked
    def __init__(self, hf: nn.Module, tokenizer: Any = None, name: str | None = None, spec: ModelSpec | None = None):
        # torch.compile puts a model into a wrapper, whose hooks the model's own methods would not reach.
        hf = getattr(hf, "_orig_mod", hf)
        self.hf, self.tokenizer = hf, tokenizer
        self._open(hf, describe(hf) if spec is None else spec)
        self.name = name or getattr(hf, "name_or_path", "") or self.spec.model_type

    def _open(self, hf: nn.Module, spec: ModelSpec) -> None:
        self.spec, self._closed = spec, False
        self._opening = open_host(hf, spec)
        self._host = self._opening.host
        self.spec = self._host.spec  # of a model that is open already, what it was opened by
        self._began: WeakSet[Standing] = WeakSet()  # what was begun to stand by this wrapper

    def close(self) -> None:
        """End the edits that stand by `edit`, and leave the transformers model as it was found."""
        if not self._closed:
            for standing in list(self._began):
                standing.end()
            self._opening.close()
            self._closed = True

    def __repr__(self) -> str:
        s = self.spec
        sizes = f"{s.num_layers} layers, {len(self.layers)} of them MoE, of {s.num_experts} experts, top_k {s.top_k}"
        return f"{type(self).__name__}({self.name!r}, {s.model_type}: {sizes})"

    def __enter__(self) -> "MoEModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers that text reaches, as the checkpoint numbers its layers.

        Vision experts, which only images reach, are layers too: ``model.spec.moe_layers`` has all.
        """
        return tuple(layer for layer in self.spec.moe_layers if self.spec.layers[layer].stack != "vision")

    @property
    def points(self) -> tuple[str, ...]:
        """Names of the points that this architecture has."""
        return self.spec.points

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        parameter = self._first_parameter
        if not parameter.is_meta:
            return parameter.device
        # Offloaded: accelerate says where its forward will run.
        hook = getattr(self._embedding, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self._first_parameter.dtype

    @property
    def _embedding(self) -> nn.Module:
        return self.hf if self.spec.embed is None else self.hf.get_submodule(self.spec.embed)

    @property
    def _first_parameter(self) -> Tensor:
        return next(self._embedding.parameters())

    @checked
    def run(
        self,
        inputs: Inputs,
        *,
        read: Reads | str | Read = (),
        edit: Edits = (),
        grad: bool = False,
        output: bool = True,
    ) -> Run:
        """One forward pass: read points, make edits.

        Args:
            inputs: a text, texts, token ids [S] or [B, S] (rows of any lengths), or a mapping of model inputs.
            read: names of points (at all their layers) or ``moe.select(...)``.
            edit: interventions, carried out in order.
            grad: keep the graph, so that gradients reach what was read.
            output: keep the logits, which are large; else a model of transformers unembeds the last token of each text
                alone, unless it is given labels.

        Raises:
            UnknownName: a point, layer or expert that the model does not have.
            BadInput: inputs or edits that cannot be right, or gradients of weights that have none.
            BadCheckpoint: the weights are not finite.
        """
        return self._run(inputs, read, edit, grad, output)

    def _run(
        self,
        inputs: Inputs,
        read: Reads | str | Read,
        edit: Edits,
        grad: bool = False,
        output: bool = True,
        forms: dict[str, Any] | None = None,
    ) -> Run:
        """A run that also notes what each layer returns besides the residual, by path."""
        self._check_open()
        if grad:
            self._check_gradients()
        interventions = [*self._standing, *listed(edit, Intervention)]
        reads = [as_read(one) for one in listed(read, (str, Read))]
        model_inputs = self._complete(inputs)
        unembedded: list[Tensor] = []

        def last_alone(hidden: Tensor) -> Tensor:
            unembedded.append(hidden)
            return hidden[:, -1:]

        change = last_alone if self._trims(output, model_inputs) else None
        session = Session(self._host, interventions, reads, grad, self.decode, unembed=change, forms=forms)
        returned = session(lambda: self.forward(model_inputs))
        self._check_finite(next(iter(unembedded), returned), session.program.tokens.mask, bool(interventions))
        return self._run_of(session.program, model_inputs, returned if output else None)

    def _trims(self, output: bool, model_inputs: Mapping[str, Any]) -> bool:
        """Whether the last token of each text alone is to be unembedded."""
        return not output and "labels" not in model_inputs and self.spec.head == "tokens"

    def _complete(self, inputs: Inputs) -> dict[str, Any]:
        """Model inputs that a forward pass can be made of."""
        model_inputs = self.encode(inputs)
        if self.spec.kind == "encoder-decoder" and not {"decoder_input_ids", "labels"} & model_inputs.keys():
            raise BadInput(
                "an encoder-decoder needs something to decode",
                expected='a mapping with "input_ids" and "decoder_input_ids"',
                got=f"one with {', '.join(model_inputs)}",
                do="model.generate needs input_ids alone.",
            )
        return model_inputs

    def _run_of(self, program: Program, model_inputs: Mapping[str, Any], kept: Tensor | None) -> Run:
        """What a program's pass leaves."""
        ids = "decoder_input_ids" if self.spec.kind == "encoder-decoder" else "input_ids"
        return Run(
            kept=kept,
            token_ids=model_inputs.get(ids),
            tokens=program.tokens,
            routing=program.routing(),
            values=program.values,
            touched=tuple(program.touched),
            provenance=self._about() | _told(program.interventions),
            has_head=self.spec.unembed is not None,
            tops=program.tops,
            places={key: read.positions for key, read in program.reads.items() if read.positions is not None},
        )

    @checked
    def generate(self, inputs: Inputs, *, edit: Edits = (), **options: Any) -> str | list[str] | Tensor:
        """transformers' ``generate`` under edits, which act at every step.

        Positions count from the start of the text; negative ones from the newest token of each step.

        Returns:
            The continued text (or texts) if given text; else what transformers returns: token ids [B, S + new],
            prompt included.

        Raises:
            UnsupportedModel: a model that does not write text, or has no ``generate``.
            BadInput: more tokens than the context length, edits at a step's newest token where a step has several, or
                edits given here of a generation with ``guidance_scale``.
            BadCheckpoint: the weights, or logits that no edit has changed, are not finite.
        """
        self._check_open()
        if self.spec.kind not in ("causal", "encoder-decoder") or not self.spec.predicts_tokens:
            raise UnsupportedModel(
                f"{self.spec.model_type} generates nothing",
                expected="a model that predicts tokens, with its head",
                got=self.spec.gives,
                do="Use run.",
            )
        from transformers import LogitsProcessorList

        entry = cast(Any, self.hf.get_submodule(self.spec.entry))
        if not hasattr(entry, "generate"):
            raise UnsupportedModel(
                f"{self.spec.model_type} has no generate",
                expected="a model with transformers' GenerationMixin",
                got=type(entry).__name__,
                do="Use run, a token at a time.",
            )
        edits = [*self._standing, *listed(edit, Intervention)]
        check_unguided(listed(edit, Intervention), options, entry.generation_config)
        given = encode(inputs, self.tokenizer, self.spec, self.device, padding_side="left")
        check_room(given, self.spec, options.get("generation_config") or entry.generation_config, options)
        checked = watched(partial(self._not_finite, edited=bool(edits)))
        options["logits_processor"] = LogitsProcessorList([checked, *(options.get("logits_processor") or ())])
        session = Session(self._host, edits, whole=False, routing=False, texts=count_of(given), steps=True)
        ids = session(lambda: entry.generate(**given, **options))
        return continued(inputs, ids, given.get("attention_mask"), self.spec, self.tokenizer)

    @checked
    def edit(
        self, *edits: Intervention | Sequence[Intervention], everywhere: bool = False
    ) -> AbstractContextManager[Standing]:
        """Edits that stand inside the ``with``.

        They act in `run` and `generate`, before those given there, so in every analysis (those that call `experts`
        refuse edits of what these put out); and in calls of the transformers model itself, gradients as they are. What
        others hook to a point there, or take in a trace, is what the edits made of its value.

        They act in this context alone: not in other threads, nor in tasks that were begun before. A thread joins by
        ``contextvars.copy_context().run``. A pass that is made elsewhere meanwhile has no edits, and warns once
        (`moe.EditsElsewhere`).

        ``with model.edit(...) as standing`` gives what knows how often each touched something in direct calls,
        ``standing.touched``; runs tell it themselves.

        Args:
            edits: interventions, carried out in order, after those that stand already.
            everywhere: act in all contexts, before what stands in single ones.

        Raises:
            UnknownName: a point, layer or expert that the model does not have.
            BadInput: edits that contradict each other.
        """
        self._check_open()
        given = [one for some in edits for one in listed(some, Intervention)]
        self._check_edits([*self._standing, *given])
        standing = Standing(given, everywhere=everywhere)
        self._began.add(standing)
        return self._standings.stand(standing)

    def _check_edits(self, edits: Sequence[Intervention]) -> None:
        """Refuse what the model cannot have."""
        program = Program(self.spec, edits)
        if self.here:
            self._host.check_in_place({layer for _, layer in program.edits})

    @property
    def _standings(self) -> Standings:
        return self._host.standings

    @property
    def _standing(self) -> list[Intervention]:
        return self._standings.edits()

    @checked
    def forward(self, model_inputs: Mapping[str, Any]) -> Tensor:
        """The model's own forward pass: logits, or the last hidden states of a model without a head."""
        entry = self.hf.get_submodule(self.spec.entry)
        return output_of(self.spec, entry(**{**self.spec.options, **model_inputs}))

    @checked
    def decode(self, hidden: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Logits of a residual stream: the model's own final norm, unembedding, scale and soft-cap.

        Of a model without a head, the final norm alone. Where the residual has several streams, ``hidden`` has them.

        Raises:
            UnsupportedModel: more than the residual goes into the logits.
            BadInput: the model is closed, or ``hidden`` is no residual stream of it.
        """
        self._check_not_closed()
        spec = self.spec
        if spec.final is None:
            raise UnsupportedModel(
                f"{spec.model_type} cannot decode a residual stream",
                expected="logits that follow from the last residual alone",
                got="an architecture that uses earlier ones too",
            )
        if hidden.is_meta or hidden.shape[-1:] != (spec.d_model,):
            raise BadInput("not a residual stream", expected=f"[..., {spec.d_model}]", got=shown(hidden))
        normed = follow(self.hf, spec.final, hidden)
        if spec.unembed is None:
            return normed
        # As rows, which no run takes for the hidden states of its own batch.
        places, size = normed.shape[:-1], normed.shape[-1]
        logits = self.hf.get_submodule(spec.unembed)(normed.reshape(places.numel(), size))
        return logits_of(spec, logits.reshape(*places, logits.shape[-1]))

    @checked
    def experts(self, layer: int) -> Experts:
        """The experts of a layer, without standing edits, as a function of any input and any expert ids.

        Raises:
            UnknownName: no such MoE layer.
            BadInput: the model is closed.
        """
        self._check_not_closed()
        moe = self.spec.moe(layer)
        module = self.hf.get_submodule(moe.experts)
        return Experts(module, moe.num_experts, moe.kernel, lambda rows: follow(self.hf, moe.experts_input, rows))

    @checked
    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """One expert's matrices, in one layout for every architecture.

        Raises:
            UnknownName: no such layer or expert.
        """
        self.spec.check_expert(layer, expert)
        moe = self.spec.moe(layer)
        return moe.kernel.weights(self.hf.get_submodule(moe.experts), expert)

    def provenance(self) -> dict[str, str | int | float]:
        """What a result must say about the model it was measured on, standing edits included where there are some.

        With a fingerprint of the weights (`moe_interp.measured.fingerprint`), which takes a pass over the routers.
        """
        weights = {"weights": fingerprint(self.hf, self.spec)} if self.here else {}
        return self._about() | weights | {"code": code_version()}

    def _about(self) -> dict[str, str | int | float]:
        """The part of `provenance` that costs nothing, for every run."""
        return {
            "model": self.name,
            **_told(self._standing),
            "model_type": self.spec.model_type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "moe_interp": __version__,
            "transformers": _transformers(),
            "torch": torch.__version__,
        }

    @checked
    def encode(self, inputs: Inputs) -> dict[str, Any]:
        """The inputs that the transformers model is given for a text, texts or token ids.

        Raises:
            BadInput: inputs that cannot be right.
        """
        return encode(inputs, self.tokenizer, self.spec, self.device)

    @property
    def exact(self) -> bool:
        """Whether all mixtures run on transformers' ``grouped_mm``, to which an untouched run is bit-equal."""
        return self._host.exact

    @property
    def plain_experts(self) -> frozenset[str | None]:
        """The implementations of transformers that run in `plain`, for mixtures that ask for one.

        "grouped_mm"; "eager" where that cannot run; None where neither can on this device.
        """
        return frozenset(self._host.plain.values())

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The model as it was found, uncompiled, with transformers' own experts, in this context inside the ``with``.

        They are its ``grouped_mm`` where that can run, else ``eager``, its loop over experts. One inside another
        changes nothing.

        Raises:
            UnsupportedModel: neither can: FP8 experts on CPU.
            BadInput: the model is closed.
        """
        self._check_not_closed()
        with self._host.plainly():
            yield

    @checked
    def audit(self, inputs: Inputs | None = None) -> "Audit":
        """Check this checkpoint: completeness, bit-equality, relations between points, and that edits take.

        Args:
            inputs: what to run on; by default a few random token ids, seeded.

        Raises:
            BadInput: the model is closed, plain or under standing edits, or inputs that cannot be right.
        """
        from moe_interp.audit import audit

        self._check_open()
        return audit(self, inputs)

    def _check_not_closed(self) -> None:
        if self._closed:
            raise BadInput("the model is closed", expected="an open MoEModel", do="Wrap or load it again.")

    def _check_open(self) -> None:
        self._check_not_closed()
        if self._standings.plain:
            raise BadInput("the model is plain", expected="a call outside `with model.plain()`")

    def _check_gradients(self) -> None:
        rounding = rounding_without_gradient(self.hf)
        if rounding is not None:
            raise BadInput(
                "gradients would be wrong",
                expected="weights that multiply what they are given as it is",
                got=f"{rounding}, which rounds it to 8 bits first",
                do="Load with weights that are quantised alone, such as torchao's Int8WeightOnlyConfig.",
            )
        anew = [module for module in self._host.recomputed if module.training and module.gradient_checkpointing]
        if anew:
            raise BadInput(
                "gradients would be wrong",
                expected="activations that are kept: a layer that is computed anew does not go on with what was read",
                got="a model in training with gradient checkpointing",
                do="model.hf.eval(), or model.hf.gradient_checkpointing_disable(); or backward inside model.edit(...).",
            )

    def _check_finite(self, logits: Tensor, mask: Tensor, edited: bool) -> None:
        found = out_of_range(logits, mask)
        if found is not None:
            self._not_finite(found, edited)

    def _not_finite(self, found: str, edited: bool) -> None:
        """Logits are NaN or infinite: say why."""
        check_weights(self.hf)
        if edited:  # the edit may have meant it
            return
        raise BadCheckpoint(f"the model returned {found}", expected="finite logits", do="Try another dtype.")


@cache
def _transformers() -> str:
    """The installed version, which takes milliseconds to look up."""
    return importlib.metadata.version("transformers")


def _told(edits: Sequence[Intervention]) -> dict[str, str]:
    """Edits as a result names them."""
    return {"edits": edits_told(edits)} if edits else {}


def as_read(one: str | Read) -> Read:
    """What to keep, however it was asked for."""
    return (
        Read(one)
        if isinstance(one, str)
        else replace(one, layers=positions_of(one.layers), positions=positions_of(one.positions))
    )


def listed(given: Any, kinds: Any) -> list[Any]:
    """One or several things of some kinds, as a list.

    Raises:
        BadInput: something else.
    """
    items = list(given) if isinstance(given, Iterable) and not isinstance(given, kinds) else [given]
    for item in items:
        if not isinstance(item, kinds):
            raise BadInput(
                "not something that can be read or made",
                expected="point names or moe.select(...) to read, interventions such as moe.ablate(...) to edit",
                got=repr(item),
            )
    return items

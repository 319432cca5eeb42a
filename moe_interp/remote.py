"""A model on a remote server, reached through nnsight: `run`, `generate` and the analyses that are made of them.

Each run is one request: a program of edits and reads (`moe_interp.hosts.program`) is sent along with a trace, follows
every point through the modules of the server's model, and sends back what was to be kept. No weights are needed here,
so what needs them (experts on other inputs, matrices, gradients, the unembedding) is refused, with a way round where
there is one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn
from weakref import WeakSet

import nnsight
import torch
from nnsight.intervention.backends.remote import RemoteError
from torch import Tensor, nn

from moe_interp import errors
from moe_interp.adapters import ModelSpec, describe
from moe_interp.encode import Inputs, encode
from moe_interp.errors import BadCheckpoint, RemoteFailure, UnsupportedModel
from moe_interp.generation import continued
from moe_interp.hosts.passes import Pass, stock_pass
from moe_interp.hosts.program import Block, Edited, Program
from moe_interp.hosts.sending import sent
from moe_interp.hosts.standing import Standings
from moe_interp.hosts.stock import reached
from moe_interp.hosts.tokens import tokens_of
from moe_interp.interventions import Intervention
from moe_interp.model import Edits, MoEModel, Reads, as_read, listed
from moe_interp.run import Read, Run, TopTokens


class SentPass(Pass):
    """A pass that is made anew where it is sent."""

    def __init__(self, lm: Any, spec: ModelSpec, edits: Edited, reads: Sequence[Read]):
        super().__init__(lm, spec, edits, reads)
        self.lm, self.edits, self.reads = lm, tuple(edits), tuple(reads)

    def __reduce__(self) -> tuple[Any, ...]:
        return sent(stock_pass, self.lm, self.spec, self.edits, self.reads, apart=[self.lm])


class RemoteMoEModel(MoEModel):
    """A mixture-of-experts model on a server, and the points of its inside.

    Attributes:
        lm: the nnsight model.
        remote: what nnsight's ``remote=`` is given: True, or the address of a server.
    """

    here = False

    def __init__(self, lm: Any, remote: bool | str = True, name: str | None = None):
        self.lm, self.remote = lm, remote
        self.tokenizer = getattr(lm, "tokenizer", None)
        self._stands, self._began = Standings(), WeakSet()
        self.spec, self._closed = reached(describe(lm._module)), False
        self._told = {"dtype": str(next(lm._module.parameters()).dtype), "device": "remote"}
        self.name = name or getattr(lm, "repo_id", None) or self.spec.model_type

    def close(self) -> None:
        """Nothing is open here but edits that stand, which end."""
        self._closed = True
        self._stands.end()

    @property
    def _standings(self) -> Standings:
        return self._stands

    @property
    def device(self) -> torch.device:
        """Where inputs and what comes back are: in this process."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the server computes in, as far as it has said so; before, that of the checkpoint's config."""
        return getattr(torch, self._told["dtype"].removeprefix("torch."))

    def run(
        self,
        inputs: Inputs,
        *,
        read: Reads | str | Read = (),
        edit: Edits = (),
        grad: bool = False,
        output: bool = True,
    ) -> Run:
        """One forward pass on the server: read points, make edits, as `MoEModel.run` does.

        What is read comes over the network: ``moe.select(..., layers=, positions=, top=)`` and ``output=False`` keep
        that small.

        Raises:
            UnknownName, BadInput: as there.
            UnsupportedModel: an edit that cannot be made with the server's modules alone, or gradients.
            RemoteFailure: the server could not run it.
        """
        self._check_open()
        if grad:
            self._refuse("gradients", "Servers keep none; use a model in this process.")
        edits = [*self._standing, *listed(edit, Intervention)]
        reads = [as_read(one) for one in listed(read, (str, Read))]
        given = self._complete(inputs)
        program = self._program(given, edits, reads)
        told = self._send(SentPass(self.lm, self.spec, edits, reads), given, output)
        _fill(program, told)
        if told["wrong"] and not edits:
            raise BadCheckpoint(
                f"the model returned {told['wrong']}",
                expected="finite logits",
                got=f"{told['wrong']} from the server",
                do="Check the server's model: its weights, or a dtype whose range is too small.",
            )
        self._told = {"dtype": told["dtype"], "device": told["device"]}
        return self._run_of(program, given, told["output"])

    def run_blocks(self, given: Mapping[str, Any], blocks: Sequence[Block], at: Tensor) -> tuple[Tensor, list[int]]:
        """One pass in which each block of rows has edits of its own: logits [n, V] at the marked tokens [B, S].

        Returns:
            The logits, and how many values each edit changed.

        Raises:
            UnsupportedModel: an edit that cannot be made with the server's modules alone.
            RemoteFailure: the server could not run it.
        """
        self._check_open()
        self._program(given, blocks, ())
        told = self._send(SentPass(self.lm, self.spec, blocks, ()), given, at)
        return told["output"], told["touched"]

    def _program(self, given: Mapping[str, Any], edits: Any, reads: Sequence[Read], whole: bool = True) -> Program:
        """The same program here: it refuses what cannot be right before anything is sent."""
        program = Program(self.spec, edits, reads, decode=lambda hidden: hidden)
        if program.widths or program.exchanges:
            self._refuse("edits of modules", "top_k above the model's own K and swapped layers need the model here.")
        program.begin(tokens_of(self.spec, (), dict(given)), whole)
        return program

    def _send(self, job: SentPass, given: Mapping[str, Any], output: bool | Tensor) -> dict[str, Any]:
        lm, options, blocks = self.lm, dict(self.spec.options), job.blocks
        given, remote, told = dict(given), self.remote, None
        with self._failing(), lm.trace(remote=remote, **options) as tracer:
            with tracer.invoke(given):
                job.begin()
                returned = lm.output
                told = nnsight.save(job.result(returned, output))
            for name in blocks:
                with tracer.invoke():
                    job.follow(name)
        if told is None:
            raise RemoteFailure("nothing came back", expected="what was read", got="a server that returned no values")
        return told

    def generate(self, inputs: Inputs, *, edit: Edits = (), **options: Any) -> str | list[str] | Tensor:
        """transformers' ``generate`` on the server under edits, which act at every step.

        Raises:
            UnsupportedModel: a model that does not write text, or edits of modules.
            RemoteFailure: the server could not run it.
        """
        self._check_open()
        if self.spec.kind != "causal" or not self.spec.predicts_tokens:
            raise UnsupportedModel(
                f"{self.spec.model_type} does not generate on a server", expected="a causal model", got=self.spec.gives
            )
        edits = [*self._standing, *listed(edit, Intervention)]
        given = encode(inputs, self.tokenizer, self.spec, self.device, padding_side="left")
        self._program(given, edits, (), whole=False)
        ids = self._send_generation(SentPass(self.lm, self.spec, edits, ()), given, options)
        return continued(inputs, ids, given.get("attention_mask"), self.spec, self.tokenizer)

    def _send_generation(self, job: SentPass, given: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor:
        lm, blocks, given, remote, ids = self.lm, job.blocks, dict(given), self.remote, None
        with self._failing(), lm.generate(remote=remote, **options) as tracer:
            with tracer.invoke(given):
                ids = nnsight.save(tracer.result)
            with tracer.invoke():
                for _ in tracer.iter[:]:
                    job.begin()
            for name in blocks:
                with tracer.invoke():
                    for _ in tracer.iter[:]:
                        job.follow(name)
        if ids is None:
            raise RemoteFailure("nothing came back", expected="token ids", got="a server that returned no values")
        return ids

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except RemoteError as error:
            last = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason")
            ours = re.fullmatch(r"moe_interp_\w+\.errors\.(\w+): (.*)", last)
            if ours:  # the same error as here
                raise getattr(errors, ours[1])(ours[2]) from error
            raise RemoteFailure(
                "the server could not run this",
                expected=f"a deployment of {self.name} that nnsight can trace",
                got=last,
                do="The error that this one follows from has the server's traceback.",
            ) from error

    # ---- what needs the weights -----------------------------------------------------------------------------

    @property
    def hf(self) -> nn.Module:  # type: ignore[override]
        """Refused: the weights are on the server."""
        self._refuse("the modules of the model", "Open the checkpoint here, or use an analysis that only runs it.")

    @property
    def _host(self) -> NoReturn:  # type: ignore[override]
        self._refuse("hook points", "Open the checkpoint here, or use an analysis that only runs it.")

    @property
    def exact(self) -> bool:
        """Whether all mixtures run on transformers' ``grouped_mm``: not known of a server."""
        return False

    @property
    def plain_experts(self) -> frozenset[str | None]:
        """Refused: a server's choice."""
        self._refuse("the experts' implementation", "It is the server's choice.")

    def plain(self) -> NoReturn:
        """Refused: nothing is installed there that could be taken away."""
        self._refuse("a plain model", "Nothing is installed on the server: a trace without edits is plain.")

    def forward(self, model_inputs: Mapping[str, Any]) -> NoReturn:
        """Refused."""
        self._refuse("a forward pass of the module itself", "Use run.")

    def decode(self, hidden: Tensor) -> NoReturn:
        """Refused: the unembedding is on the server."""
        self._refuse("the unembedding", "moe.select(point, top=5) reads the most likely tokens at a point instead.")

    def experts(self, layer: int) -> NoReturn:
        """Refused: they are on the server."""
        self._refuse("experts on inputs of one's own", "Force them with moe.force, and read expert_out.")

    def weights(self, layer: int, expert: int) -> NoReturn:
        """Refused: they are on the server."""
        self._refuse("the matrices of experts", "Open the checkpoint here.")

    def audit(self, inputs: Inputs | None = None) -> NoReturn:
        """Refused: it compares with the plain model, which needs the weights."""
        self._refuse("an audit", "Audit the checkpoint, or a small one of its type, here.")

    def _refuse(self, what: str, do: str) -> NoReturn:
        raise UnsupportedModel(
            f"{what} cannot be had of a model on a server", expected="runs, reads and edits", got=self.name, do=do
        )


def _fill(program: Program, told: Mapping[str, Any]) -> None:
    """What the server kept, as if the program had run here."""
    for layer, ids in told["ids"].items():
        context = program.context(layer, ids)
        context.ids, context.weights, context.added = ids.long(), told["weights"][layer], told["added"][layer]
    whole = {key for key, value in told["values"].items() if key[0] == "expert_ids"}
    program.values = {key: value.long() if key in whole else value for key, value in told["values"].items()}
    program.tops = {key: TopTokens(ids.long(), logprobs) for key, (ids, logprobs) in told["tops"].items()}
    program.touched = list(told["touched"])

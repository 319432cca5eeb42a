"""Do named points and remote models work on NDIF's own server code?

``python tests/check_ndif.py`` runs every case below on tiny models of the seven families, by the code that executes a
trusted request of NDIF; ``--sandbox`` by the code that executes any other: the user's block in a process of its own,
which has no weights and talks to the model over a socket. It prints the largest absolute difference from the same thing
done in this process, and ends with 1 if one is too large or a case failed. What MoEError refuses is listed with its
reason.

What to install (Python 3.12 or 3.13, as ndif wants; no GPU, no redis, no running Ray):

    pip install -c constraints.txt .
    pip install "ndif[ray]==0.1.2"

1. A process that cannot import moe_interp serves nnsight's protocol (`tests.remote_server`) and hands each request to
   ``execute`` of NDIF's own `SandboxModelDeployment`, which runs it there if it is trusted, else in a fresh runner,
   which cannot import moe_interp, either. Left out is what surrounds that method: the queue, the object store, the
   statuses and the placing on GPUs.
2. Cases named "trace" are what a user writes, with `moe.trace_points`; the others are `MoEModel.run` and `generate`.
   Each is compared with `moe.wrap` of the same weights in this process; steps of a generation and neurons with the same
   trace in this process.
3. "moved" is how far the edits of a case move the logits, in the family where they do so least: differences are to be
   seen against it.

A fresh runner for every request takes its time: about 5 minutes a family with ``--sandbox``. pytest does not collect
this file.
"""

import argparse
import importlib.util
import os
import platform
import re
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
TOLERANCE = 5e-6
RUNNER = """#!{python}
import runpy, sys
sys.path[:] = [path for path in sys.path if path not in ("", {root!r})]
sys.modules.update(dict.fromkeys({absent!r}))
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

# ---- the server ----------------------------------------------------------------------------------------------------


def serve(folder: Path, trusted: bool, dtype: str) -> None:
    """Serve nnsight's protocol by NDIF's code for executing requests, until killed.

    Args:
        folder: for files of the server's own.
        trusted: what all requests are.
        dtype: what the model computes in.
    """
    import torch
    import zstandard
    from ndif.common.schema.request import BackendRequestModel
    from ndif.services.ray.sandbox.model import SandboxModelDeployment
    from nnsight.modeling.huggingface import HuggingFaceModel

    from tests import remote_server  # from here on moe_interp cannot be imported

    class Deployment(SandboxModelDeployment):
        """NDIF's deployment of a model, on the CPU and outside of Ray."""

        def __init__(self, key: str):
            self.model_key, self.dtype, self.kwargs = key, getattr(torch, dtype), {}
            self.execution_sandbox = None
            self.model = HuggingFaceModel.from_model_key(key, dispatch=True, dtype=dtype, device="cpu")
            self.model._module.requires_grad_(False)
            if trusted:
                return
            self.open_pool(0)
            self.pool.python, self.pool.size = runner(folder, remote_server.ABSENT), 2
            for _ in range(2):
                self.pool.refill()

    class Request(BackendRequestModel):
        """A request without a channel back to its client."""

        def respond(self, status: Any, description: str = "", **more: Any) -> None:
            print(description, file=sys.stderr)

    deployed: dict[str, Deployment] = {}

    def run(request: Any, blob: bytes) -> bytes:
        if request.model_key not in deployed:
            for other in deployed.values():
                other.model = None
                if not trusted:
                    other.close()
            deployed.clear()
            deployed[request.model_key] = Deployment(request.model_key)
        here = deployed[request.model_key]
        given = Request(**{**request.model_dump(), "trusted": trusted, "payload": blob})
        here.model._remoteable_set_env(given.env)
        try:
            with remote_server.as_before():
                data, _ = here.execute(given)
        finally:
            here.discard_sandbox()
        return zstandard.ZstdCompressor(level=6).compress(data) if given.compress else data

    remote_server.run = run
    server = remote_server.ThreadingHTTPServer(("127.0.0.1", 0), remote_server.Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


def runner(folder: Path, absent: tuple[str, ...]) -> str:
    """A Python for NDIF's runners, in which this package cannot be imported, either."""
    path = folder / "python"
    path.write_text(RUNNER.format(python=sys.executable, root=str(ROOT), absent=absent), "utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@contextmanager
def served(sandbox: bool, dtype: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", folder, "--dtype", dtype]
        command += ["--sandbox"] * sandbox
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT.anchor)
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait()


# ---- the cases -----------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """One tiny model, three ways.

    Attributes:
        lm: nnsight's model, whose weights the server has.
        points: its named points.
        local: the same weights by `moe.wrap` in this process.
        remote: ``lm`` by `moe.wrap`, run on the server.
        host: the server's address.
        clean: a local run of `TEXTS` that reads every point.
        layer: a layer with experts.
        expert: one that the last token of the first text chose there.
        other: one that it did not choose.
    """

    lm: Any
    points: Any
    local: Any
    remote: Any
    host: str
    clean: Any
    layer: int
    expert: int
    other: int


TEXTS = ["w5 w6 w7 w20 w33 w60 w4 w11", "w9 w8 w44 w71 w12 w90 w31 w17"]
UNEVEN = [TEXTS[0], "w9 w8 w44"]
Measured = tuple[float, float | None]  # difference from the reference, and how far the edits moved that
Case = Callable[[Bench], Measured]


def far(a: Any, b: Any) -> float:
    """The largest absolute difference of two tensors."""
    if a.shape != b.shape:
        raise AssertionError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def read_all(here: Bench) -> Measured:
    """Every point of every layer but neurons, one invoke a point."""
    lm, points, host = here.lm, here.points, here.host
    names = [name for name in here.local.points if name != "expert_act"]
    there = {name: list(here.local.spec.layers_of(name)) for name in names}
    with lm.trace(remote=host) as tracer:
        kept = dict().save()
        with tracer.invoke(TEXTS):
            kept["logits", None] = lm.output.logits.clone()
        for name in names:
            with tracer.invoke():
                for layer in there[name]:
                    if layer is None:
                        kept[name, layer] = points.embed.clone()
                    else:
                        kept[name, layer] = getattr(points.layers[layer], name).clone()
    wanted = {key: value for key, value in here.clean.values.items() if key[0] in names}
    assert len(kept) == len(wanted) + 1
    worst = max(far(kept[key], value) for key, value in wanted.items())
    return max(worst, far(kept["logits", None], here.clean.logits)), None


def against(here: Bench, logits: Any, *edits: Any) -> Measured:
    """The logits of `TEXTS` from a trace, and a local run under the same edits."""
    wanted = here.local.run(TEXTS, edit=edits).logits
    return far(logits, wanted), far(wanted, here.clean.logits)


def trace_ablate(here: Bench) -> Measured:
    """``points.layers[l].expert(e).out[:, -1] = 0``."""
    import moe_interp as moe

    lm, points, layer, expert = here.lm, here.points, here.layer, here.expert
    with lm.trace(TEXTS, remote=here.host):
        points.layers[layer].expert(expert).out[:, -1] = 0
        logits = lm.output.logits.save()
    return against(here, logits, moe.ablate(layer=layer, expert=expert, positions=-1))


def trace_scale(here: Bench) -> Measured:
    """``points.layers[l].expert(e).out *= 2``, and the same of ``expert_out`` of a later layer, in place."""
    import moe_interp as moe

    lm, points, layer, expert, last = here.lm, here.points, here.layer, here.expert, here.points.moe_layers[-1]
    with lm.trace(TEXTS, remote=here.host):
        points.layers[layer].expert(expert).out *= 2
        points.layers[last].expert_out.mul_(1.5)
        logits = lm.output.logits.save()
    edits = moe.scale(layer=layer, expert=expert, by=2.0), moe.apply("expert_out", lambda x: x * 1.5, layers=[last])
    return against(here, logits, *edits)


def trace_weights(here: Bench) -> Measured:
    """``points.layers[l].gate_weights[..., 0] = 0`` and ``expert(e).weight *= 2``."""
    import moe_interp as moe

    lm, points, layer, expert, last = here.lm, here.points, here.layer, here.expert, here.points.moe_layers[-1]

    def first(weights: Any) -> Any:
        return weights * weights.new_tensor([0.0] + [1.0] * (weights.shape[-1] - 1))

    with lm.trace(TEXTS, remote=here.host):
        points.layers[layer].gate_weights[..., 0] = 0
        points.layers[last].expert(expert).weight *= 2
        logits = lm.output.logits.save()
    edits = moe.apply("gate_weights", first, layers=[layer]), moe.scale(layer=last, expert=expert, by=2.0)
    return against(here, logits, *edits)


def trace_logits(here: Bench) -> Measured:
    """``points.layers[l].router_logits = points.layers[l].router_logits.flip(-1)``."""
    import moe_interp as moe

    lm, points, layer = here.lm, here.points, here.layer
    with lm.trace(TEXTS, remote=here.host):
        points.layers[layer].router_logits = points.layers[layer].router_logits.flip(-1)
        logits = lm.output.logits.save()
    return against(here, logits, moe.apply("router_logits", lambda x: x.flip(-1), layers=[layer]))


def trace_values(here: Bench) -> Measured:
    """In place: ``resid_pre``, ``attn_out``, ``moe_in``, ``routed_out``, ``moe_out``, ``resid_post``."""
    import moe_interp as moe

    def cut(value: Any) -> Any:
        value = value.clone()
        value[:, 1:3] = 0
        return value

    lm, points, layer = here.lm, here.points, here.layer
    with lm.trace(TEXTS, remote=here.host):
        points.layers[layer].resid_pre *= 1.1
        points.layers[layer].attn_out[:, 1:3] = 0
        points.layers[layer].moe_in.mul_(1.2)
        points.layers[layer].routed_out *= 1.3
        points.layers[layer].moe_out.mul_(0.7)
        points.layers[layer].resid_post *= 0.9
        logits = lm.output.logits.save()
    names = dict(resid_pre=1.1, moe_in=1.2, routed_out=1.3, moe_out=0.7, resid_post=0.9)
    edits = [moe.apply(name, lambda x, by=by: x * by, layers=[layer]) for name, by in names.items()]
    edits.append(moe.apply("attn_out", cut, layers=[layer]))
    return against(here, logits, *edits)


def trace_mid(here: Bench) -> Measured:
    """``points.layers[l].resid_mid *= 1.1``."""
    import moe_interp as moe

    lm, points, layer = here.lm, here.points, here.layer
    with lm.trace(TEXTS, remote=here.host):
        points.layers[layer].resid_mid *= 1.1
        logits = lm.output.logits.save()
    return against(here, logits, moe.apply("resid_mid", lambda x: x * 1.1, layers=[layer]))


def trace_shared(here: Bench) -> Measured:
    """``points.layers[l].shared_out *= 1.5``."""
    import moe_interp as moe

    lm, points, layer = here.lm, here.points, here.layer
    with lm.trace(TEXTS, remote=here.host):
        points.layers[layer].shared_out *= 1.5
        logits = lm.output.logits.save()
    return against(here, logits, moe.apply("shared_out", lambda x: x * 1.5, layers=[layer]))


def trace_neurons(here: Bench) -> Measured:
    """``points.layers[l].expert(e).act[..., :8] = 0``."""
    lm, points, layer, expert, found = here.lm, here.points, here.layer, here.expert, []
    for remote in (here.host, None):
        with lm.trace(TEXTS, remote=remote):
            points.layers[layer].expert(expert).act[..., :8] = 0
            logits = lm.output.logits.save()
        found.append(logits)
    return far(*found), far(found[1], here.clean.logits)


def trace_invokes(here: Bench) -> Measured:
    """Edits in the first and third of three invokes; the second is left alone."""
    import moe_interp as moe

    lm, points, layer, expert = here.lm, here.points, here.layer, here.expert
    first, second = TEXTS
    with lm.trace(remote=here.host) as tracer:
        with tracer.invoke(first):
            points.layers[layer].expert(expert).out[:] = 0
            one = lm.output.logits.save()
        with tracer.invoke(second):
            two = lm.output.logits.save()
        with tracer.invoke(second):
            points.layers[layer].router_logits[:] = points.layers[layer].router_logits.flip(-1)
            points.layers[layer].expert_out *= 1.5
            three = lm.output.logits.save()
    texts = [first, second, second]
    clean = here.local.run(texts).logits
    cut = here.local.run(texts, edit=moe.ablate(layer=layer, expert=expert)).logits
    flipped = moe.apply("router_logits", lambda x: x.flip(-1), layers=[layer])
    third = here.local.run(texts, edit=[flipped, moe.apply("expert_out", lambda x: x * 1.5, layers=[layer])]).logits
    off = max(far(one, cut[:1]), far(two, clean[1:2]), far(three, third[2:]))
    return off, min(far(cut[:1], clean[:1]), far(third[2:], clean[2:]))


def trace_steps(here: Bench) -> Measured:
    """A generation, edited at some steps of ``tracer.iter``: the logits of all steps, and the ids."""
    lm, points, layer, expert, last = here.lm, here.points, here.layer, here.expert, here.points.moe_layers[-1]
    found = []
    for remote in (here.host, None):
        with lm.generate(max_new_tokens=5, min_new_tokens=5, do_sample=False, remote=remote) as tracer:
            steps = list().save()
            with tracer.invoke(TEXTS):
                ids = tracer.result.save()
            with tracer.invoke():
                for _ in tracer.iter[[0, 2, 3]]:
                    points.layers[layer].expert(expert).out *= 3
                    points.layers[last].expert_out.mul_(1.5)
            with tracer.invoke():
                for _ in tracer.iter[:5]:
                    steps.append(lm.output.logits[:, -1].clone())
        found.append((steps, ids))
    (steps, ids), (wanted, same) = found
    assert len(steps) == len(wanted) == 5 and ids.equal(same)
    return max(far(a, b) for a, b in zip(steps, wanted, strict=True)), None


def run_all(here: Bench) -> Measured:
    """Every point but neurons by `run`, of texts of different lengths."""
    return _run_reads(here, [name for name in here.local.points if name != "expert_act"])


def run_neurons(here: Bench) -> Measured:
    """Neurons by `run`."""
    return _run_reads(here, ["expert_act"])


def _run_reads(here: Bench, names: list[str]) -> Measured:
    mine, theirs = here.local.run(UNEVEN, read=names), here.remote.run(UNEVEN, read=names)
    assert mine.values.keys() == theirs.values.keys()
    real = mine.mask
    worst = max(far(theirs.values[key][real], value[real]) for key, value in mine.values.items())
    return max(worst, far(theirs.logits[real], mine.logits[real])), None


def run_top(here: Bench) -> Measured:
    """The most likely tokens at the residual stream, by the server's unembedding."""
    import moe_interp as moe

    read = moe.select("resid_post", top=3)
    mine, theirs = here.local.run(UNEVEN, read=read), here.remote.run(UNEVEN, read=read)
    assert all(theirs.tops[key].ids[mine.mask].equal(top.ids[mine.mask]) for key, top in mine.tops.items())
    return max(far(theirs.tops[key][1][mine.mask], top[1][mine.mask]) for key, top in mine.tops.items()), None


def edited(make: Callable[[Bench], Any]) -> Case:
    """A case of edits by `run`."""

    def case(here: Bench) -> Measured:
        edits = make(here)
        mine, theirs = here.local.run(UNEVEN, edit=edits), here.remote.run(UNEVEN, edit=edits)
        assert mine.touched == theirs.touched, f"touched {mine.touched} and {theirs.touched}"
        plain, real = here.local.run(UNEVEN).logits, mine.mask
        return far(theirs.logits[real], mine.logits[real]), far(mine.logits[real], plain[real])

    return case


def run_generate(here: Bench) -> Measured:
    """`generate` under an edit: how many tokens differ."""
    import moe_interp as moe

    edit = moe.scale(layer=here.layer, expert=here.expert, by=3.0)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    mine, theirs = here.local.generate(UNEVEN, edit=edit, **options), here.remote.generate(UNEVEN, edit=edit, **options)
    return float(sum(a != b for a, b in zip(mine, theirs, strict=True))), None


def cases() -> dict[str, Case]:
    """All of them."""
    import moe_interp as moe

    def twice(point: str, by: float) -> Callable[[Bench], Any]:
        return lambda here: moe.apply(point, lambda x: x * by, layers=[here.layer])

    return {
        "trace: read every point": read_all,
        "trace: expert(e).out[:, -1] = 0": trace_ablate,
        "trace: expert(e).out *=, expert_out.mul_": trace_scale,
        "trace: gate_weights[...] =, weight *=": trace_weights,
        "trace: router_logits =": trace_logits,
        "trace: six points between modules": trace_values,
        "trace: resid_mid *=": trace_mid,
        "trace: shared_out *=": trace_shared,
        "trace: expert(e).act[..., :8] = 0": trace_neurons,
        "trace: three invokes, no leak": trace_invokes,
        "trace: generation, tracer.iter": trace_steps,
        "run: read every point": run_all,
        "run: read expert_act": run_neurons,
        "run: most likely tokens": run_top,
        "run: scale": edited(lambda here: moe.scale(layer=here.layer, expert=here.expert, by=2.0)),
        "run: ablate": edited(lambda here: moe.ablate(layer=here.layer, expert=here.expert)),
        "run: mask": edited(lambda here: moe.mask(layer=here.layer, expert=here.expert)),
        "run: force": edited(lambda here: moe.force(layer=here.layer, experts=[here.other])),
        "run: top_k(1)": edited(lambda here: moe.top_k(1)),
        "run: noise": edited(lambda here: moe.noise(point="resid_post", std=0.1)),
        "run: apply(router_logits)": edited(
            lambda here: moe.apply("router_logits", lambda x: x.flip(-1), layers=[here.layer])
        ),
        "run: apply(gate_weights)": edited(twice("gate_weights", 0.5)),
        "run: apply(expert_act)": edited(twice("expert_act", 1.5)),
        "run: apply(resid_mid)": edited(twice("resid_mid", 1.1)),
        "run: apply(shared_out)": edited(twice("shared_out", 1.5)),
        "run: router_logits and mask": edited(
            lambda here: [
                moe.apply("router_logits", lambda x: x.flip(-1), layers=[here.layer]),
                moe.mask(layer=here.layer, expert=here.other),
            ]
        ),
        "run: patch from another run": edited(
            lambda here: moe.patch(
                here.local.run(UNEVEN, read=["expert_out"], edit=moe.noise(point="resid_pre", std=0.3)),
                layer=here.layer,
                expert=here.expert,
            )
        ),
        "generate: scale": run_generate,
    }


# ---- the table -----------------------------------------------------------------------------------------------------


@contextmanager
def benched(family: str, host: str, dtype: str) -> Iterator[Bench]:
    """A tiny model of a family, in a folder that both sides load."""
    from nnsight import TransformersModel
    from nnsight.modeling import huggingface
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    import moe_interp as moe
    from tests import tiny

    words = {f"w{number}": number for number in range(96)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with tempfile.TemporaryDirectory() as folder:
        tiny.build(family).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        huggingface._ID_CACHE[folder] = folder  # or the hub would be asked what the model is called
        lm = TransformersModel(folder, task="text-generation", tokenizer=tokenizer, dtype=dtype)
        with moe.wrap(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), tokenizer) as local:
            clean = local.run(TEXTS, read=list(local.points))
            layer = local.spec.moe_layers[1]
            chosen = clean.routing[layer].ids[0, -1].tolist()
            other = next(number for number in range(8) if number not in chosen)
            remote = moe.wrap(lm, remote=host, trust_server=True)
            yield Bench(lm, moe.trace_points(lm), local, remote, host, clean, layer, chosen[0], other)


def measured(name: str, case: Case, here: Bench) -> Measured | str:
    """What a case measures; or why it was refused, or how it failed. Empty if the model has no such point."""
    import moe_interp as moe
    from moe_interp.errors import RemoteFailure

    if "shared_out" in name and "shared_out" not in here.local.points:
        return ""
    try:
        return case(here)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        refused = isinstance(error, moe.MoEError) and not isinstance(error, RemoteFailure)
        refused = refused or re.search(r"moe_interp_\w+\.errors\.\w+: ", lines[-1]) is not None
        return f"{'refused' if refused else 'FAILED'}: {lines[-1]}"


def show(table: dict[str, dict[str, Measured | str]]) -> bool:
    """Print what was measured; whether all of it is well."""
    families = list(next(iter(table.values())))
    width = max(map(len, table))
    print(f"{'':{width}}  " + "  ".join(f"{family:>11}" for family in families) + "        moved")
    for name, row in table.items():
        moved = [one[1] for one in row.values() if not isinstance(one, str) and one[1] is not None]
        cells = [one.partition(":")[0] or "-" if isinstance(one, str) else f"{one[0]:.1e}" for one in row.values()]
        print(
            f"{name:{width}}  "
            + "  ".join(f"{cell:>11}" for cell in cells)
            + f"  {min(moved, default=0.0):11.1e}" * bool(moved)
        )
    words = {(name, one) for name, row in table.items() for one in row.values() if isinstance(one, str) and one}
    for name, one in sorted(words):
        print(f"\n{name}\n    {one}")
    off = [one[0] for row in table.values() for one in row.values() if not isinstance(one, str)]
    print(f"\nlargest difference {max(off, default=0.0):.1e}, of {len(off)} measured; {TOLERANCE:.0e} is allowed")
    return max(off, default=0.0) <= TOLERANCE and not any(one.startswith("FAILED") for _, one in words)


def main() -> None:
    parser = argparse.ArgumentParser(description="Named points and remote models on NDIF's own server code.")
    parser.add_argument("--sandbox", action="store_true", help="as an untrusted request, in NDIF's sandbox")
    parser.add_argument("--dtype", default="float32", help="what both sides compute in (bfloat16 is NDIF's default)")
    parser.add_argument("--family", action="append", help="only this family (may be repeated)")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("ndif") is None:
        sys.exit('ndif is not installed. It wants Python 3.12 or 3.13: pip install "ndif[ray]==0.1.2"')
    if options.serve:
        return serve(options.serve, not options.sandbox, options.dtype)

    import nnsight

    from tests import tiny

    nnsight.CONFIG.APP.REMOTE_LOGGING = False
    warnings.simplefilter("ignore")  # loops over steps that end with the generation
    chosen = {name: case for name, case in cases().items() if options.case in name}
    table: dict[str, dict[str, Measured | str]] = {name: {} for name in chosen}
    with served(options.sandbox, options.dtype) as host:
        for family in options.family or tiny.FAMILIES:
            with benched(family, host, options.dtype) as here:
                for name, case in chosen.items():
                    table[name][family] = measured(name, case, here)
                    print(f"{family}: {name}: {table[name][family]}", file=sys.stderr, flush=True)
    kept = ("ndif", "nnsight", "transformers", "torch")
    print(f"\nPython {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in kept))
    print(f"{'sandboxed' if options.sandbox else 'trusted'}, {options.dtype}, on the CPU\n")
    sys.exit(0 if show(table) else 1)


if __name__ == "__main__":
    main()

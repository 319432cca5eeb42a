"""An edit belongs to a call: every run, in whatever company, equals the same run alone, bit for bit."""

import asyncio
import contextvars
import copy
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from nnsight import NNsight
from transformers import DynamicCache

import moe_interp as moe
from moe_interp.hosts.hooked import trace_points
from tests.bridges import bridged
from tests.tiny import FAMILIES, build

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(7))
OTHER = torch.randint(3, 90, (3, 5), generator=torch.Generator().manual_seed(8))
LONG = torch.randint(3, 90, (4, 40), generator=torch.Generator().manual_seed(9))
LAYER = 2
each_family = pytest.mark.parametrize("family", FAMILIES)
POINTS = ["expert_out", "resid_post", "expert_ids"]


def edits_of(model: moe.MoEModel) -> dict[str, list[moe.Intervention]]:
    """Edits of every kind of thing: values, routes, scores, modules, chance, the residual in place."""
    last = model.layers[-1]
    kept = model.run(IDS, read="expert_out")
    return {
        "plain": [],
        "values": [
            moe.ablate(layer=LAYER, expert=[0, 1, 2, 3], how="zero"),
            moe.scale(layer=last, expert=None, by=0.5),
        ],
        "routes": [
            moe.ablate(layer=LAYER, expert=1, how="forbid"),
            moe.bias(layer=last, expert=2, by=3.0, on="logits"),
        ],
        "wide": [moe.top_k(4)],
        "narrow": [moe.top_k(1)],
        "swapped": [moe.swap(layers=(LAYER, last))],
        "chance": [moe.randomize(layer=LAYER, seed=3)],
        "stream": [moe.steer(torch.ones(model.spec.d_model), layer=LAYER, point="resid_mid")],
        "patched": [moe.patch(kept, layer=LAYER, expert=0)],
    }


def jobs_of(model: moe.MoEModel) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """What threads do: runs of two texts under each edit, with reads, and generations."""

    def run(inputs: torch.Tensor, edit: list[moe.Intervention]) -> list[torch.Tensor]:
        found = model.run(inputs, read=POINTS, edit=edit)
        return [found.logits, *found.values.values(), *(r.ids for r in found.routing.values())]

    def write(edit: list[moe.Intervention]) -> list[torch.Tensor]:
        return [model.generate(IDS[:1], edit=edit, max_new_tokens=4, do_sample=False)]

    jobs: dict[str, Callable[[], list[torch.Tensor]]] = {}
    for name, edit in edits_of(model).items():
        jobs[name] = lambda edit=edit: run(IDS, edit)
        if name != "patched":  # of other texts
            jobs[f"{name}, another text"] = lambda edit=edit: run(OTHER, edit)
            jobs[f"{name}, written"] = lambda edit=edit: write(edit)
    return jobs


def same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(got) == len(expected) and all(map(torch.equal, got, expected))


@pytest.fixture(autouse=True)
def one_thread_of_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # how many there are decides how sums are rounded
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 8])
@each_family
def test_runs_in_threads_equal_the_same_runs_alone(family, count):
    with moe.wrap(build(family)) as model:
        jobs = jobs_of(model)
        expected = {name: job() for name, job in jobs.items()}
        assert not same(expected["values"], expected["plain"]) and not same(expected["wide"], expected["plain"])
        wrong: list[str] = []

        def work(number: int) -> None:
            names = list(jobs)
            for name in names[number:] + names[:number]:
                if not same(jobs[name](), expected[name]):
                    wrong.append(name)

        with ThreadPoolExecutor(count) as pool:
            list(pool.map(work, range(count)))
    assert wrong == []


@each_family
def test_plain_calls_of_the_model_beside_edited_runs(family):
    hf = build(family)
    alone = hf(input_ids=IDS, use_cache=False).logits.detach()
    with moe.wrap(hf) as model:
        edit = edits_of(model)["wide"]
        expected, stop, wrong = model.run(IDS, edit=edit).logits, threading.Event(), []

        def plain() -> None:
            while not stop.is_set():
                with torch.no_grad():
                    wrong.append(not torch.equal(hf(input_ids=IDS, use_cache=False).logits, alone))

        thread = threading.Thread(target=plain)
        thread.start()
        got = [model.run(IDS, edit=edit).logits for _ in range(20)]
        stop.set()
        thread.join()
    assert wrong and not any(wrong)
    assert all(torch.equal(one, expected) for one in got)


@each_family
def test_tasks_and_executors(family):
    with moe.wrap(build(family)) as model:
        edits = edits_of(model)
        expected = {name: model.run(IDS, edit=edit).logits for name, edit in edits.items()}
        standing = edits["values"]

        async def run(name: str) -> bool:
            with model.edit(edits[name]):
                await asyncio.sleep(0)
                got = await asyncio.to_thread(lambda: model.run(IDS).logits)  # takes the context of the task along
                await asyncio.sleep(0)
                return torch.equal(got, expected[name]) and torch.equal(model.run(IDS).logits, expected[name])

        async def all_of_them() -> list[bool]:
            return await asyncio.gather(*map(run, edits))

        assert all(asyncio.run(all_of_them()))
        with ThreadPoolExecutor(1) as pool, model.edit(standing):
            joined = pool.submit(contextvars.copy_context().run, lambda: model.run(IDS).logits).result()
            with pytest.warns(moe.EditsElsewhere, match="stand in another context.*everywhere=True"):
                apart = pool.submit(lambda: model.run(IDS).logits).result()
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # told once
                assert torch.equal(pool.submit(lambda: model.run(IDS).logits).result(), apart)
        assert torch.equal(joined, expected["values"]) and torch.equal(apart, expected["plain"])
        with ThreadPoolExecutor(1) as pool, model.edit(standing, everywhere=True):
            everywhere = pool.submit(lambda: model.run(IDS)).result()
        assert torch.equal(everywhere.logits, expected["values"]) and "edits" in everywhere.provenance
        assert torch.equal(model.run(IDS).logits, expected["plain"])


@each_family
def test_a_run_inside_a_generation(family):
    with moe.wrap(build(family)) as model:
        edits, seen = edits_of(model), []
        plain, steered = model.run(IDS).logits, model.run(IDS, edit=edits["stream"]).logits
        expected = model.generate(IDS, edit=edits["wide"], max_new_tokens=3, do_sample=False)

        def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append((model.run(IDS).logits, model.hf(input_ids=IDS, use_cache=False).logits))
            seen.append((model.run(IDS, edit=edits["stream"]).logits,))
            return scores

        with pytest.warns(moe.EditsElsewhere, match="between two steps of a generation"):
            got = model.generate(IDS, edit=edits["wide"], max_new_tokens=3, do_sample=False, logits_processor=[look])
    assert torch.equal(got, expected) and len(seen) == 6
    assert all(torch.equal(one, plain) for some in seen[::2] for one in some)
    assert all(torch.equal(one, steered) for some in seen[1::2] for one in some)


@each_family
def test_a_generation_in_a_thread_with_a_streamer(family):
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(model.run(OTHER).logits)

        def end(self) -> None: ...

    with moe.wrap(build(family)) as model:
        edits, streamer = edits_of(model)["routes"], Streamer()
        written = model.generate(IDS[:1], edit=edits, max_new_tokens=4, do_sample=False)
        plain, edited = model.run(OTHER).logits, model.run(OTHER, edit=edits).logits
        with ThreadPoolExecutor(1) as pool:
            options = dict(max_new_tokens=4, do_sample=False, streamer=streamer)
            future = pool.submit(model.generate, IDS[:1], edit=edits, **options)
            beside = [model.run(OTHER, edit=edits).logits for _ in range(5)]
            assert torch.equal(future.result(), written)
    assert all(torch.equal(one, plain) for one in streamer.seen) and len(streamer.seen) == 5
    assert all(torch.equal(one, edited) for one in beside)


@pytest.mark.parametrize("point", ["embed", "resid_mid", "router_logits", "expert_out", "moe_out"])
@each_family
def test_a_run_inside_an_edit_and_inside_a_hook(family, point):
    with moe.wrap(build(family)) as model:
        edits = edits_of(model)["wide"]
        inner, outer = model.run(OTHER, edit=edits, read=POINTS), model.run(IDS, read=POINTS)
        found: list[bool] = []

        def look(value: torch.Tensor) -> torch.Tensor:
            run = model.run(OTHER, edit=edits, read=POINTS)
            found.append(all(torch.equal(run.values[key], value) for key, value in inner.values.items()))
            found.append(torch.equal(run.logits, inner.logits))
            return value

        layers = {} if point == "embed" else {"layers": LAYER}
        run = model.run(IDS, edit=moe.apply(point, look, **layers), read=POINTS)
        layer = model.hf if point == "embed" else model.hf.model.layers[LAYER]
        hooked: list[bool] = []

        def hook(module: Any, args: Any, value: torch.Tensor) -> None:
            if not hooked:  # the run inside meets the hook, too: it is the module's
                hooked.append(True)
                look(value)

        handle = layer.moe_points[point].register_forward_hook(hook)
        again = model.run(IDS, read=POINTS)
        handle.remove()
    assert found and all(found)
    for one in (run, again):
        assert torch.equal(one.logits, outer.logits)
        assert all(torch.equal(one.values[key], value) for key, value in outer.values.items())


@each_family
def test_a_run_inside_a_run_has_the_edits_that_stand_and_no_others(family):
    with moe.wrap(build(family)) as model, moe.wrap(model.hf) as other:
        edits, inside = edits_of(model), []
        expected = other.run(OTHER, edit=edits["values"])
        look = moe.apply("moe_out", lambda value: inside.append(other.run(OTHER)) or value, layers=LAYER)
        with model.edit(edits["values"]):
            model.run(IDS, edit=[*edits["wide"], look])
    assert torch.equal(inside[0].logits, expected.logits)
    assert inside[0].provenance["edits"] == expected.provenance["edits"] and inside[0].touched == expected.touched


@each_family
def test_a_second_wrapper_has_the_edits_of_the_first_and_says_so(family):
    hf = build(family)
    with moe.wrap(hf) as one, moe.wrap(hf) as two:
        edit = edits_of(one)["routes"]
        expected = two.run(IDS, edit=edit)
        with one.edit(edit):
            got = two.run(IDS)
        assert torch.equal(got.logits, expected.logits) and got.touched == expected.touched
        assert got.provenance["edits"] == expected.provenance["edits"]
        with one.edit(edit) as standing:
            one.close()
            assert torch.equal(two.run(IDS).logits, two.run(IDS, edit=[]).logits) and standing.touched == [0, 0]
            assert "edits" not in two.run(IDS).provenance


@each_family
def test_traces_beside_local_runs_and_runs_inside_traces(family):
    hf = build(family)
    lm = NNsight(hf)
    with trace_points(lm) as points, moe.wrap(hf) as model:
        edits = edits_of(model)
        layer = model.layers[1]
        run, edited = model.run(IDS, read="expert_out"), model.run(OTHER, edit=edits["wide"]).logits
        stop, wrong, inside = threading.Event(), [], []

        def beside() -> None:
            while not stop.is_set():
                wrong.append(not torch.equal(model.run(OTHER, edit=edits["wide"]).logits, edited))

        thread = threading.Thread(target=beside)
        thread.start()
        for _ in range(5):
            with torch.no_grad(), lm.trace(IDS, use_cache=False):
                out = points.layers[layer].expert_out.clone().save()
                inside.append(model.run(OTHER, edit=edits["wide"]).logits)
                after = points.layers[layer].resid_post.clone().save()
                logits = lm.output.logits.save()
            assert torch.equal(out, run["expert_out", layer]) and torch.equal(logits, run.logits)
            assert after.shape == (2, 9, 64)
        stop.set()
        thread.join()
    assert wrong and not any(wrong)
    assert len(inside) == 5 and all(torch.equal(one, edited) for one in inside)


@each_family
def test_hooks_of_transformer_lens_beside_local_runs(family):
    with moe.attach(bridged(build(family))) as door:
        bridge, model = door.bridge, door.model
        edits, inside = edits_of(model)["values"], []
        expected, plain = model.run(OTHER, edit=edits).logits, bridge(IDS)
        name = door.hook_names["expert_out", LAYER]

        def look(value: torch.Tensor, hook: Any) -> None:
            if not inside:
                inside.append(None)
                inside.append(model.run(OTHER, edit=edits).logits)

        got = bridge.run_with_hooks(IDS, fwd_hooks=[(name, look)])
        assert torch.equal(got, plain) and torch.equal(inside[1], expected)
        _, cache = bridge.run_with_cache(IDS, names_filter=door.names("expert_out"))
        assert torch.equal(cache[name], model.run(IDS, read="expert_out")["expert_out", LAYER])


# ---- a pass that does not enter at the top -------------------------------------------------------------------


@each_family
def test_parts_of_a_model_that_are_called_by_themselves(family):
    hf = build(family)
    short = torch.ones_like(IDS)
    short[0, 6:] = 0
    with moe.wrap(hf) as model, torch.no_grad():
        edit = edits_of(model)["values"]
        whole = model.run(IDS, edit=edit, read=["resid_post", "resid_pre", "moe_in", "moe_out"])
        padded = model.run({"input_ids": IDS, "attention_mask": short}, edit=edit)
        with model.edit(edit) as standing:
            hf(input_ids=IDS, attention_mask=short)  # whose mask must not be that of the next
            assert torch.equal(hf.forward(input_ids=IDS, use_cache=False).logits, whole.logits)
            assert torch.equal(hf.lm_head(hf.model(input_ids=IDS, use_cache=False)[0]), whole.logits)
            before = list(standing.touched)
            got = hf.lm_head(hf.model(input_ids=IDS, attention_mask=short, use_cache=False)[0])
            assert torch.equal(got, padded.logits)
            assert [now - then for now, then in zip(standing.touched, before, strict=True)] == list(padded.touched)
            block = model.spec.moe(LAYER).block
            returned = hf.get_submodule(block)(whole["moe_in", LAYER])
            returned = returned[0] if isinstance(returned, tuple) else returned
            assert torch.equal(returned, whole["moe_out", LAYER])


def test_a_watch_counts_passes_that_enter_inside():
    hf = build("olmoe")
    with moe.RoutingWatch(hf, every=1) as watch:
        with watch.step(0):
            hf(input_ids=IDS, use_cache=False)
        with watch.step(1):
            hf.model(input_ids=IDS, use_cache=False)
        table = watch.table()
    assert table.tokens.values.tolist() == [18, 18]
    assert torch.equal(*(torch.tensor(table.utilisation.sel(step=step).values) for step in (0, 1)))


def test_a_watch_hears_its_own_thread_alone():
    hf = build("olmoe")
    with moe.RoutingWatch(hf, every=1) as watch, ThreadPoolExecutor(1) as pool:
        with watch.step(0):
            hf(input_ids=IDS, use_cache=False)
            pool.submit(hf, input_ids=OTHER, use_cache=False).result()
        assert int(watch.table().tokens[0]) == 18


def test_a_part_of_an_opened_model_is_not_opened_again():
    hf = build("olmoe")
    with moe.wrap(hf), pytest.raises(moe.MoEError, match="a part of an opened model cannot be opened"):
        moe.wrap(hf.model)


# ---- a pass that goes on from a cache ------------------------------------------------------------------------

CHANCE = {
    "randomize": lambda model: moe.randomize(layer=None, seed=7),
    "noise": lambda model: moe.noise(0.3, point="resid_pre", layer=LAYER, seed=7),
    "resample": lambda model: moe.ablate(
        layer=LAYER, expert=list(range(8)), how="resample", run=model.run(LONG, read="expert_out"), seed=7
    ),
}


def in_parts(model: moe.MoEModel, ids: torch.Tensor, edit: moe.Intervention, *ends: int) -> torch.Tensor:
    cache, start, found = DynamicCache(config=model.hf.config), 0, []
    for end in (*ends, ids.shape[1]):
        inputs = {"input_ids": ids[:, start:end], "past_key_values": cache, "use_cache": True}
        found.append(model.run(inputs, edit=edit).logits)
        start = end
    return torch.cat(found, dim=1)


@each_family
def test_runs_that_go_on_from_a_cache_draw_what_the_whole_text_draws(family):
    with moe.wrap(build(family)) as model:
        edit = moe.randomize(layer=None, seed=7)
        torch.testing.assert_close(in_parts(model, IDS, edit, 4, 5), model.run(IDS, edit=edit).logits)


def test_a_cache_whose_text_was_not_seen_is_refused_by_draws_and_by_nothing_else():
    with moe.wrap(build("olmoe")) as model, torch.no_grad():
        cache = DynamicCache(config=model.hf.config)
        model.hf(input_ids=IDS[:, :5], past_key_values=cache, use_cache=True)
        rest = {"input_ids": IDS[:, 5:], "past_key_values": cache, "use_cache": True}
        with pytest.raises(moe.MoEError, match="whose beginning is unknown.*token ids were seen"):
            model.run({**rest, "past_key_values": copy.deepcopy(cache)}, edit=moe.randomize(layer=None))
        edit = moe.ablate(layer=LAYER, expert=[0, 1, 2, 3], how="zero")
        got = model.run(rest, edit=edit).logits
        assert got.shape == (2, 4, 96)


def test_what_is_known_of_a_cache_follows_its_rows():
    with moe.wrap(build("olmoe")) as model:
        edit = moe.randomize(layer=None, seed=7)
        other = IDS.flip(0)
        expected = model.run(torch.cat([IDS[[1]], IDS[[1]], IDS[[0]]]), edit=edit).logits[:, 5:]
        cache = DynamicCache(config=model.hf.config)
        model.run({"input_ids": IDS[:, :7], "past_key_values": cache, "use_cache": True}, edit=edit)
        cache.crop(-2)  # two rejected tokens
        cache.reorder_cache(torch.tensor([1, 0]))
        copied = copy.deepcopy(cache)
        for one in (cache, copied):
            one.batch_select_indices(torch.tensor([0, 0, 1]))
            rest = torch.cat([other[[0]], other[[0]], other[[1]]])[:, 5:]
            got = model.run({"input_ids": rest, "past_key_values": one, "use_cache": True}, edit=edit).logits
            torch.testing.assert_close(got, expected)


def greedy(model: moe.MoEModel, ids: torch.Tensor, edit: Any, steps: int) -> torch.Tensor:
    """The reference: every token from a whole pass over all text so far."""
    for _ in range(steps):
        ids = torch.cat([ids, model.run(ids, edit=edit).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids


def beams(model: moe.MoEModel, ids: torch.Tensor, edit: Any, count: int, steps: int) -> torch.Tensor:
    """The reference: a beam search of one text from whole passes, without an end."""
    texts, scores = ids, torch.zeros(1)
    for _ in range(steps):
        logprobs = model.run(texts, edit=edit).logits[:, -1].float().log_softmax(dim=-1)
        total = (scores[:, None] + logprobs).flatten()
        scores, best = total.topk(count)
        rows, tokens = best // logprobs.shape[1], best % logprobs.shape[1]
        texts = torch.cat([texts[rows], tokens[:, None]], dim=1)
    return texts[scores.argmax()][None]


WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "without": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("kind", CHANCE)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_edits_act_on_a_generated_text_as_in_whole_passes(family, way, kind):
    with moe.wrap(build(family, eos_token_id=None)) as model:
        model.hf.generation_config.eos_token_id = None
        edit, ids = CHANCE[kind](model), IDS[:1].repeat(1, 2)
        got = model.generate(ids, edit=edit, max_new_tokens=6, do_sample=False, **WAYS[way])
        assert torch.equal(got, greedy(model, ids, edit, 6))
        assert not torch.equal(got, model.generate(ids, max_new_tokens=6, do_sample=False)) or kind != "randomize"


@pytest.mark.parametrize("kind", CHANCE)
@pytest.mark.parametrize("way", ["dynamic", "static", "without"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_edits_follow_texts_through_a_beam_search(family, way, kind):
    with moe.wrap(build(family, eos_token_id=None)) as model:
        model.hf.generation_config.eos_token_id = None
        edit = CHANCE[kind](model)
        got = model.generate(IDS, edit=edit, max_new_tokens=5, do_sample=False, num_beams=3, **WAYS[way])
        expected = torch.cat([beams(model, row[None], edit, 3, 5) for row in IDS])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("way", ["dynamic", "static"])
def test_values_of_texts_reach_all_beams_of_theirs(way):
    with moe.wrap(build("olmoe", eos_token_id=None)) as model:
        model.hf.generation_config.eos_token_id = None
        kept = model.run(IDS, read="expert_out")
        flipped = model.run(IDS.flip(0), read="expert_out")
        options = dict(max_new_tokens=4, do_sample=False, num_beams=3, **WAYS[way])
        own = model.generate(IDS, edit=moe.patch(kept, layer=LAYER, expert=list(range(8))), **options)
        other = model.generate(IDS, edit=moe.patch(flipped, layer=LAYER, expert=list(range(8))), **options)
        single = [
            model.generate(
                row, edit=moe.patch(model.run(values, read="expert_out"), layer=LAYER, expert=list(range(8))), **options
            )
            for row, values in ((IDS[:1], IDS[1:]), (IDS[1:], IDS[:1]))
        ]
        assert torch.equal(own, model.generate(IDS, **options))
        assert torch.equal(other, torch.cat(single))


def test_drafts_of_another_model_are_taken_back_without_a_trace():
    with moe.wrap(build("olmoe", eos_token_id=None)) as model:
        model.hf.generation_config.eos_token_id = None
        draft = build("olmoe", seed=3, num_hidden_layers=2, eos_token_id=None)
        draft.generation_config.eos_token_id = None
        edit = moe.randomize(layer=None, seed=7)
        got = model.generate(IDS[:1], edit=edit, max_new_tokens=8, do_sample=False, assistant_model=draft)
        assert torch.equal(got, greedy(model, IDS[:1], edit, 8))
        for option in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 4}):
            last = moe.steer(torch.ones(64), layer=LAYER, point="resid_mid", positions=-1)
            with pytest.raises(moe.MoEError, match="the newest token of a step is not known"):
                model.generate(IDS[:1], edit=last, max_new_tokens=3, **option)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_left_padding_under_a_mask_of_queries_and_keys(family):
    """A static cache gives masks [batch, 1, query, key]; windows of some layers are shorter than the text."""
    with moe.wrap(build(family, eos_token_id=None)) as model:
        model.hf.generation_config.eos_token_id = None
        rows = [IDS[0].tolist(), IDS[1, :4].tolist()]
        edit = [
            moe.randomize(layer=None, seed=7),
            moe.steer(2 * torch.ones(64), layer=LAYER, point="resid_mid", positions=2),
        ]
        options = dict(max_new_tokens=4, do_sample=False)
        expected = model.generate(rows, edit=edit, **options)
        got = model.generate(rows, edit=edit, cache_implementation="static", **options)
        alone = model.generate(IDS[1:, :4], edit=edit, **options)
    assert torch.equal(got, expected) and torch.equal(got[1, 5:], alone[0])


def test_draws_of_a_text_under_a_quantised_cache_are_those_of_a_whole_pass():
    with moe.wrap(build("olmoe", eos_token_id=None)) as model:
        model.hf.generation_config.eos_token_id = None
        drawn: list[torch.Tensor] = []
        look = moe.apply("expert_ids", lambda ids: drawn.append(ids.clone()) or ids, layers=LAYER)
        edit = [moe.randomize(layer=LAYER, seed=7), look]
        quantised = dict(cache_implementation="quantized", cache_config={"backend": "fp8"})
        written = model.generate(IDS[:1], edit=edit, max_new_tokens=5, do_sample=False, **quantised)
        steps, drawn[:] = torch.cat(drawn, dim=1), []
        model.run(written[:, :-1], edit=edit)
    assert torch.equal(steps, drawn[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_continuous_batching_is_refused_by_name_and_warns_of_edits_that_it_does_not_have():
    with moe.wrap(build("olmoe", eos_token_id=None)) as model:
        model.hf.generation_config.eos_token_id = None
        rows = [row.tolist() for row in IDS]

        def batched() -> list[Any]:
            found = model.hf.generate_batch(rows, model.hf.generation_config, max_new_tokens=3, progress_bar=False)
            return sorted(found.values(), key=lambda one: one.request_id)

        plain = [one.generated_tokens for one in batched()]
        with model.edit(moe.top_k(1)), pytest.warns(moe.EditsElsewhere, match="stand in another context"):
            assert [one.generated_tokens for one in batched()] == plain
        with model.edit(moe.top_k(1), everywhere=True):
            assert all("texts that share a row" in one.error for one in batched())
        assert len(plain) == 2 and all(len(one) == 3 for one in plain)


# ---- layers that are computed anew ---------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@each_family
def test_gradients_of_layers_that_are_computed_anew_after_the_edit_and_in_another_thread(family, reentrant):
    def slopes(hf: Any, anew: bool, threads: bool) -> dict[str, torch.Tensor]:
        hf.zero_grad()
        if anew:
            hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            hf.enable_input_require_grads()
        with moe.wrap(hf) as model:
            with model.edit([*edits_of(model)["values"], moe.top_k(2), *edits_of(model)["stream"]]) as standing:
                loss = hf(input_ids=IDS, use_cache=False).logits.square().mean()
                counted = list(standing.touched)
            if threads:  # as autograd does on an accelerator
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(loss.backward).result()
            else:
                loss.backward()
            assert standing.touched == counted
        return {name: one.grad.clone() for name, one in hf.named_parameters() if one.grad is not None}

    hf = build(family).train()
    expected = slopes(hf, False, False)
    for threads in (False, True):
        got = slopes(hf, True, threads)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=name)

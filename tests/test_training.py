"""Routing while a model trains: the watch reports what loops over the same tokens give, and changes nothing."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import moe_interp as moe
from moe_interp import results
from moe_interp.analyses.routing import RoutingCounts
from moe_interp.analyses.training import (
    Alarm,
    RoutingAlarm,
    RoutingCallback,
    RoutingWatch,
    routing_health,
    to_tensorboard,
)
from moe_interp.errors import BadInput
from tests.random_runs import EXPERTS, LAYERS, TOP_K, choices_of, random_run
from tests.reference import routing as slow
from tests.tiny import build

SILENT = dict(on_alarm=lambda alarm: None)


def batches(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches with labels."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 96, (2, 10), generator=draw)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def choices_in(hf, batch) -> list[dict]:
    """What loops need, from a run of an opened copy."""
    copy = build(hf.config.model_type)
    copy.load_state_dict(hf.state_dict())
    with moe.wrap(copy) as model:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        run = model.run(inputs, read=["router_logits", "router_scores"])
        return choices_of(run, [0] * len(batch["input_ids"]))


def assert_is(report: xr.Dataset, choices: list[dict], experts: int) -> None:
    for layer in report.layer.values.tolist():
        here = report.sel(layer=layer)
        load = [slow.count(choices, 0, layer, e) for e in range(experts)]
        np.testing.assert_allclose(here.utilisation, np.array(load) / sum(load))
        for name, of in slow.LOAD.items():
            assert float(here[name]) == pytest.approx(of(load)), name
        for name in slow.PER_TOKEN:
            mean = slow.mean_per_token(name, choices, [0], layer)
            assert float(here[name]) == pytest.approx(mean, rel=1e-4, abs=1e-6), name
        assert float(here.load_balance) == pytest.approx(slow.load_balance(choices, layer, experts), rel=1e-5)
    as_coded = slow.load_balance_as_coded(choices, experts)
    assert float(report.load_balance_as_coded) == pytest.approx(as_coded, rel=1e-5)


def test_health_of_a_batch_equals_loops_and_knows_what_chance_gives():
    run = random_run(4, [6, 3])
    sums = RoutingCounts.empty(2, LAYERS, EXPERTS, TOP_K)
    sums.update(run, np.array([0, 1]))
    report = routing_health(sums)
    assert_is(report, choices_of(run, [0, 0]), EXPERTS)
    assert int(report.tokens) == 9
    assert float(report.max_vio_uniform) > 0.2  # nine tokens: a uniform router is uneven too
    assert float(report.entropy_baseline) == pytest.approx(math.log(EXPERTS))
    with pytest.raises(BadInput, match="nothing was counted"):
        routing_health(RoutingCounts.empty(1, LAYERS, EXPERTS, TOP_K))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "qwen2_moe"])
def test_a_watch_reports_due_steps_of_any_loop_and_changes_no_weight(family):
    trained = []
    for watching in (False, True):
        hf = build(family).train()
        optimizer = torch.optim.SGD(hf.parameters(), lr=0.05)
        told: list[tuple[int, dict[str, float]]] = []
        expected = {}
        opened = moe.wrap(hf)
        watch = RoutingWatch(opened, every=2, to=lambda step, values, told=told: told.append((step, values)))
        for step, batch in enumerate(batches(5)):
            if step % 2 == 0:
                expected[step] = choices_in(hf, batch)
            if watching:
                watch.begin(step)
            hf(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if watching:
                watch.end(step)
        if watching:
            table = watch.table()
            assert table.step.values.tolist() == [0, 2, 4] == [step for step, _ in told]
            for step, values in told:
                assert_is(table.sel(step=step), expected[step], 8)
                first = watch.model.layers[0]
                name = f"routing/layer_{first}/max_vio"
                assert values[name] == pytest.approx(float(table.max_vio.sel(step=step, layer=first)))
                as_coded = float(table.load_balance_as_coded.sel(step=step))
                assert values["routing/load_balance_as_coded"] == pytest.approx(as_coded)
        watch.close()
        opened.close()
        trained.append({name: value.clone() for name, value in hf.state_dict().items()})
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


def test_several_forward_passes_of_a_step_are_added_up_and_other_passes_are_not_counted():
    hf = build("olmoe")
    first, second = batches(2)
    with RoutingWatch(hf, every=1) as watch:
        hf(**first)  # outside a step
        with watch.step(0):
            hf(**first)
            with torch.no_grad():
                hf(**second)
        report = watch.table().sel(step=0)
    assert int(report.tokens) == 32
    assert_is(report, choices_in(hf, first) + choices_in(hf, second), 8)
    assert not [name for name, _ in hf.named_modules() if "moe_points" in name]
    assert not hf._forward_hooks
    assert not hf._forward_pre_hooks


def test_recomputing_in_the_backward_pass_counts_once():
    hf = build("olmoe").train()
    hf.gradient_checkpointing_enable()
    batch = batches(1)[0]
    with RoutingWatch(hf, every=1) as watch, watch.step(0):
        hf(**batch).loss.backward()
    assert int(watch.table().tokens[0]) == 16


def test_a_step_that_fails_is_forgotten():
    hf, batch = build("olmoe"), batches(1)[0]
    with RoutingWatch(hf, every=2) as watch:
        with pytest.raises(RuntimeError, match="out of memory"), watch.step(0):
            hf(**batch)
            raise RuntimeError("out of memory")
        with watch.step(1):  # not due
            hf(**batch)
        with pytest.raises(BadInput, match="nothing was reported"):
            watch.table()
        with watch.step(2):
            hf(**batch)
        table = watch.table()
    assert table.step.values.tolist() == [2]
    assert table.tokens.values.tolist() == [16]


def test_every_token_counts_without_a_mask_and_a_mask_that_is_none_is_refused():
    hf, ids = build("olmoe"), batches(1)[0]["input_ids"]
    with RoutingWatch(hf, every=1) as watch:
        with watch.step(0):
            hf(ids)
        with (
            pytest.raises(BadInput, match=r"cannot tell real tokens from padding: .* got one of shape \(2, 10, 10\)"),
            watch.step(1),
        ):
            hf(input_ids=ids, attention_mask=torch.ones(2, 10, 10, dtype=torch.bool))
        assert watch.table().tokens.values.tolist() == [20]


def collapsed() -> torch.nn.Module:
    """A router that sends every token to the same experts."""
    hf = build("olmoe").train()
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.mlp.gate.weight.zero_()
    return hf


def test_alarms_say_what_collapsed_and_silence_is_kept_in_range():
    alarms = {"dead_experts": (0, 3), "load_entropy": (0.6, 1.0), "z_loss": (0.0, 1e6)}
    found: list[Alarm] = []
    with RoutingWatch(collapsed(), every=1, alarms=alarms, on_alarm=found.append) as watch, watch.step(7):
        watch.model.hf(**batches(1)[0])
    assert {(one.name, one.layer) for one in found} == {
        (name, layer) for name in ("dead_experts", "load_entropy") for layer in range(4)
    }
    assert watch.raised == found
    assert str(found[0]) == "step 7: dead_experts of layer 0 is 5, outside 0 ... 3"
    message = "step 0: max_vio of layer 0 is 1.67, outside 0 ... 1"
    watch = RoutingWatch(collapsed(), every=1, alarms={"max_vio": (0, 1)})
    with pytest.warns(RoutingAlarm, match=message), watch, watch.step(0):
        watch.model.hf(**batches(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        healthy = RoutingWatch(build("olmoe"), every=1, alarms={"max_vio": (0, 7)})
        with healthy as watch, watch.step(0):
            watch.model.hf(**batches(1)[0])


LOOP = """
import torch, warnings
from moe_interp.analyses.training import RoutingWatch
from tests.tiny import build

watch = RoutingWatch(build("olmoe"), every=1, alarms={"n50": (99, 99)})
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    with watch.step(0):
        watch.model.hf(torch.arange(3, 9)[None])
    watch.begin(1)
    watch.model.hf(torch.arange(3, 9)[None])
    watch.end(1)
print(*[one.filename + ":" + str(one.lineno) for one in told])
"""


def test_alarms_point_at_the_users_loop():
    """In a process of its own: the tests check annotations, in frames between the loop and the watch."""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == ["<string>:9"] * 4 + ["<string>:13"] * 4


def test_alarms_for_values_that_there_are_not():
    with pytest.raises(BadInput, match="unknown alarms: expected some of n50, gini.*got loss"):
        RoutingWatch(build("olmoe"), alarms={"loss": (0, 1)})


@pytest.mark.parametrize("watch", [lambda **options: RoutingWatch(build("olmoe"), **options), RoutingCallback])
def test_options_are_checked_before_a_training_begins(watch):
    for every in (1.5, "10", None, 0):
        with pytest.raises(BadInput, match=f"invalid every for Routing.*: expected .* of at least 1, got {every!r}"):
            watch(every=every)
    for allowed in (5, (5, 1), (1,), ("a", "b"), (0, math.nan)):
        with pytest.raises(
            BadInput,
            match=r"(not a range of n50|invalid alarms for .*): expected",
        ):
            watch(alarms={"n50": allowed})
    watch(every=np.int64(3), alarms={"n50": [1, np.float32(5)], "gini": (0.5, 0.5)})


def test_a_step_is_a_whole_number():
    with RoutingWatch(build("olmoe"), every=3) as watch:
        for number in ("a", None, 1.5):
            for begin in (watch.step, watch.begin):
                with pytest.raises(BadInput, match=f"invalid number for .*: expected a whole number, got {number!r}"):
                    begin(number)


def test_nothing_reported_is_an_error_and_a_table_survives_a_file(tmp_path):
    with RoutingWatch(build("olmoe"), every=3) as watch:
        due = r"expected a forward pass within `with watch.step\(n\):`, n a multiple of 3, got none"
        watch.model.hf(**batches(1)[0])
        with pytest.raises(BadInput, match=f"nothing was reported: {due}"):
            watch.table()
        for step in (0, 3):
            with watch.step(step):
                watch.model.hf(**batches(1)[0])
        table = watch.table()
    xr.testing.assert_identical(results.load(results.save(table, tmp_path / "table.nc")), table)


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = [{name: value[row] for name, value in batch.items()} for batch in batches(6) for row in range(2)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return self.rows[place]


def trainer_of(hf, tmp_path, callback, steps=4, accumulate=2):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-3,
        gradient_accumulation_steps=accumulate, report_to=[], save_strategy="no", logging_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(hf, arguments, train_dataset=Rows(), callbacks=[callback])


def test_the_callback_reports_a_trainers_own_steps(tmp_path):
    scalars = []

    class Writer:
        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

    hf = build("olmoe")
    callback = RoutingCallback(every=2, to=to_tensorboard(Writer()), alarms={"max_vio": (0, 100)})
    trainer_of(hf, tmp_path, callback).train()
    table = callback.watch.table()
    assert table.step.values.tolist() == [0, 2]
    lengths = sorted(table.tokens.values.tolist())
    assert all(12 <= length <= 20 for length in lengths)  # two texts of 10 or 6 tokens a step
    assert ("routing/layer_1/entropy", pytest.approx(float(table.entropy.sel(step=2, layer=1))), 2) in scalars
    assert {step for *_, step in scalars} == {0, 2}
    assert not hf._forward_hooks


def test_the_callback_stops_a_collapsed_training_when_it_is_told_to(tmp_path):
    callback = RoutingCallback(every=1, alarms={"dead_experts": (0, 3)}, stop=True, **SILENT)
    trainer = trainer_of(collapsed(), tmp_path, callback)
    trainer.train()
    assert trainer.state.global_step == 1
    assert len(callback.watch.raised) == 4

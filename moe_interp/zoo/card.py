"""The model card of the reference model, written from its training log and nothing else."""

import math
from typing import Any

SOURCES = {
    "english_literature": ("ELTeC-eng: novels first published 1840-1889", "public domain"),
    "french_literature": ("ELTeC-fra: novels by authors who died in or before 1930", "public domain"),
    "python_code": (
        "TheAlgorithms/Python and rich (MIT); networkx, flask, click, toolz and httpx (BSD-3-Clause); "
        "tornado and requests (Apache-2.0)",
        "MIT, BSD-3-Clause, Apache-2.0",
    ),
    "grade_school_math": ("GSM8K: questions and worked answers", "MIT"),
    "science_abstracts": ("arXiv titles and abstracts to the end of 2019", "CC0 1.0"),
    "chinese_classical": (
        "NiuTrans Classical-Modern: the classical texts only",
        "MIT; the works are public domain",
    ),
    "chinese_poetry": ("chinese-poetry: Tang and Song poems", "MIT; the works are public domain"),
    "chinese_educational": ("Dive into Deep Learning (d2l-zh): prose of the chapters", "Apache-2.0"),
    "competition_math": (
        "IMO-AnswerBench and IMO-ProofBench (CC BY 4.0); MathOdyssey (MIT)",
        "CC BY 4.0, MIT",
    ),
}

CARD = """---
license: mit
language: [en, fr, zh]
library_name: transformers
tags: [mixture-of-experts, interpretability]
---

# The moe_interp reference model

A small language model with a real, trained mixture of experts: large enough for its routing to mean
something, small enough to lie inside a Python package and run on two CPU cores. `moe.load()` opens it
without a network.

## What it is

| | |
| --- | --- |
| architecture | `DeepseekV2ForCausalLM`: 8 layers, the first dense, hidden 128, 4 heads of latent attention |
| experts | in 7 layers, 64 routed (top-6, width 48) and 2 shared; softmax weights x 4.0, not renormalised |
| parameters | {total:,}, of which {active:,} are used for a token; input and output embeddings are tied |
| context | {length} tokens |
| tokenizer | byte-level BPE, 8,192 tokens; `<\\|endoftext\\|>` begins every text, ends it and pads |
| weights | bfloat16, safetensors |

The first real token of a text is predicted from `<|endoftext|>`, as in training. Leave the tokenizer's
special tokens on, or the first token has no context and routing at the start of the text is not what the
model learned.

## What it is not

It is no assistant and knows nothing reliably: it continues text in the manner of its nine domains, about as
far as the table below says. Use it to learn and test methods of interpretability, then go to a large model.

**It must not be scored on GSM8K, IMO-Bench (IMO-AnswerBench, IMO-ProofBench) or MathOdyssey: they are in
its training data.** Passages of one novel, one classical work, one book chapter or one Python file can be
on both sides of the split into training and validation documents, so the figures below are for new
passages, not for new works.

## How well it predicts

Validation documents, each read alone from its start to the end of the context ({documents:,} documents,
{scored:,} tokens), against counts over the same training tokens: a unigram and an interpolated
(Witten-Bell) bigram model.

{table}

## How it was trained

{steps:,} steps of {batch} x {length} tokens: {seen:,} tokens, on a CPU, in {minutes} minutes of
optimisation steps. AdamW (learning rate {learning_rate}, warm-up {warmup_steps} steps, linear decay to zero over the
last {decay_steps}; betas 0.9 and 0.95; weight decay {weight_decay} on matrices; gradients clipped at norm
1); bfloat16 autocast over float32 weights. Load balance: the Switch loss, weight {balance}, read at the
package's own points. Over the last {window} steps its value was {balance_loss:.3f} (1 is even), the busiest
expert of a layer had {max_load:.1f} times its even share of a batch, and {dead:.1f} of the 448 experts got
no token of a batch.

    python -m moe_interp.zoo.train --corpus CORPUS --work-dir WORK {options}
    python -m moe_interp.zoo.export --corpus CORPUS --work-dir WORK --out moe_interp/zoo/reference{limit}

Training loss, in nats per token:

```
{figure}
```

`training_log.json` has the curve, the validation losses on the way, the versions and every argument.
`routing_checkpoints.safetensors` has the expert ids of fixed validation tokens after {snapshots} steps.

## What it was trained on

| domain | texts | licence |
| --- | --- | --- |
{sources}

Attribution for IMO-Bench: Luong et al., "Towards Robust Mathematical Reasoning", EMNLP 2025, copyright 2025
Google LLC, CC BY 4.0; changed to plain text. The texts themselves are not part of the package. SHA-256 over
the training files, sorted by name: `{data_sha256}`.
"""

COLUMNS = ("model", "bigram", "unigram")


def _mean_row(rows: list[dict[str, int | float]]) -> dict[str, int | float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def validation_table(validation: dict[str, dict[str, int | float]]) -> str:
    """Markdown: a line for each domain and for their plain mean; nats per token, then bits per byte."""
    heads = [f"{name}, nats/token" for name in COLUMNS] + [f"{name}, bits/byte" for name in COLUMNS]
    lines = ["| domain | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for domain, row in (validation | {"mean of domains": _mean_row(list(validation.values()))}).items():
        values = [row[f"{name}_{unit}"] for unit in ("nats", "bits_per_byte") for name in COLUMNS]
        lines.append(f"| {domain} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)


def loss_figure(curve: list[dict[str, int | float]], rows: int = 16, width: int = 60) -> str:
    """The loss curve as bars of text, one for each of `rows` stretches, from the whole number below."""
    size = math.ceil(len(curve) / rows)
    stretches = [curve[first : first + size] for first in range(0, len(curve), size)]
    losses = [sum(point["loss"] for point in stretch) / len(stretch) for stretch in stretches]
    floor, top = math.floor(min(losses)), max(losses)
    bars = ["#" * max(1, round(width * (loss - floor) / (top - floor))) for loss in losses]
    head = f"{'tokens':>10}  loss  (bars from {floor})"
    ends = [stretch[-1]["tokens"] for stretch in stretches]
    drawn = zip(ends, losses, bars, strict=True)
    return "\n".join([head, *(f"{tokens / 1e6:>8.2f} M  {loss:.2f}  {bar}" for tokens, loss, bar in drawn)])


def model_card(log: dict[str, Any]) -> str:
    """The whole card, in Markdown."""
    plan, validation, curve = log["arguments"], log["validation"], log["curve"]
    last = curve[-max(1, len(curve) // 20) :]
    before = curve[-len(last) - 1]["step"] if len(curve) > len(last) else 0
    tail = _mean_row(last)
    return CARD.format(
        **plan,
        **log["parameters"],
        documents=sum(row["documents"] for row in validation.values()),
        scored=sum(row["tokens"] for row in validation.values()),
        table=validation_table(validation),
        seen=log["tokens_seen"],
        minutes=round(log["training_seconds"] / 60),
        window=last[-1]["step"] - before,
        balance_loss=tail["balance_loss"],
        max_load=tail["max_over_mean_load"],
        dead=tail["dead_experts"],
        options=" ".join(f"--{name.replace('_', '-')} {value}" for name, value in plan.items()),
        limit=f" --documents {log['documents']}" if log["documents"] else "",
        figure=loss_figure(curve),
        snapshots=", ".join(f"{step:,}" for step in log["routing_steps"]),
        sources="\n".join(f"| {name} | {texts} | {licence} |" for name, (texts, licence) in SOURCES.items()),
        data_sha256=log["data_sha256"],
    )

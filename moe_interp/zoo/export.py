"""Turn a finished training run into the files that ship: weights, tokenizer, log, routing and model card.

1. Weights in bfloat16 with their config, generation config and tokenizer, as transformers reads them.
2. What was shipped is read back and held against the unigram and bigram baselines on the validation
   documents.
3. `routing_checkpoints.safetensors`: where fixed validation tokens were routed as training went on.
4. `training_log.json`: arguments, hash of the data, loss curve, validation, versions. `MODEL_CARD.md`
   follows from it.
"""

import argparse
import json
import platform
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from moe_interp import __version__
from moe_interp.zoo.baselines import fit_ngrams
from moe_interp.zoo.card import model_card
from moe_interp.zoo.corpus_tokens import VOCAB_SIZE, corpus_hash, encode, read_texts, token_stream
from moe_interp.zoo.evaluate import compare, token_bytes
from moe_interp.zoo.routing_checkpoints import write_routing
from moe_interp.zoo.train import CONTEXT, LOG, reference_config

CURVE_POINTS = 120
AVERAGED = ("loss", "balance_loss", "max_over_mean_load", "dead_experts")


def save_model(work_dir: Path, out: Path) -> dict[str, Any]:
    """Write the last checkpoint as a transformers folder; returns its `step` and `seconds`."""
    state = torch.load(work_dir / "checkpoint.pt", weights_only=True)
    model = DeepseekV2ForCausalLM(reference_config())
    model.load_state_dict(state["model"])
    model.bfloat16().save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(work_dir / "tokenizer").save_pretrained(out)
    return {"step": state["step"], "seconds": state["seconds"]}


def curve(records: list[dict[str, Any]]) -> list[dict[str, int | float]]:
    """The training log in about `CURVE_POINTS` points: means over runs of steps, each at its last step."""
    rows = [record for record in records if "loss" in record]
    size = max(1, len(rows) // CURVE_POINTS)
    points = []
    for window in (rows[first : first + size] for first in range(0, len(rows), size)):
        last = {name: window[-1][name] for name in ("step", "tokens", "learning_rate")}
        points.append(last | {name: round(fmean(row[name] for row in window), 4) for name in AVERAGED})
    return points


def parameter_counts(model: DeepseekV2ForCausalLM) -> dict[str, int]:
    """All parameters, and those that one token uses (its top-k of the routed experts)."""
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    share = Fraction(model.config.num_experts_per_tok or 0, model.config.n_routed_experts)
    return {"total": total, "active": int(total - routed + routed * share)}


def versions() -> dict[str, str]:
    """What the run was made with."""
    libraries = ("torch", "transformers", "tokenizers", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in libraries}


def validate(
    model: DeepseekV2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Path,
    validation: dict[str, list[Tensor]],
) -> dict[str, dict[str, int | float]]:
    """Domain -> losses of the model and of the baselines on its validation documents."""
    ngrams = fit_ngrams(token_stream(tokenizer, read_texts(corpus, "train")).ids, VOCAB_SIZE)
    lengths = token_bytes(tokenizer)
    return {domain: compare(model, ngrams, ids, lengths) for domain, ids in validation.items()}


def export(corpus: Path, work_dir: Path, out: Path, documents: int | None = None) -> None:
    """Write everything that ships to `out`; `documents` limits the validation documents of each domain."""
    out.mkdir(parents=True, exist_ok=True)
    done = save_model(work_dir, out)
    model = DeepseekV2ForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    held_out = read_texts(corpus, "validation")
    validation = {d: [ids[:CONTEXT] for ids in encode(tokenizer, held_out[d][:documents])] for d in held_out}
    plan = json.loads((work_dir / "plan.json").read_text())
    records = [json.loads(line) for line in (work_dir / LOG).open()]
    log = {
        "arguments": plan,
        "steps_done": done["step"],
        "tokens_seen": done["step"] * plan["batch"] * plan["length"],
        "training_seconds": round(done["seconds"]),
        "data_sha256": corpus_hash(corpus),
        "documents": documents,
        "parameters": parameter_counts(model),
        "versions": versions() | {"moe_interp": __version__},
        "validation": validate(model, tokenizer, corpus, validation),
        "validation_curve": [record for record in records if "validation" in record],
        "curve": curve(records),
        "routing_steps": write_routing(work_dir, model, validation, out / "routing_checkpoints.safetensors"),
    }
    (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    (out / "MODEL_CARD.md").write_text(model_card(log))
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors makes files that only their owner can read


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Export a finished training run.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--work-dir", type=Path, required=True, help="where the run kept its checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--documents", type=int, help="validation documents of each domain (default: all)")
    export(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()

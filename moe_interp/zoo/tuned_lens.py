"""Train the tuned lens of the bundled reference model, and measure it on texts that neither of them was trained on.

1. Train on the model's own training texts; the first texts of every domain are held out and decide when to stop.
2. Write the translators in 16 bits.
3. Read them back and measure them on the first validation texts of every domain, beside the plain lens.

A killed training goes on from ``--state``. The figures are printed as the table of docs/tuned_lens.md.

    python -m moe_interp.zoo.tuned_lens --corpus CORPUS --out moe_interp/zoo/reference/tuned_lens.safetensors
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import xarray as xr

from moe_interp.analyses.tuned_lens import BUNDLED, TunedLens, tuned_lens_quality
from moe_interp.analyses.tuned_training import train_tuned_lens
from moe_interp.checkpoint import load
from moe_interp.data import Corpus
from moe_interp.zoo.corpus_tokens import corpus_hash, read_texts

HELD_OUT = 6  # texts of each domain
MEASURED = 40  # validation texts of each domain
BATCH_TOKENS = 1024  # many small steps: a step's cost is the decoding, which grows with its tokens


def split(folder: Path) -> tuple[Corpus, Corpus]:
    """Training texts, and those of them that are held out, with no text in both."""
    texts = Corpus.from_texts(read_texts(folder, "train"), "the training texts of the reference model")
    held_out = texts.take(HELD_OUT)
    held = set(held_out.texts)
    return replace(texts, documents=tuple(one for one in texts.documents if one.text not in held)), held_out


def table(quality: xr.Dataset) -> str:
    """Markdown: a line for each place of the residual stream."""
    lines = [
        "| stream into layer | KL, plain | KL, tuned | gain in nats [95 %] | agreement, plain | tuned | gain [95 %] |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for layer in quality["layer"].values:
        at = quality.sel(layer=layer)
        cells = [str(layer)]
        for name, digits in (("kl", 3), ("agreement", 3)):
            low, high = at[f"{name}_gain_interval"].values
            cells += [f"{float(at[name].sel(lens=lens)):.{digits}f}" for lens in ("plain", "tuned")]
            cells.append(f"{float(at[f'{name}_gain']):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that holds train/ and validation/")
    parser.add_argument("--out", type=Path, default=BUNDLED["reference"])
    parser.add_argument("--state", type=Path, help="file that a killed training goes on from")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    corpus, held_out = split(asked.corpus)
    with load() as model:
        lens = train_tuned_lens(
            model,
            corpus,
            held_out=held_out,
            steps=asked.steps,
            learning_rate=asked.learning_rate,
            every=150,
            state=asked.state,
            batch_tokens=BATCH_TOKENS,
        )
        told = {**lens.provenance, "data_sha256": corpus_hash(asked.corpus)}
        replace(lens, provenance=told).save(asked.out, torch.float16)
        seen = Corpus.from_texts(read_texts(asked.corpus, "validation"), "the validation texts").take(MEASURED)
        quality = tuned_lens_quality(model, TunedLens.load(asked.out), seen)
    size = asked.out.stat().st_size / 1e3
    print(f"{asked.out}: {size:.0f} kB, trained on {told['tokens']:,} tokens in {told['steps_taken']:,} steps")
    print(f"measured on {int(quality['tokens']):,} tokens of {int(quality['documents'])} validation documents")
    print(table(quality))


if __name__ == "__main__":
    main()

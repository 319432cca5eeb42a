"""Which experts the same tokens went to, from early training to the end, to measure router saturation.

1. The first four validation documents of each domain; in each, 24 positions spread evenly over the text.
2. For each weight snapshot of the training run, the experts chosen there at every MoE layer (Muennighoff et
   al. 2024, section 5.1, compare the sets of such choices between checkpoints).

Only ids are kept, sorted within a token, since a router's slot order means nothing here.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_model, save_file
from torch import Tensor
from transformers import DeepseekV2ForCausalLM

from moe_interp.opening import wrap

DOCUMENTS = 4
POSITIONS = 24


def sampled_positions(length: int) -> Tensor:
    """Positions [24] spread over a text of `length` tokens, the leading `<|endoftext|>` left out."""
    return torch.linspace(1, length - 1, POSITIONS).long()


@torch.no_grad()
def sampled_experts(hf: DeepseekV2ForCausalLM, documents: list[Tensor]) -> Tensor:
    """Expert ids [N * 24, L, K] uint8 at the sampled positions, ascending within a token."""
    chosen = []
    with wrap(hf) as model:
        for ids in documents:
            run = model.run({"input_ids": ids[None]})
            layers = torch.stack([run.routing[layer].ids[0] for layer in model.layers], dim=1)
            chosen.append(layers[sampled_positions(len(ids))])
    return torch.cat(chosen).sort(-1).values.to(torch.uint8)


def snapshots(work_dir: Path) -> Iterator[tuple[int, Path]]:
    """Steps done and file of each snapshot, in training order."""
    for path in sorted(work_dir.glob("snapshot_*.safetensors")):
        yield int(path.stem.removeprefix("snapshot_")), path


def write_routing(
    work_dir: Path, hf: DeepseekV2ForCausalLM, validation: dict[str, list[Tensor]], path: Path
) -> list[int]:
    """Write the routing of every snapshot of a run to `path`; returns the steps they were taken at.

    Tensors of the file, T = documents x 24 tokens in document order: `expert_ids` [C, T, L, K] uint8,
    `steps` [C], `domain` [T] (an index into the metadata's `domains`), `document` [T] (a line of the
    domain's validation file), `position` [T] and `token_ids` [T]. `hf` lends its shape; its weights are
    replaced.
    """
    chosen = {domain: documents[:DOCUMENTS] for domain, documents in validation.items()}
    documents = [ids for texts in chosen.values() for ids in texts]
    positions = [sampled_positions(len(ids)) for ids in documents]
    token_ids = torch.cat([ids[at] for ids, at in zip(documents, positions, strict=True)])
    steps, routed = [], []
    for step, snapshot in snapshots(work_dir):
        load_model(hf, snapshot)
        steps.append(step)
        routed.append(sampled_experts(hf, documents))
    domain = torch.tensor([number for number, texts in enumerate(chosen.values()) for _ in texts])
    document = torch.tensor([number for texts in chosen.values() for number in range(len(texts))])
    tensors = {
        "expert_ids": torch.stack(routed),
        "steps": torch.tensor(steps),
        "domain": domain.repeat_interleave(POSITIONS).to(torch.int8),
        "document": document.repeat_interleave(POSITIONS).to(torch.int8),
        "position": torch.cat(positions).to(torch.int16),
        "token_ids": token_ids.to(torch.int16),
    }
    layers = list(range(hf.config.first_k_dense_replace, hf.config.num_hidden_layers))
    save_file(tensors, path, {"domains": json.dumps(list(chosen)), "layers": json.dumps(layers)})
    return steps

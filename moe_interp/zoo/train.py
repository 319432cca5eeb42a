"""Train the bundled reference model: a DeepSeek-V2-shaped mixture of experts of about 10 million parameters.

1. Fit the tokenizer and lay out the tokens (`corpus_tokens`).
2. Minimise next-token cross-entropy + `balance` x the Switch load-balance loss (Fedus et al. 2022, equation
   4), E sum_e f_e P_e with f_e the share of the token-slots that expert e gets and P_e its mean router
   score, averaged over layers. Scores and ids are read at the package's own points, `router_scores` and the
   routing of the run.
3. AdamW; the learning rate warms up, stays, and falls linearly to zero over the last steps (WSD: Hu et al.
   2024), so that how long to train can be decided while training.

Every `EVALUATE_EVERY` steps: validation loss by domain, and an atomic checkpoint that a second start with
the same arguments resumes from, to the same rows of the same epoch. Weights on the way go to
`snapshot_*.safetensors`.

    python -m moe_interp.zoo.train --corpus CORPUS --work-dir WORK --steps 5000 --decay-steps 1250
    python -m moe_interp.zoo.export --corpus CORPUS --work-dir WORK --out moe_interp/zoo/reference

On Linux, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 in the environment
makes a CPU run about 1.4 times faster: freed activations are used again instead of going back to the kernel.
"""

import argparse
import io
import json
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor
from tqdm import tqdm
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from moe_interp.model import MoEModel
from moe_interp.opening import wrap
from moe_interp.paths import write_whole
from moe_interp.zoo.corpus_tokens import (
    VOCAB_SIZE,
    batches,
    encode,
    read_texts,
    token_stream,
    train_tokenizer,
)
from moe_interp.zoo.evaluate import domain_losses

CONTEXT = 512
EVALUATE_EVERY = 250
EVALUATION_DOCUMENTS = 12
# And the last step. Early ones are closer, when routing still changes fast.
SNAPSHOTS = (36, 180, 540, 1260, 2340)
LOG = "log.jsonl"


@dataclass(frozen=True)
class Plan:
    """What, with the corpus, decides the weights. `batch` rows of `length` tokens a step."""

    steps: int = 5000
    decay_steps: int = 1250
    warmup_steps: int = 200
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    balance: float = 0.003
    batch: int = 8
    length: int = CONTEXT
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of the step numbered `step` (from 0)."""
        up = min(1.0, (step + 1) / self.warmup_steps)
        down = min(1.0, (self.steps - step) / self.decay_steps)
        return self.learning_rate * up * down

    def snapshots(self) -> tuple[int, ...]:
        """Steps done when a copy of the weights is kept."""
        return (*(step for step in SNAPSHOTS if step < self.steps), self.steps)


def reference_config() -> DeepseekV2Config:
    """Eight layers, the first dense; 64 routed experts, top-6, and two shared; latent attention."""
    return DeepseekV2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=48,
        num_hidden_layers=8,
        first_k_dense_replace=1,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        routed_scaling_factor=4.0,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def new_model(seed: int) -> DeepseekV2ForCausalLM:
    """Fresh weights, always the same for one seed."""
    torch.manual_seed(seed)
    return DeepseekV2ForCausalLM(reference_config())


def new_optimizer(model: DeepseekV2ForCausalLM, plan: Plan) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)


def expert_load(ids: Tensor, num_experts: int) -> Tensor:
    """Share [E] of all token-slots of `ids` [..., K] that each expert gets; sums to 1."""
    return ids.flatten().bincount(minlength=num_experts) / ids.numel()


def losses(model: MoEModel, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy in nats per token, load-balance loss (1 when even), and expert loads [L, E].

    `rows` [B, S + 1]: inputs and, one to the right, their targets.
    """
    run = model.run({"input_ids": rows[:, :-1]}, read=["router_scores"], grad=True)
    nll = F.cross_entropy(run.logits.float().flatten(0, 1), rows[:, 1:].flatten())
    experts = model.spec.num_experts
    load = torch.stack([expert_load(run.routing[layer].ids, experts) for layer in model.layers])
    scores = torch.stack([run["router_scores", layer].float().mean((0, 1)) for layer in model.layers])
    return nll, experts * (load * scores).sum(-1).mean(), load


@dataclass
class Trainer:
    """The state that a checkpoint holds: weights, optimizer, steps done, seconds spent."""

    plan: Plan
    work_dir: Path
    hf: DeepseekV2ForCausalLM
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0

    def update(self, model: MoEModel, rows: Tensor) -> dict[str, int | float]:
        """One optimisation step; returns its line of the log."""
        rate = self.plan.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Grouped GEMMs and norms stay in fp32; attention, dense and output matrices run in bfloat16.
        with torch.autocast("cpu", torch.bfloat16):
            nll, balance, load = losses(model, rows)
        (nll + self.plan.balance * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.hf.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {
            "step": self.step,
            "tokens": self.step * self.plan.batch * self.plan.length,
            "loss": nll.item(),
            "balance_loss": balance.item(),
            "learning_rate": rate,
            "gradient_norm": norm.item(),
            "max_over_mean_load": (load.max(-1).values * load.shape[-1]).mean().item(),
            "dead_experts": int((load == 0).sum()),
        }

    def save(self) -> None:
        """Write `checkpoint.pt` in one piece: whoever reads it finds the old one or the new one."""
        state = {"model": self.hf.state_dict(), "optimizer": self.optimizer.state_dict()}
        written = io.BytesIO()
        torch.save(state | {"step": self.step, "seconds": self.seconds}, written)
        write_whole(self.work_dir / "checkpoint.pt", written.getbuffer())

    def snapshot(self) -> None:
        """Keep a copy of the weights as they would be shipped, in bfloat16."""
        copy = DeepseekV2ForCausalLM(self.hf.config)
        copy.load_state_dict(self.hf.state_dict())
        save_model(copy.bfloat16(), str(self.work_dir / f"snapshot_{self.step:06d}.safetensors"))

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one, and forget the log lines after it."""
        path, log = self.work_dir / "checkpoint.pt", self.work_dir / LOG
        if not path.exists():
            log.unlink(missing_ok=True)
            return
        state = torch.load(path, weights_only=True)
        self.hf.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))

    def log(self, record: Mapping[str, object]) -> None:
        """Append one line to the log."""
        with (self.work_dir / LOG).open("a") as file:
            file.write(json.dumps(record) + "\n")


def fit(trainer: Trainer, rows: Iterator[Tensor], validation: dict[str, list[Tensor]]) -> None:
    """Train until the plan's last step, or until SIGTERM: then save and return."""
    plan, stopping = trainer.plan, []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    bar = tqdm(total=plan.steps, initial=trainer.step, unit="step", mininterval=10)
    with wrap(trainer.hf) as model:
        while trainer.step < plan.steps and not stopping:
            began = time.monotonic()
            record = trainer.update(model, next(rows))
            trainer.seconds += time.monotonic() - began
            trainer.log(record | {"seconds": round(trainer.seconds, 1)})
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.3f}", balance=f"{record['balance_loss']:.3f}")
            if trainer.step in plan.snapshots():
                trainer.snapshot()
            if trainer.step % EVALUATE_EVERY == 0 or trainer.step == plan.steps:
                trainer.log({"step": trainer.step, "validation": domain_losses(trainer.hf, validation)})
                trainer.save()
        trainer.save()
    bar.close()


def train(plan: Plan, corpus: Path, work_dir: Path) -> None:
    """Train (or go on training) the reference model on `corpus`, with all that is kept in `work_dir`."""
    work_dir.mkdir(parents=True, exist_ok=True)
    texts = read_texts(corpus, "train")
    tokenizer = train_tokenizer(texts, CONTEXT)
    tokenizer.save_pretrained(work_dir / "tokenizer")
    held_out = read_texts(corpus, "validation")
    validation = {
        domain: [ids[:CONTEXT] for ids in encode(tokenizer, documents[:EVALUATION_DOCUMENTS])]
        for domain, documents in held_out.items()
    }
    model = new_model(plan.seed)
    trainer = Trainer(plan, work_dir, model, new_optimizer(model, plan))
    trainer.resume()
    (work_dir / "plan.json").write_text(json.dumps(asdict(plan), indent=2))
    rows = batches(token_stream(tokenizer, texts), plan.batch, plan.length, plan.seed)
    fit(trainer, islice(rows, trainer.step, None), validation)


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of Plan, with its default."""
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the bundled reference model.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoint and log; resumed from there")
    parser.add_argument("--threads", type=int, default=2)
    plan_arguments(parser)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    corpus, work_dir = options.pop("corpus"), options.pop("work_dir")
    train(Plan(**options), corpus, work_dir)


if __name__ == "__main__":
    main()

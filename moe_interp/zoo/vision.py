"""The vision mixture of experts of "Do Experts Specialize?" (Poetzscher): a small convolutional classifier.

1. `VisionMoE`: a trunk of convolutions, a mixture of experts on one vector an image, a linear head. The base trunk has
   four convolutions (128, 256, 256, 512 filters), the short one a single convolution and one 8 x 8 pool; both give the
   mixture 512 inputs. Kernels of 3 x 3, batch norm, GELU, halving after the first, second and fourth convolution and
   the two layers of an expert are our reading: what we have of the paper does not say.
2. `describe` opens it through ``register_adapter``, the public door for architectures of one's own.
3. `train`: AdamW under OneCycle; cross-entropy + ``balance`` x the Switch load-balance loss (Fedus et al. 2022,
   equation 4), E sum_e f_e P_e, where f_e is the share of the decisions that expert e gets and P_e its mean score.

Weights of the chosen experts are renormalised, as in Mixtral, so that with K = 1 the weight is always 1 and the router
learns from the load-balance loss alone. That is why the paper's weight of it, 1e-5, is enough for even loads: AdamW
takes steps of one size, however small the gradient. With the score as the weight, as in Switch
(``renormalise=False``), the cross-entropy drowns it, and one expert takes nearly every image (docs/vision_moe.md).

A dense model is one with a single expert.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from moe_interp import register_adapter
from moe_interp.adapters import (
    EXPERTS_POINTS,
    ExpertsCall,
    Input,
    LayerSpec,
    ModelSpec,
    MoESpec,
    Output,
    RouterOutput,
    Scoring,
    Separate,
    Site,
)
from moe_interp.errors import BadInput

Depth = Literal["base", "short"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Plan:
    """What, with the images, decides the weights; defaults are the paper's (batch, neurons, renormalise: ours).

    Attributes:
        experts, top_k: E and K.
        depth: the trunk: four convolutions, or one.
        width: filters of the base trunk's first convolution; the mixture is given four times as many inputs.
        neurons: of an expert, in its one hidden layer.
        epochs, batch, learning_rate, weight_decay: of AdamW; the rate is the top of OneCycle.
        balance: weight of the load-balance loss.
        renormalise: whether the weights of the chosen experts sum to 1; else they are their scores, as in Switch.
        random: a router that draws its experts anew for every image, in training and after it.
        precision: of the trunk's products in training; everything else is in float32.
        seed: of the weights, of the order of images and of these draws.
    """

    experts: int = 2
    top_k: int = 1
    depth: Depth = "base"
    width: int = 128
    neurons: int = 512
    epochs: int = 10
    batch: int = 64
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    balance: float = 1e-5
    renormalise: bool = True
    random: bool = False
    precision: Precision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width % 4 or not 1 <= self.top_k <= self.experts:
            raise BadInput(
                "not a vision model",
                expected="a width that 4 divides, and 1 to E experts an image",
                got=f"width {self.width}, {self.top_k} of {self.experts} experts",
            )


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw from this seed, on the CPU and the device, and leave the generators as they were."""
    cuda = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.manual_seed(seed)
        yield


class Expert(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, features: int, neurons: int):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(features, neurons), nn.GELU(), nn.Linear(neurons, features)

    def forward(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The expert's output, unweighted."""
        return self.down(self.act(self.up(hidden)))


class Experts(nn.ModuleList):
    """Experts that are called as transformers 5 calls them: with hidden states, ids and weights."""

    def forward(
        self, hidden: Float[Tensor, "T D"], ids: Int[Tensor, "T K"], weights: Float[Tensor, "T K"]
    ) -> Float[Tensor, "T D"]:
        """The weighted sum of each row's experts. All run on all rows: small as they are, that is the faster way."""
        weight = hidden.new_zeros(len(hidden), len(self)).scatter_add(1, ids, weights)
        return torch.einsum("te,ted->td", weight, torch.stack([expert(hidden) for expert in self], dim=1))


class RandomRouter(nn.Module):
    """Logits that are drawn anew for every image, so that every expert is as likely as any other."""

    def __init__(self, experts: int):
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        """Normal ones."""
        return torch.randn(len(hidden), self.experts, device=hidden.device)


class Mixture(nn.Module):
    """A router, the K experts with the highest scores, and their weighted outputs."""

    def __init__(self, features: int, plan: Plan):
        super().__init__()
        self.top_k, self.renormalise, self.features = plan.top_k, plan.renormalise, features
        self.router = RandomRouter(plan.experts) if plan.random else nn.Linear(features, plan.experts)
        self.experts = Experts(Expert(features, plan.neurons) for _ in range(plan.experts))

    def forward(self, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """The weighted sum of the chosen experts."""
        logits = self.router(hidden)
        if self.renormalise:
            chosen, ids = logits.topk(self.top_k, dim=-1)
            weights = chosen.softmax(dim=-1)
        else:
            weights, ids = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return self.experts(hidden, ids, weights)


def _convolution(inputs: int, filters: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.GELU()]


def _trunk(channels: int, size: int, plan: Plan) -> nn.Sequential:
    width = plan.width
    if plan.depth == "short":  # a 4 x 4 grid is left: 8 x 8 pools of images of 32 pixels
        return nn.Sequential(*_convolution(channels, width // 4), nn.MaxPool2d(size // 4), nn.Flatten())
    return nn.Sequential(
        *_convolution(channels, width),
        nn.MaxPool2d(2),
        *_convolution(width, 2 * width),
        nn.MaxPool2d(2),
        *_convolution(2 * width, 2 * width),
        *_convolution(2 * width, 4 * width),
        nn.MaxPool2d(2),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
    )


class VisionMoE(nn.Module):
    """Convolutions, a mixture of experts on one vector an image, and a linear head.

    Args:
        channels, size: of the square images; 4 divides the size, which is at least 8.
        classes: how many.
        plan: everything else; weights are always the same for one seed.
    """

    def __init__(self, channels: int, size: int, classes: int, plan: Plan):
        super().__init__()
        if size < 8 or size % 4:
            raise BadInput("images of this size do not fit", expected="8, 12, 16, ... pixels", got=str(size))
        with seeded(plan.seed):
            self.trunk = _trunk(channels, size, plan)
            self.moe = Mixture(4 * plan.width, plan)
            self.head = nn.Linear(4 * plan.width, classes)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V"]:
        """Logits of the classes."""
        return self.head(self.moe(self.trunk(images)))


def describe(hf: Any) -> ModelSpec:
    """Where the points of a `VisionMoE` are. It has no residual stream, and one position an image."""
    moe: Mixture = hf.moe
    logits = RouterOutput("moe.router")
    sites: dict[str, Site] = {
        "moe_in": Input("moe"),
        "router_logits": logits,
        "router_scores": logits,
        "moe_out": Output("moe"),
    }
    mixture = MoESpec(
        block="moe",
        router="moe.router",
        experts="moe.experts",
        num_experts=len(moe.experts),
        top_k=moe.top_k,
        scoring=Scoring("softmax"),
        renormalises=moe.renormalise,
        kernel=Separate(up="up", down="down"),
        width=(("moe", "top_k"),),
    )
    inside = dict.fromkeys(EXPERTS_POINTS, ExpertsCall("moe.experts"))
    return ModelSpec(
        model_type="VisionMoE",
        layers=(LayerSpec(0, "moe", sites | inside, mixture, stack="images", pooled=True),),
        embed=None,
        final=(),
        unembed="head",
        d_model=moe.features,
        vocab_size=hf.head.out_features,
        context_length=1,
        kind="other",
        options={},
    )


register_adapter("VisionMoE", describe)


def balance_loss(scores: Float[Tensor, "B E"], top_k: int) -> Float[Tensor, ""]:
    """Switch load-balance loss E sum_e f_e P_e: 1 when even, E when one expert gets everything."""
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(top_k, dim=-1).indices, 1.0)
    return scores.shape[-1] / top_k * (chosen.mean(dim=0) * scores.mean(dim=0)).sum()


def batches(count: int, plan: Plan, device: torch.device | str = "cpu") -> Iterator[Int[Tensor, " B"]]:
    """Which images go into each step: every epoch all of them in a new order, the last few left out."""
    generator = torch.Generator().manual_seed(plan.seed)
    steps = steps_per_epoch(count, plan)
    for _ in range(plan.epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: steps * min(plan.batch, count)].to(device).chunk(steps)


def steps_per_epoch(count: int, plan: Plan) -> int:
    """Whole batches in an epoch, at least one."""
    return max(1, count // plan.batch)


def train(
    model: VisionMoE,
    images: Float[Tensor, "N C H W"],
    labels: Int[Tensor, " N"],
    plan: Plan,
    step_done: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Train a model on the images, all on one device; it is left in eval mode.

    Args:
        step_done: called after every step.

    Returns:
        Mean cross-entropy in nats and mean load-balance loss (1 when even) over the last epoch.
    """
    cuda = images.is_cuda
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=cuda or None
    )
    steps = steps_per_epoch(len(images), plan)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, total_steps=plan.epochs * steps)
    model.train()
    last = []
    with seeded(plan.seed, images.device):
        gradients: Callable[[Tensor], Tensor] = partial(_gradients, model, images, labels, plan)
        for number, batch in enumerate(batches(len(images), plan, images.device)):
            if cuda and number == 0:
                gradients = _recorded(gradients, batch)
            losses = gradients(batch)
            optimizer.step()
            schedule.step()
            step_done()
            if number >= (plan.epochs - 1) * steps:
                last.append(losses.clone())
    model.eval()
    means = torch.stack(last).mean(dim=0).tolist()
    return {"loss": means[0], "balance": means[1]}


def _gradients(
    model: VisionMoE, images: Tensor, labels: Tensor, plan: Plan, batch: Int[Tensor, " B"]
) -> Float[Tensor, "2"]:
    """Leave a step's gradients in the model, nothing of the step before; cross-entropy and load-balance loss."""
    model.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"):
        hidden = model.trunk(images[batch])
    hidden = hidden.float()
    # The router once more, a few thousand products, so that the mixture need not keep anything for the loss.
    balance = balance_loss(model.moe.router(hidden).softmax(dim=-1), plan.top_k)
    loss = functional.cross_entropy(model.head(model.moe(hidden)), labels[batch])
    (loss + plan.balance * balance).backward()
    return torch.stack([loss.detach(), balance.detach()])


def _recorded(step: Callable[[Tensor], Tensor], batch: Tensor) -> Callable[[Tensor], Tensor]:
    """A step as one CUDA graph: it is some hundred small kernels, and to launch each takes longer than to run it.

    What the step leaves is written to the same memory every time. Batch norm counts three batches more than there are,
    which its running means forget.
    """
    given, graph, stream = batch.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream(batch.device)
    stream.wait_stream(torch.cuda.current_stream(batch.device))
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # convolutions by the fastest of their kernels,
        with torch.cuda.stream(stream):  # which are tried before anything is recorded
            for _ in range(3):
                step(given)
        with torch.cuda.graph(graph, stream=stream):
            left = step(given)
    torch.cuda.current_stream(batch.device).wait_stream(stream)

    def replay(batch: Tensor) -> Tensor:
        given.copy_(batch)
        graph.replay()
        return left

    return replay

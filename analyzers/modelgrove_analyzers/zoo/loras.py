"""Fine-tune many LoRAs at once on one frozen base, each exactly as if it were trained alone.

N LoRAs share one forward pass of the frozen UNet: the batch is (N·b, …), LoRA by LoRA, and at every
target a hook adds (x Aᵢᵀ) Bᵢᵀ · αᵢ/rᵢ as batched products, or what another method adds (`methods`).
Targets are the attention projections and, as in LoCon, the layers by which timestep and pooled caption
enter the residual blocks. Ranks are padded to the largest: rows of A and columns of B that are zero get
zero gradients, so they stay zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from modelgrove_analyzers.zoo.base import Progress, draw_noise, to_pixels, v_errors
from modelgrove_analyzers.zoo.base_folder import ZooBase
from modelgrove_analyzers.zoo.methods import METHODS, Parts
from modelgrove_analyzers.zoo.pictures import PictureSet
from modelgrove_analyzers.zoo.recipes import Recipe
from modelgrove_hub.search.text import token_states

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj")
BETAS = (0.9, 0.99)
EPSILON = 1e-8
MEASURED = 16


@dataclass(frozen=True)
class Lora:
    """A LoRA: by module, the factors A (r, in) and B (out, r), or the parts of its recipe's method; float32, unscaled.

    The losses are v-errors on the same pictures, noises and times: without the LoRA, and with it.
    """

    recipe: Recipe
    factors: dict[str, Parts]
    first_loss: float
    last_loss: float


def target_modules(unet: UNet2DConditionModel) -> dict[str, nn.Linear]:
    """The linear layers that LoRAs change, by diffusers' module name."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{target}" for target in TARGETS))
    }


class LoraStack:
    """The parts of N LoRAs of one method on the same modules, each part (N, …) padded to the largest rank."""

    def __init__(self, unet: UNet2DConditionModel, loras: Sequence[Lora]) -> None:
        self.modules = target_modules(unet)
        self.method = METHODS[loras[0].recipe.method]
        self.scale = torch.tensor([lora.recipe.scale for lora in loras]).view(-1, 1, 1)
        self.shapes = {name: [[part.shape for part in lora.factors[name]] for lora in loras] for name in self.modules}
        self.parts = {
            name: [_padded(same) for same in zip(*(lora.factors[name] for lora in loras), strict=True)]
            for name in self.modules
        }

    @property
    def tensors(self) -> list[Tensor]:
        """The parts to be trained."""
        frozen = self.method.frozen
        return [part for parts in self.parts.values() for place, part in enumerate(parts) if place not in frozen]

    @contextmanager
    def attached(self, count: int) -> Iterator[None]:
        """The first `count` LoRAs act on the UNet: it takes batches of count·b, LoRA by LoRA."""
        handles = [module.register_forward_hook(self._hook(name, count)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, count: int) -> Callable[[nn.Linear, tuple[Tensor], Tensor], Tensor]:
        def act(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            tokens = inputs[0].reshape(count, -1, inputs[0].shape[-1])
            frozen = output.reshape(count, -1, output.shape[-1])
            parts = [part[:count] for part in self.parts[name]]
            return self.method.act(module, parts, self.scale[:count], tokens, frozen).view_as(output)

        return act

    def factors(self, index: int) -> dict[str, Parts]:
        """The parts of one LoRA, without the padding."""
        return {
            name: tuple(
                part[index, :rows, :columns].detach().clone()
                for part, (rows, columns) in zip(parts, self.shapes[name][index], strict=True)
            )
            for name, parts in self.parts.items()
        }


class StackedAdam:
    """Adam (arXiv 1412.6980, algorithm 1) on stacked parameters, with a learning rate for each entry of the stack."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.first = [torch.zeros_like(t) for t in tensors]
        self.second = [torch.zeros_like(t) for t in tensors]
        self.step_number = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rates: Tensor) -> None:
        """Update the first len(rates) entries; the others are finished and stay as they are."""
        self.step_number += 1
        count, (beta1, beta2) = len(rates), BETAS
        sizes = (rates / (1 - beta1**self.step_number)).view(-1, 1, 1)
        for tensor, stacked, first, second in zip(self.tensors, gradients, self.first, self.second, strict=True):
            m, v, gradient = first[:count], second[:count], stacked[:count]
            m.lerp_(gradient, 1 - beta1)
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (v / (1 - beta2**self.step_number)).sqrt_().add_(EPSILON)
            tensor[:count] -= sizes * m / root


def fresh_lora(unet: UNet2DConditionModel, recipe: Recipe) -> Lora:
    """An untrained LoRA, which changes nothing yet, from the recipe's seed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    start = METHODS[recipe.method].start
    factors = {name: start(module, recipe, generator) for name, module in target_modules(unet).items()}
    return Lora(recipe, factors, float("nan"), float("nan"))


def differences(unet: UNet2DConditionModel, lora: Lora) -> dict[str, Tensor]:
    """By module, W − W₀ (out, in) of a LoRA of any method, float32."""
    method, scale = METHODS[lora.recipe.method], torch.tensor(lora.recipe.scale)
    return {
        name: method.difference(module, lora.factors[name], scale).detach()
        for name, module in target_modules(unet).items()
    }


def train_loras(
    base: ZooBase, pictures: PictureSet, recipes: Sequence[Recipe], progress: Progress = lambda _done, _message: None
) -> list[Lora]:
    """Train all `recipes` together, in the order given. The base is left as it was.

    All must share the method, the batch size and the prompt. A LoRA that has done its steps leaves the batch.
    """
    order = sorted(range(len(recipes)), key=lambda i: -recipes[i].steps)
    trained = _train([recipes[i] for i in order], base, pictures, progress)
    return [trained[order.index(i)] for i in range(len(recipes))]


def _train(recipes: list[Recipe], base: ZooBase, pictures: PictureSet, progress: Progress) -> list[Lora]:
    base.unet.requires_grad_(False)
    stack = LoraStack(base.unet, [fresh_lora(base.unet, recipe) for recipe in recipes])
    for tensor in stack.tensors:
        tensor.requires_grad_()
    optimizer = StackedAdam(stack.tensors)
    feeds = [Feed(base, pictures, recipe) for recipe in recipes]
    states = token_states([recipes[0].prompt])
    first = measure(base, pictures, recipes, states)
    total, done = sum(recipe.steps for recipe in recipes), 0
    for step in range(recipes[0].steps):
        active = [feed for feed in feeds if feed.recipe.steps > step]
        latents, times, epsilon = (torch.cat(parts) for parts in zip(*(feed.draw() for feed in active), strict=True))
        with stack.attached(len(active)):
            errors = v_errors(base.unet, base.noise, latents, states.expand(len(latents), -1, -1), times, epsilon)
        # The sum of each LoRA's mean: every LoRA gets the gradients that it would get alone.
        loss = errors.view(len(active), -1).mean(1).sum()
        rates = torch.tensor([learning_rate(feed.recipe, step) for feed in active])
        optimizer.step(torch.autograd.grad(loss, stack.tensors), rates)
        done += len(active)
        progress(done / total, f"step {step + 1}, {len(active)} LoRAs")
    with stack.attached(len(recipes)):
        last = measure(base, pictures, recipes, states)
    return [Lora(recipe, stack.factors(i), first[i], last[i]) for i, recipe in enumerate(recipes)]


@torch.no_grad()
def measure(base: ZooBase, pictures: PictureSet, recipes: Sequence[Recipe], states: Tensor) -> list[float]:
    """Each recipe's mean v-error on 16 draws that are not those of its training, with whatever LoRAs are attached."""
    feeds = [Feed(base, pictures, replace(recipe, batch=MEASURED, seed=recipe.seed + 1)) for recipe in recipes]
    latents, times, epsilon = (torch.cat(parts) for parts in zip(*(feed.draw() for feed in feeds), strict=True))
    errors = v_errors(base.unet, base.noise, latents, states.expand(len(latents), -1, -1), times, epsilon)
    means: list[float] = errors.view(len(recipes), -1).mean(1).tolist()
    return means


class Feed:
    """The training batches of one LoRA: its pictures, shifted by a pixel at most, and its noise, from its own seed."""

    def __init__(self, base: ZooBase, pictures: PictureSet, recipe: Recipe) -> None:
        self.recipe, self.codec = recipe, base.codec
        self.pixels = to_pixels(pictures.pixels[list(recipe.pictures)])
        self.generator = torch.Generator().manual_seed(recipe.seed + 1)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (b, K, 8, 8), timesteps (b,) and noise like the latents."""
        rows = torch.randint(len(self.pixels), (self.recipe.batch,), generator=self.generator)
        shift = torch.randint(-1, 2, (2,), generator=self.generator).tolist()
        latents = self.codec.encode(self.pixels[rows].roll(shift, dims=(2, 3)))
        return latents, *draw_noise(latents.shape, self.generator)


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate at `step`: it falls linearly to zero."""
    return recipe.learning_rate * (1 - step / recipe.steps)


def _padded(matrices: Sequence[Tensor]) -> Tensor:
    rows, columns = (max(matrix.shape[side] for matrix in matrices) for side in (0, 1))
    padded = torch.zeros(len(matrices), rows, columns)
    for place, matrix in zip(padded, matrices, strict=True):
        place[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded

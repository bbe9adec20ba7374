"""Paint with a standard diffusers pipeline of an allow-listed class, from local files alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from PIL import Image, ImageOps
from torch import Tensor, nn

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.style_tokens import place_rows, split_prompt
from modelgrove_plugins.preview.painter import SAMPLERS, Wish, batches, make_scheduler

if TYPE_CHECKING:
    from modelgrove_plugins.preview.diffusers import PreviewParams

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
)
_LIBRARIES = ("diffusers", "transformers")
_BATCH = 4


@dataclass
class StandardPainter:
    """A pipeline in float32 (half precision is 50 times slower on CPUs without it)."""

    pipe: Any
    scheduler: str = ""
    pipeline: str = field(init=False)
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipeline = type(self.pipe).__name__

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Component name → network. Later names win in fusing: the denoiser's short names before a text encoder's."""
        parts = self.pipe.components
        order = sorted(parts, key=lambda name: name.startswith("text_encoder"), reverse=True)
        return {name: parts[name] for name in order if isinstance(parts[name], nn.Module)}

    @property
    def noise(self) -> Mapping[str, Any]:
        """The scheduler's configuration; another sampler takes it over."""
        config: Mapping[str, Any] = self.pipe.scheduler.config
        return config

    def swap(self, component: str, network: nn.Module) -> None:
        """Paint with another network in the place of a component."""
        setattr(self.pipe, component, network)

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The means of the autoencoder's latents, scaled as the denoiser has them, one picture after the other."""
        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        vae, latents = self.pipe.vae, []
        for picture in pictures:
            pixels = self.pipe.image_processor.preprocess(ImageOps.fit(picture, (side, side)))
            latents.append(vae.encode(pixels).latent_dist.mean - (vae.config.shift_factor or 0))
        scaled: Tensor = torch.cat(latents) * vae.config.scaling_factor
        return scaled

    @classmethod
    def load(cls, folder: Path, index: Mapping[str, Any]) -> StandardPainter:
        """Build the pipeline from `folder`; nothing is downloaded and no code of the folder is run.

        Raises:
            UsageError: its class is not one that this previewer knows.
            DataError: a component is not of diffusers or transformers, or does not load.
        """
        name = index["_class_name"]
        if name not in PIPELINES:
            raise UsageError(f"pipeline class {name!r} cannot be previewed; known are {', '.join(PIPELINES)}")
        for part, value in index.items():
            if isinstance(value, list) and value[:1] not in [[library] for library in (*_LIBRARIES, None)]:
                raise DataError(f"model_index.json: component {part!r} comes from {value[:1]}, not {_LIBRARIES}")
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()  # the job has a progress of its own
        try:
            pipe = getattr(diffusers, name).from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
            raise DataError(f"{name} does not load: {error}") from error
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe)

    def paint(
        self, wishes: Sequence[Wish], params: PreviewParams, progress: Callable[[float], None]
    ) -> list[Image.Image]:
        """One picture for each (prompt, seed), a few at a time."""
        self._set_scheduler(params.sampler)
        pictures: list[Image.Image] = []
        for batch, report in batches(wishes, _BATCH, progress):
            pictures += self._paint(batch, params, report)
        return pictures

    def _set_scheduler(self, sampler: str) -> None:
        """Flow-matching pipelines keep their own scheduler: theirs is another noise schedule."""
        own = self.pipe.scheduler
        if getattr(diffusers, SAMPLERS[sampler]) in getattr(own, "compatibles", ()):
            self.pipe.scheduler = make_scheduler(sampler, own.config)
        self.scheduler = type(self.pipe.scheduler).__name__

    def _paint(
        self, batch: Sequence[Wish], params: PreviewParams, progress: Callable[[float], None]
    ) -> list[Image.Image]:
        def after_step(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
            progress((step + 1) / params.steps)
            return values

        arguments = {
            "prompt": [prompt for prompt, _ in batch],
            "negative_prompt": [params.negative_prompt] * len(batch),
            "num_inference_steps": params.steps,
            "guidance_scale": params.guidance_scale,
            "generator": [torch.Generator().manual_seed(seed) for _, seed in batch],
            "height": params.side or None,
            "width": params.side or None,
            "callback_on_step_end": after_step,
        }
        known = inspect.signature(self.pipe.__call__).parameters
        with self._spoken():
            result = self.pipe(**{name: value for name, value in arguments.items() if name in known}, output_type="pil")
        return [picture.convert("RGB") for picture in result.images]

    @contextmanager
    def _spoken(self) -> Iterator[None]:
        """Prompts may have style tokens: the pipeline encodes the rest, and the rows are put into its states."""
        if not self.tokens:
            yield
            return
        encode = self.pipe.encode_prompt

        def encode_prompt(prompt: list[str], *positional: Any, **named: Any) -> tuple[Any, ...]:
            texts, rows = zip(*(split_prompt(text, self.tokens) for text in prompt), strict=True)
            states, *others = encode(list(texts), *positional, **named)
            return place_rows(states, rows), *others

        self.pipe.encode_prompt = encode_prompt
        try:
            yield
        finally:
            del self.pipe.encode_prompt

"""A fixed linear picture codec: pixel-unshuffle, PCA, half-whitening. No VAE to train.

A picture of 32×32 becomes 8×8 patches of 4×4×3 = 48 numbers; PCA keeps the first K, and
each component is divided by its standard deviation to the power ½ ("half-whitened"), so
coarse components still weigh more than fine ones in the diffusion loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class LinearCodec:
    """Pictures (n, 3, 32, 32) in [-1, 1] ⇄ latents (n, K, 8, 8) of about unit variance.

    `mean` is (patch²·3,), `encoder` (K, patch²·3) and `decoder` (patch²·3, K), all float32.
    """

    mean: Tensor
    encoder: Tensor
    decoder: Tensor
    patch: int

    @property
    def channels(self) -> int:
        """K, the number of latent channels."""
        return self.encoder.shape[0]

    @classmethod
    def fit(cls, pictures: Tensor, channels: int, patch: int = 4) -> LinearCodec:
        """PCA over all patches of `pictures`, (n, 3, h, w) in [-1, 1]."""
        patches = functional.pixel_unshuffle(pictures, patch).permute(0, 2, 3, 1).reshape(-1, 3 * patch**2).double()
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
        components = vectors.flip(1)[:, :channels]
        half = values.flip(0)[:channels].sqrt().sqrt()
        # One common scale brings the mean variance of all components to one.
        scale = half * (half**2).mean().sqrt()
        return cls(
            mean.float(), (components / scale).T.float().contiguous(), (components * scale).float().contiguous(), patch
        )

    def encode(self, pictures: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] → (n, K, h/patch, w/patch)."""
        patches = functional.pixel_unshuffle(pictures, self.patch).movedim(1, -1)
        return ((patches - self.mean) @ self.encoder.T).movedim(-1, 1).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """(n, K, h, w) → pictures (n, 3, h·patch, w·patch), clamped to [-1, 1]."""
        patches = latents.movedim(1, -1) @ self.decoder.T + self.mean
        return functional.pixel_shuffle(patches.movedim(-1, 1), self.patch).clamp(-1, 1)

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps of the codec; `from_tensors` reads it back."""
        return {"mean": self.mean, "encoder": self.encoder, "decoder": self.decoder}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> LinearCodec:
        """The codec of stored matrices; the patch size follows from the shape of `mean`.

        Raises:
            ValueError: the shapes do not belong together.
        """
        mean, encoder, decoder = (tensors[name].float() for name in ("mean", "encoder", "decoder"))
        patch = round((mean.numel() / 3) ** 0.5)
        if 3 * patch**2 != mean.numel() or encoder.shape != decoder.T.shape or encoder.shape[1] != mean.numel():
            shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in ("mean", "encoder", "decoder"))
            raise ValueError(f"not a linear codec: {shapes}")
        return cls(mean, encoder, decoder, patch)

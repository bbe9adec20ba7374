"""Fréchet distance between pictures that are painted and real ones, in features of the denoiser as it was loaded.

As FID (Heusel et al., arXiv 1706.08500), with another network: what the middle of the frozen denoiser answers to
slightly noised pictures describes them (Baranchuk et al., arXiv 2112.03126). Real captions are painted on seeds that
stay. Values compare between states of one training and for one number of pictures, not with FIDs elsewhere: fewer
pictures give larger distances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, LivePipeline, Params, Picture, Result
from modelgrove_hub.errors import UsageError
from modelgrove_plugins.evaluate.scoring import ScoringParams, score_models

if TYPE_CHECKING:
    from torch import Tensor

_LEVEL = 0.1
"""How far pictures are noised for their features, as a share of the training's time."""


class FrechetParams(ScoringParams):
    """How pictures are painted."""

    steps: int = Field(8, ge=1, le=200, description="Denoising steps of each picture.")
    guidance: float = Field(2.0, ge=0, le=50, description="How closely to follow the caption; 1 is unguided.")


class Frechet:
    """Score denoisers by how far what they paint is from real pictures."""

    name: ClassVar[str] = "frechet"
    kind: ClassVar[Kind] = Kind.ANALYZER
    api: ClassVar[int] = API
    summary: ClassVar[str] = (
        "Fréchet distance of painted pictures from real ones, in the denoiser's own features; also guides lcsc."
    )
    paper: ClassVar[str] = "Heusel et al., GANs Trained by a Two Time-Scale Update Rule (NeurIPS 2017)"
    Params: ClassVar[type[Params]] = FrechetParams

    def run(self, context: Context, params: FrechetParams) -> Result:
        """Report the score of every input; lower is better.

        Raises:
            UsageError: the inputs do not belong together or cannot paint, or there is one picture alone.
            DataError: a model or a picture is broken.
        """
        return score_models(context, self, params)

    def prepare(
        self, pipeline: LivePipeline, pictures: Sequence[Picture], seed: int, params: FrechetParams
    ) -> Callable[[], float]:
        """What paints all captions with the pipeline as it is then, and measures the distance.

        Raises:
            UsageError: there are fewer than two pictures, which have no variance.
        """
        from modelgrove_plugins.compress.perception import features, frechet

        if len(pictures) < 2:
            raise UsageError("a Fréchet distance needs two pictures or more: more pictures, more reliable")
        captions, seeds = [picture.caption for picture in pictures], [seed + place for place in range(len(pictures))]
        silent = [replace(picture, caption="") for picture in pictures]

        def described(shown: Sequence[Picture]) -> list[Tensor]:
            return features(pipeline.original, pipeline.ask(shown, [_LEVEL], seed))

        real = described(silent)

        def score() -> float:
            painted = pipeline.paint(captions, seeds, params.steps, params.guidance)
            return frechet(
                real, described([replace(one, image=image) for one, image in zip(silent, painted, strict=True)])
            )

        return score

"""The denoising loss on pictures that were held out, with noise that stays.

‖ŷ − y‖² / ‖y‖² over all pictures and times, y being what the denoiser is trained to answer (noise, v or the sample):
the training's loss as a share of the answers' own energy. Times are the middles of equal parts of the training's
range, so that every candidate is asked at the same ones, and its score has no noise of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, LivePipeline, Params, Picture, Result
from modelgrove_plugins.evaluate.scoring import ScoringParams, score_models


class DenoisingLossParams(ScoringParams):
    """How finely the times of training are looked at."""

    times: int = Field(8, ge=1, le=1000, description="Times at which every picture is noised.")


class DenoisingLoss:
    """Score denoisers by what their training lowers, on other pictures."""

    name: ClassVar[str] = "denoising-loss"
    kind: ClassVar[Kind] = Kind.ANALYZER
    api: ClassVar[int] = API
    summary: ClassVar[str] = (
        "The denoising error on real pictures with captions, at fixed times and noise; also guides lcsc."
    )
    paper: ClassVar[str] = "Ho et al., Denoising Diffusion Probabilistic Models (NeurIPS 2020), equation 14"
    Params: ClassVar[type[Params]] = DenoisingLossParams

    def run(self, context: Context, params: DenoisingLossParams) -> Result:
        """Report the score of every input; lower is better.

        Raises:
            UsageError: the inputs do not belong together or cannot paint.
            DataError: a model or a picture is broken.
        """
        return score_models(context, self, params)

    def prepare(
        self, pipeline: LivePipeline, pictures: Sequence[Picture], seed: int, params: DenoisingLossParams
    ) -> Callable[[], float]:
        """What measures the error of the pipeline's denoiser as it is then."""
        from modelgrove_plugins.compress.fidelity import epsilon_error

        calls = pipeline.ask(pictures, [(place + 0.5) / params.times for place in range(params.times)], seed)
        return lambda: epsilon_error(pipeline.network, calls).overall

"""ProbeX: learned vectors are passed through one layer's update, and what comes out is encoded.

Horwitz, Cavia, Kahana & Hoshen, Learning on Model Weights using Tree Experts, CVPR 2025, arXiv
2410.13569, section 4. For the update X (out × in) of one layer, probes u_l and a projection V that
they share,

    z_l = X u_l,    p_l = ReLU(Vᵀ z_l),    e = Σ_l M_l p_l + b

with r_U = r_V = r_T = 128; the loss is in `heads`. The paper trains an expert for each layer; here
`closed_form.best_layer` chooses one. Factors are read with their scale α/r, which the paper's code
leaves out: files of different trainers would not compare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from modelgrove_analyzers.encoders.features import Shape, Updates
from modelgrove_analyzers.encoders.heads import Parameters, uniform
from modelgrove_analyzers.encoders.learning import Encoder, TrainedEmbedder
from modelgrove_analyzers.encoders.probes import responses

if TYPE_CHECKING:
    from torch import Generator, Tensor


def start(shape: Shape, rank: int, generator: Generator) -> dict[str, Tensor]:
    """U (in, r), V (out, r), M (r, r·r) and b, each as the paper's code starts it."""
    out, width = shape
    return {
        # The code keeps the probes as the weight of Linear(r_U → in), which is started by its r_U inputs.
        "U": uniform((width, rank), rank, generator),
        "V": uniform((out, rank), out, generator),
        "M": uniform((rank, rank * rank), rank * rank, generator),
        "b": uniform((rank,), rank * rank, generator),
    }


def encode(parameters: Parameters, updates: Updates) -> Tensor:
    """e (n, r_T) of n models."""
    heard = responses(updates, parameters["U"], parameters["V"], standardise=False).relu()
    encoded: Tensor = heard.flatten(1) @ parameters["M"].T + parameters["b"]
    return encoded


class ProbeX(TrainedEmbedder):
    """The paper's method, and with `temperature` its better variant."""

    name: ClassVar[str] = "probex"
    summary: ClassVar[str] = "Text search over LoRA weights: learned probes through one layer, trained against texts."
    paper: ClassVar[str] = "Horwitz et al., Learning on Model Weights using Tree Experts, arXiv 2410.13569"
    encoder: ClassVar[Encoder] = Encoder(start, encode)

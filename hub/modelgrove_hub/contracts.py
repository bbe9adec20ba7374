"""What a plugin is. Read this page first; `examples/` has a whole package built from it.

A plugin is a class with a few facts and one method. It is found through the entry-point group
`modelgrove.plugins` (entry name = kind.name, as in "compressor.rtn") and imported when it is
listed, so its module must be light: torch and friends are imported inside `run`. The method
itself runs in a worker, with everything it may touch in a `Context`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Generator, Tensor
    from torch.nn import Module

    from modelgrove_hub.formats.quantized import PackedTensor
    from modelgrove_hub.ingest.offers import Offer
    from modelgrove_hub.tables import ModelKind, Relation

API = 1
"""The version of this contract. A plugin that names another one is listed as incompatible."""


class Kind(StrEnum):
    """What a plugin does, from its input to its output."""

    COMPRESSOR = "compressor"  # model → smaller revision, report
    MERGER = "merger"  # models, weights → new model, report
    VERIFIER = "verifier"  # model, key → verdict with statistics
    EDITOR = "editor"  # model, concept → changed model, report
    GUARD = "guard"  # prompt or latents during a preview → changed guidance, verdict
    SAMPLER = "sampler"  # denoiser, schedule → latents
    GENERATOR = "generator"  # condition → new model
    EMBEDDER = "embedder"  # models and texts → expert; model → vector in a text space
    ANALYZER = "analyzer"  # models → report
    PREVIEWER = "previewer"  # model, adapters, prompt → pictures
    SOURCE = "source"  # address → models that are there


class Params(BaseModel):
    """A plugin's parameters: the CLI options, the REST schema and the web form are made from it.

    Give every field a default (or none, if the user must choose), limits and a description.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class LazyTensor(Protocol):
    """A tensor in a file: what the header says, and its values when asked."""

    name: str
    """Unique in the model: the folder that the file is in, then the name in the file: "unet/conv_in.weight"."""
    key: str
    """The name in the file: "conv_in.weight"."""
    file: str
    """The file's path in the model: "unet/diffusion_pytorch_model.safetensors"."""
    dtype: str
    """As safetensors writes it: F64 F32 F16 BF16 F8_E4M3 F8_E5M2 I64 … BOOL."""
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The values, in the stored dtype, read from disk now."""


class InputModel(Protocol):
    """A registered model, given to a plugin to read."""

    @property
    def name(self) -> str:
        """As registered: "owner/name"."""

    @property
    def family(self) -> str:
        """As recognised: "sdxl", "zoo", "unknown"."""

    @property
    def adapter_type(self) -> str | None:
        """As recognised: "lora", "loha"; None when it is no adapter."""

    @property
    def revision_id(self) -> int:
        """The registry's id of this content."""

    @property
    def summary(self) -> Mapping[str, Any]:
        """What recognition found: variant, ranks, alphas, targets, base candidates, reasons, coverage."""

    @property
    def card(self) -> str:
        """The model card's text; empty when there is none."""

    @property
    def tags(self) -> Sequence[str]:
        """The model card's tags."""

    @property
    def base(self) -> InputModel | None:
        """The registered model that this one was made from, where there is one and the weights agree."""

    def tensors(self) -> Iterator[LazyTensor]:
        """All tensors of all safetensors files, in file order, on disk until read; `DataError` if there are none."""

    def metadata(self) -> Mapping[str, str]:
        """The `__metadata__` of the weight files."""

    def files(self) -> Mapping[str, Path]:
        """The revision's files: path in the model → path on this machine."""

    def sha256(self, path: str) -> str:
        """The hash of the file at `path` in the model; known from the registry, so it costs nothing."""


class TensorWriter(Protocol):
    """Writes one safetensors file tensor by tensor; nothing is visible until the job succeeds."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor (moved to the CPU, made contiguous). A name may be used once."""

    def describe(self, key: str, value: str) -> None:
        """Add an entry to the file's `__metadata__`, also after the tensors; said again, it is replaced."""


@dataclass(frozen=True)
class Output:
    """A model that the job made. The hub names it, recognises it and records its lineage."""

    files: tuple[str, ...]
    """Paths inside the output folder, as given to `writer` and `path`."""
    relation: Relation
    """How it came from the job's inputs."""
    name: str = ""
    """Suggested name; the job's target name wins."""
    kind: ModelKind | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What `run` returns: models made, a report (JSON values), pictures or other files shown to people."""

    outputs: tuple[Output, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    artefacts: tuple[str, ...] = ()
    """Paths inside the output folder that are kept with the job: plots, pictures."""


class Context(Protocol):
    """All that a plugin may touch while it runs."""

    inputs: Sequence[InputModel]
    seed: int
    """Derived from the job: the same job gives the same numbers."""
    temp: Path
    """Scratch space, removed afterwards."""

    def progress(self, done: float, message: str = "") -> None:
        """Report the share done, in [0, 1]. Raises `Cancelled` when the user gave up: call it at every step."""

    def log(self, message: str) -> None:
        """Add a line to the job's log."""

    def generator(self) -> Generator:
        """A CPU random generator seeded by the job."""

    def writer(self, path: str, metadata: Mapping[str, str] | None = None) -> TensorWriter:
        """A streaming safetensors writer for `path` in the output folder; closed by the hub."""

    def path(self, path: str) -> Path:
        """Where to write any other output file; parent folders exist."""


class Cancelled(Exception):  # noqa: N818  (not an error: the user's wish)
    """Raised by `Context.progress` after a cancel. Let it pass; the hub cleans up."""


@runtime_checkable
class Plugin(Protocol):
    """One method of one paper. Third parties write exactly what our own plugins do."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    api: ClassVar[int]
    summary: ClassVar[str]
    paper: ClassVar[str]
    Params: ClassVar[type[Params]]

    def run(self, context: Context, params: Any) -> Result:
        """Do the work. `params` is an instance of this class's `Params`.

        Raise `DataError` for an input that cannot be used (name the tensor), `UsageError` for
        parameters that do not fit the input; anything else counts as the plugin's own fault.
        """


@runtime_checkable
class Embedder(Plugin, Protocol):
    """Kind embedder: `run` fits an expert on `context.inputs` and writes it to "expert.safetensors"
    in the output folder (an artefact); `embed` then places any model of the same tree.
    """

    def embed(self, expert: Path, model: InputModel) -> Sequence[float]:
        """The model's vector of length one in the frozen text space of the expert file."""


@runtime_checkable
class Source(Protocol):
    """Kind source, without `run`; its `Params` is an `ingest.offers.SourceParams` (docs/sources.md)."""

    def offers(self, context: Context, params: Any) -> Iterator[Offer]:
        """Every model that is there now. Raise `StorageError` when that cannot be told: the job is tried again."""

    def fetch(self, context: Context, offer: Offer, params: Any, folder: Path) -> Path:
        """Bring an offer that is not `found` here into `folder`, kept between attempts; where its file or folder is."""


@runtime_checkable
class Planner(Plugin, Protocol):
    """Kind compressor: one that knows from a tensor's shape what it will make of it, for `compress --dry-run`."""

    def choose(self, tensor: LazyTensor, params: Any) -> PackedTensor | None:
        """The entry that the tensor will have in the manifest (docs/format.md), its error unknown; None to keep it."""


@dataclass(frozen=True)
class Picture:
    """A real picture and the text that describes it."""

    name: str
    """Its file's name."""
    caption: str
    image: Image
    """RGB, of any size."""


class DenoiserCall(Protocol):
    """A call of a denoiser: `network(*positional, **named)` should answer `output`."""

    @property
    def timestep(self) -> float:
        """The time that the whole batch is in."""

    @property
    def positional(self) -> tuple[Any, ...]:
        """Arguments without names."""

    @property
    def named(self) -> Mapping[str, Any]:
        """Arguments with names."""

    @property
    def output(self) -> Tensor:
        """The right answer."""


class LivePipeline(Protocol):
    """A pipeline in memory. Whoever searches sets other weights in its denoiser before every score."""

    @property
    def network(self) -> Module:
        """The denoiser, float32, with the weights that are to be scored."""

    @property
    def original(self) -> Module:
        """A copy of the denoiser as it was loaded, whose weights stay; made when it is first asked for."""

    def ask(self, pictures: Sequence[Picture], levels: Sequence[float], seed: int) -> Sequence[DenoiserCall]:
        """Calls of the denoiser on noised pictures under their captions, and what it should answer.

        `levels` are shares in [0, 1] of the training's time; each picture has noise of its own at each of them.

        Raises:
            UsageError: the pipeline is of a class for which this is not known.
        """

    def paint(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> Sequence[Image]:
        """An RGB picture for each prompt, from the noise of its seed."""


@runtime_checkable
class Evaluator(Plugin, Protocol):
    """Kind analyzer: one that can also score a denoiser in memory again and again, for mergers that search."""

    def prepare(
        self, pipeline: LivePipeline, pictures: Sequence[Picture], seed: int, params: Any
    ) -> Callable[[], float]:
        """What scores the pipeline as it is when called: lower is better, and the same weights give the same score.

        All that does not depend on the weights is done here, once. `pictures` and `seed` decide what is looked at:
        where several seeds are needed they count up from `seed`, which leaves room for a million.
        """

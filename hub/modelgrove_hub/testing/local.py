"""A plugin's surroundings without a hub: models and outputs are plain files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import Cancelled, InputModel, Plugin, Result, TensorWriter
from modelgrove_hub.errors import NotFoundError
from modelgrove_hub.formats.card import read_card
from modelgrove_hub.plugins import check_params
from modelgrove_hub.registry.inputs import RegisteredModel
from modelgrove_hub.store.disk import output_place

if TYPE_CHECKING:
    from torch import Generator


class FolderModel(RegisteredModel):
    """The model in a folder or a single file, as a plugin sees it; what the registry knows may be given.

    Raises:
        NotFoundError: there is nothing at `path`.
    """

    def __init__(
        self, path: Path, *, name: str = "", family: str = "unknown", adapter_type: str | None = None,
        summary: Mapping[str, Any] | None = None, base: RegisteredModel | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        files = _files(path)
        card = read_card(files)
        super().__init__(
            name=name or path.stem, family=family, adapter_type=adapter_type, revision_id=0, summary=summary or {},
            card=card.text, tags=card.tags, paths=files, base=base,
            hashes=hashes or {},
        )  # fmt: skip


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    shown = {name: file for name, file in files.items() if not any(part.startswith(".") for part in name.split("/"))}
    if not shown:
        raise NotFoundError(f"{path}: no such file, or a folder without files")
    return shown


class LocalContext:
    """Implements `contracts.Context` on `folder`: outputs in "out", scratch space in "temp".

    As a context manager it closes all writers at the end, or drops what they wrote on an exception.
    `steps` and `lines` keep what the plugin reported; after `cancel_after` reports it is cancelled.
    """

    def __init__(
        self, folder: Path, inputs: Sequence[InputModel] = (), seed: int = 0, cancel_after: int | None = None
    ) -> None:
        self.inputs, self.seed = inputs, seed
        self.out, self.temp = folder / "out", folder / "temp"
        for place in (self.out, self.temp):
            place.mkdir(parents=True)
        self.steps: list[tuple[float, str]] = []
        self.lines: list[str] = []
        self._cancel_after = cancel_after
        self._writers = ExitStack()
        self._generator: Generator | None = None

    def __enter__(self) -> LocalContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writers.__exit__(kind, error, trace)
        shutil.rmtree(self.temp)

    def progress(self, done: float, message: str = "") -> None:
        """Remember the report. Raises `Cancelled` when it is one too many."""
        if self._cancel_after is not None and len(self.steps) >= self._cancel_after:
            raise Cancelled
        self.steps.append((done, message))

    def log(self, message: str) -> None:
        """Remember the line."""
        self.lines.append(message)

    def generator(self) -> Generator:
        """A CPU random generator seeded by `seed`, always the same one."""
        import torch

        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        return self._generator

    def writer(self, path: str, metadata: Mapping[str, str] | None = None) -> TensorWriter:
        """A streaming safetensors writer for `path`, closed when the context ends."""
        from modelgrove_hub.store.writer import SafetensorsWriter

        return self._writers.enter_context(SafetensorsWriter(self.path(path), metadata))

    def path(self, path: str) -> Path:
        """Where to write any other output file.

        Raises:
            PluginError: the path leaves the output folder.
        """
        return output_place(self.out, path)


def run_plugin(
    plugin: Plugin, inputs: Sequence[InputModel], folder: Path, params: Mapping[str, Any] | None = None, seed: int = 0
) -> Result:
    """Run `plugin` once; its files are in `folder`/out. Parameters are checked as a job's are.

    Raises:
        UsageError: the parameters do not fit; and whatever the plugin raises.
    """
    checked = check_params(type(plugin), params or {})
    with LocalContext(folder, inputs, seed) as context:
        return plugin.run(context, checked)

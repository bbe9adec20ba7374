"""A program of its own: one pickle in, one safetensors file out, in a process that can do nothing else.

    python -I -m modelgrove_hub.ingest.unpickling IN OUT SAID

IN, OUT and SAID are numbers of open files: the pickle, an empty file for the safetensors and one for the JSON report,
`{"refused": why}` or `{"tensors": n, "left_out": […], "tied": […]}`. First it gives up its rights (`ingest.confined`),
then it reads: our own scan, picklescan in strict mode, `torch.load(weights_only=True)`. What one of them does not call
clean is refused. `ingest.conversion` starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

from modelgrove_hub.errors import DataError, ModelgroveError, UnsafeFileError
from modelgrove_hub.formats.plain_pickles import check_plain, is_inert
from modelgrove_hub.formats.texts import one_line
from modelgrove_hub.ingest.confined import confine, die_with_parent
from modelgrove_hub.store.dtypes import NAMES
from modelgrove_hub.store.header import MAX_DIMENSIONS, MAX_TENSORS, name_fault
from modelgrove_hub.store.writer import bytes_of

if TYPE_CHECKING:
    from torch import Tensor

GROWTH = 4
"""Written bytes a byte of the pickle, at most: tensors that share a storage are written once for each name."""
ROOM = 64 * 2**20
"""Bytes that may be written besides."""
MEMORY = 2**30
"""Bytes of address space besides three times the pickle's size."""
SECONDS = 300
"""Of processor time, and one more for every `BYTES_A_SECOND`."""
BYTES_A_SECOND = 20 * 2**20
MAX_DEPTH = 64
MAX_VALUES = 2_000_000
"""Visited on the way to the tensors: a list can hold another one twice, and so on."""
MAX_SAID = 1000
"""Entries of the report's lists."""
_WRAPPERS = ("state_dict", "model_state_dict", "params_ema", "params", "model", "module")
"""Where trainers keep the weights, beside optimizer states and counters."""
_EMBEDDING = "string_to_param"
"""Of a textual inversion as the AUTOMATIC1111 web UI saves it; `emb_params` in safetensors."""


def main() -> None:
    """Convert; whatever happens is in the report, or the process is killed."""
    read, write, said = map(int, sys.argv[1:])
    die_with_parent()
    warnings.simplefilter("ignore")
    with open(read, "rb") as file, open(write, "wb") as target, open(said, "w", encoding="ascii") as report:  # noqa: PTH123
        size = os.fstat(read).st_size
        rehearse()
        confine(MEMORY + 3 * size, SECONDS + size // BYTES_A_SECOND, GROWTH * size + ROOM)
        json.dump(attempt(file, target, size), report)


def attempt(file: BinaryIO, target: BinaryIO, size: int) -> dict[str, Any]:
    """The report of one conversion."""
    try:
        return convert(file, target, size)
    except ModelgroveError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": "it needs more memory than a pickle of its size may"}
    except RecursionError:
        return {"refused": "it is nested too deeply"}
    except Exception as error:  # noqa: BLE001  (the loader met a stranger's bytes: whatever it says is a refusal)
        # Above the cause torch advises to load the file without its guard.
        cause = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())
        return {"refused": one_line(f"torch.load(weights_only=True): {type(error).__name__}: {cause}", 300)}


def convert(file: BinaryIO, target: BinaryIO, size: int) -> dict[str, Any]:
    """Scan, load and write.

    Raises:
        UnsafeFileError: the pickle is not clean.
        DataError: it has no tensors, or some that cannot be written.
    """
    import torch

    check_plain(file, size, "the pickle")
    check_with_picklescan(file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    left_out: list[str] = []
    tensors = gather(loaded, left_out)
    tied = write_tensors(tensors, target, GROWTH * size + ROOM)
    return {"tensors": len(tensors), "left_out": left_out[:MAX_SAID], "tied": tied[:MAX_SAID]}


def check_with_picklescan(file: BinaryIO) -> None:
    """See that picklescan, in strict mode, finds nothing but what makes tensors.

    Raises:
        UnsafeFileError: it finds something else, or cannot read the file.
    """
    from picklescan.scanner import SafetyLevel, scan_pytorch

    file.seek(0)
    result = scan_pytorch(file, "the pickle", strict=True)
    # Strict mode calls all names dangerous that are not on its list of 25, torch's `_rebuild_parameter` too.
    names = [f"{found.module}.{found.name}" for found in result.globals if found.safety is not SafetyLevel.Innocuous]
    if odd := [name for name in names if not is_inert(name)]:
        raise UnsafeFileError(f"picklescan calls its import of {one_line(odd[0], 120)!a} dangerous")
    if result.scan_err or not result.scanned_files:
        raise UnsafeFileError("picklescan cannot read it to the end")


def gather(loaded: Any, left_out: list[str]) -> dict[str, Tensor]:
    """The weights among what was loaded, by name; what is left out is told by its path.

    Raises:
        DataError: there are no tensors, or names that no file may have.
    """
    import torch

    if not isinstance(loaded, Mapping):
        raise DataError(f"it holds a {type(loaded).__name__}, not tensors by name")
    chosen: Any = loaded
    while wrapper := next((key for key in _WRAPPERS if _holds_tensors(chosen.get(key))), None):
        left_out += [_path("", key) for key in chosen if key != wrapper]
        chosen = chosen[wrapper]
    embedding = chosen.get(_EMBEDDING)
    if isinstance(embedding, Mapping) and len(embedding) == 1 and _holds_tensors(embedding):
        left_out += [_path("", key) for key in chosen if key != _EMBEDDING]
        chosen = {"emb_params": next(iter(embedding.values()))}
    found: dict[str, Tensor] = {}
    for path, value in _leaves(chosen):
        if not isinstance(value, torch.Tensor):
            left_out.append(path)
        elif path in found:
            raise DataError(f"two tensors would be called {path[:80]!a}")
        else:
            found[path] = value
    if not found:
        raise DataError("it holds no tensors by name")
    if len(found) > MAX_TENSORS:
        raise DataError(f"it holds {len(found)} tensors, more than {MAX_TENSORS}")
    return found


def write_tensors(tensors: Mapping[str, Tensor], target: BinaryIO, most: int) -> list[str]:
    """Write a safetensors file; names whose values another name has too. Each name gets values of its own.

    Raises:
        DataError: a tensor has a name, type or layout that safetensors cannot hold, or all are more than `most` bytes.
    """
    header: dict[str, Any] = {}
    places: dict[Any, str] = {}
    tied, position = [], 0
    for name, tensor in tensors.items():
        if fault := name_fault(name):
            raise DataError(f"a tensor has {fault}: {name[:80]!a}")
        dtype = NAMES.get(str(tensor.dtype))
        if dtype is None or str(tensor.layout) != "torch.strided" or tensor.is_meta or tensor.dim() > MAX_DIMENSIONS:
            raise DataError(f"tensor {name[:80]!a} is {tensor.dtype}, {tensor.layout}, of {tensor.dim()} dimensions")
        nbytes = tensor.numel() * tensor.element_size()
        shape = [*tensor.shape[:-1], tensor.shape[-1] * 2] if dtype == "F4" else list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
        if position > most:
            raise DataError(
                f"its tensors would be more than {most} bytes: one storage has many names, or views repeat it"
            )
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if nbytes and places.setdefault(place, name) != name:
            tied.append(f"{name} = {places[place]}")
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    target.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        target.write(bytes_of(tensor))
    target.flush()
    return tied


def rehearse() -> None:
    """Convert a small file of each form, so that what is imported on first use is there when no file can be opened."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    makers: list[Any] = [(scalar, "scalar"), (array, "_reconstruct")]
    trusted: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, *kinds]
    trusted += [(make, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for make, name in makers]
    torch.serialization.add_safe_globals(trusted)
    small = {
        "a": torch.nn.Parameter(torch.zeros(2)),
        "b": torch.zeros(2, 2, dtype=torch.bfloat16).t(),
        "c": np.zeros(2),
    }
    for zipped in (True, False):
        stream = BytesIO()
        torch.save(small, stream, _use_new_zipfile_serialization=zipped)
        if "refused" in (said := attempt(stream, BytesIO(), len(stream.getvalue()))):
            raise RuntimeError(f"torch's own file is not converted: {said['refused']}")
    "".encode("cp437")  # names in archives


def _holds_tensors(value: object) -> bool:
    """Whether it is a dictionary with tensors in it, at whatever depth."""
    import torch

    return isinstance(value, Mapping) and any(isinstance(leaf, torch.Tensor) for _, leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Path and value of everything that is no container; containers may be shared, and even hold themselves."""
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]
    for _ in range(MAX_VALUES):
        if not waiting:
            return
        path, value, depth = waiting.pop()
        if not isinstance(value, Mapping | list | tuple):
            yield path, value
            continue
        if depth == MAX_DEPTH:
            raise DataError(f"it has containers in containers, more than {MAX_DEPTH} deep")
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        waiting += reversed([(_path(path, key), inner, depth + 1) for key, inner in pairs])
    raise DataError(f"it has more than {MAX_VALUES} values")


def _path(before: str, key: object) -> str:
    own = key if isinstance(key, str) else str(key) if isinstance(key, int) else type(key).__name__
    return f"{before}.{own}" if before else own


if __name__ == "__main__":
    main()

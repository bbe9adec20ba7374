"""Read adapters that change a base's modules: LoRA and its kin. What is said comes from names and shapes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite, nan
from typing import Any

from modelgrove_hub.formats.bases import Module, base_candidates
from modelgrove_hub.formats.listing import ListedTensor
from modelgrove_hub.formats.naming import adapter_names
from modelgrove_hub.formats.patterns import any_of
from modelgrove_hub.formats.sara import SparseManifest, read_manifest

Shape = tuple[int, ...]

_ON_LORA = ("lora", "dora", "adalora")
"""LoRA, and the methods that add a tensor to its factors."""

MAX_TARGETS = 50
"""Kinds of modules that are listed; real adapters have a dozen."""


@dataclass(frozen=True)
class Delta:
    """What a set of adapter tensors is."""

    adapter_type: str
    modules: tuple[Module, ...]
    bases: tuple[str, ...]
    explained: frozenset[str]
    alphas: tuple[float, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def ranks(self) -> dict[str, int]:
        """Smallest, largest and most common rank; empty where there is none."""
        return spread([module.rank for module in self.modules if module.rank is not None])

    @property
    def targets(self) -> dict[str, int]:
        """What kinds of modules are changed, and how many of each."""
        names = adapter_names()
        counts = Counter(names.target(module.path, flat=module.flat) for module in self.modules)
        return dict(counts.most_common(MAX_TARGETS))

    @property
    def convention(self) -> str:
        """How the file names its modules: kohya, diffusers, peft, comfyui, bare; or "mixed"."""
        found = {module.convention for module in self.modules}
        return found.pop() if len(found) == 1 else "mixed"

    @property
    def sections(self) -> dict[str, int]:
        """Modules by the network they are in."""
        return dict(Counter(module.section for module in self.modules))


@dataclass
class _Parts:
    """The tensors of one module, by method and part."""

    shapes: dict[str, dict[str, Shape]] = field(default_factory=lambda: defaultdict(dict))
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    cores: set[str] = field(default_factory=set)


def spread(values: list[Any]) -> dict[str, Any]:
    """Smallest, largest and most common of some numbers; {} of none."""
    if not values:
        return {}
    return {"min": min(values), "max": max(values), "common": Counter(values).most_common(1)[0][0]}


def read_delta(
    tensors: Mapping[str, ListedTensor],
    scalars: Mapping[str, float],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> Delta | None:
    """Read adapter tensors, or return None when no name proves an adapter method.

    `config` is the adapter_config.json, {} without one.
    """
    special = _read_special(tensors)
    if special:
        return special
    grouped = _group(tensors)
    sparse = read_manifest(metadata, "this model")
    modules: list[Module] = []
    explained: set[str] = set()
    broken: list[str] = []
    for path, parts in grouped.items():
        kind = _kind_of(parts)
        widths = _sparse_widths(path, sparse) if kind == "sara" else _widths(kind, parts.shapes)
        if widths is None:
            broken.append(path)
            continue
        modules.append(_module(path, kind, parts.shapes, widths))
        explained.update(name for one in parts.cores for name in parts.names[one])
    if not modules:
        return _read_marked(tensors)
    kinds = Counter(module.kind for module in modules)
    alphas = [scalars[name] for name in explained if name.endswith("alpha") and isfinite(scalars.get(name, nan))]
    found = Delta(
        adapter_type=_adapter_type(kinds),
        modules=tuple(modules),
        bases=base_candidates(modules),
        explained=frozenset(explained),
        alphas=tuple(alphas or _declared_alphas(config, metadata)),
        reasons=tuple(_reasons(kinds, broken)),
    )
    return _with_brought(found, tensors)


def _with_brought(delta: Delta, tensors: Mapping[str, ListedTensor]) -> Delta:
    """What the file is as a whole, if tensors beside a LoRA's factors say more."""
    for brought in adapter_names().brought if delta.adapter_type in _ON_LORA else ():
        beside = frozenset(name for name in tensors if brought.fits(name))
        if beside:
            reasons = (*delta.reasons, f"{min(beside)} beside them: {brought.reason}")
            explained = delta.explained | beside
            return replace(delta, adapter_type=brought.adapter_type, explained=explained, reasons=reasons)
    return delta


def _group(tensors: Mapping[str, ListedTensor]) -> dict[str, _Parts]:
    names = adapter_names()
    grouped: dict[str, _Parts] = defaultdict(_Parts)
    for name, tensor in tensors.items():
        split = names.split(name)
        if split is None:
            continue
        module, suffix = split
        parts = grouped[module]
        for kind in names.kinds:
            part = kind.core.get(suffix) or kind.extra.get(suffix)
            if part:
                parts.shapes[kind.name][part] = tensor.shape
                parts.names[kind.name].append(name)
                if suffix in kind.core:
                    parts.cores.add(kind.name)
    return {module: parts for module, parts in grouped.items() if parts.cores}


def _kind_of(parts: _Parts) -> str:
    """The method that rules the module; a mark refines it, company does not count."""
    kinds = {kind.name: kind for kind in adapter_names().kinds}
    ruling = sorted(name for name in parts.cores if not kinds[name].company) or sorted(parts.cores)
    marks = [name for name in ruling if kinds[name].mark]
    if marks:
        # A mark without the factors it goes with is no whole module: it stays in the list to be found broken.
        return marks[0]
    if "oft" in ruling and len(parts.shapes["oft"].get("blocks", ())) == 4:
        return "boft"
    return ruling[0] if len(ruling) == 1 else "mixed"


def _widths(kind: str, shapes: Mapping[str, Mapping[str, Shape]]) -> tuple[int | None, int | None] | None:
    """(out, in) of the module's weight, None for an unknown one; None when parts are missing or disagree."""
    if kind in _ON_LORA:
        return _low_rank_widths(shapes.get("lora", {}))
    if kind == "loha":
        return _hadamard_widths(shapes[kind])
    if kind == "lokr":
        return _kronecker_widths(shapes[kind])
    if kind in ("oft", "boft") and "blocks" in shapes.get("oft", {}):
        blocks = shapes["oft"]["blocks"]
        return (blocks[-3] * blocks[-1], None) if len(blocks) >= 3 and blocks[-1] == blocks[-2] else (None, None)
    if kind == "diff" and len(shapes[kind].get("full", ())) >= 2:
        return shapes[kind]["full"][0], shapes[kind]["full"][1]
    if kind == "ia3" and "vector" not in shapes[kind]:
        return None
    return None, None


def _sparse_widths(path: str, manifest: SparseManifest | None) -> tuple[int | None, int | None] | None:
    """As the manifest has them; None without one, since nothing else tells the shape."""
    if manifest is None:
        return None
    origin = manifest.tensors.get(f"{path}.weight")
    return origin.shape[:2] if origin and len(origin.shape) > 1 else (None, None)  # type: ignore[return-value]  # two


def _low_rank_widths(parts: Mapping[str, Shape]) -> tuple[int, int] | None:
    down, up = parts.get("down", ()), parts.get("up", ())
    if len(down) < 2 or len(up) < 2 or down[0] != up[1]:
        return None
    return up[0], down[1]


def _hadamard_widths(parts: Mapping[str, Shape]) -> tuple[int | None, int | None] | None:
    if not all(len(parts.get(name, ())) == 2 for name in ("w1_a", "w1_b", "w2_a", "w2_b")):
        return None
    if "t1" in parts:  # Tucker factors are transposed
        return parts["w1_a"][1], parts["w1_b"][1]
    return (parts["w1_a"][0], parts["w1_b"][1]) if parts["w1_a"][1] == parts["w1_b"][0] else None


def _kronecker_widths(parts: Mapping[str, Shape]) -> tuple[int | None, int | None] | None:
    factors = [_kronecker_factor(parts, which) for which in ("w1", "w2")]
    if None in factors:
        return None
    if "t2" in parts or any(len(shape) > 2 for shape in parts.values()):
        return None, None
    (out1, in1), (out2, in2) = (factor for factor in factors if factor)
    return out1 * out2, in1 * in2


def _kronecker_factor(parts: Mapping[str, Shape], which: str) -> tuple[int, int] | None:
    whole, left, right = (parts.get(which + end, ()) for end in ("", "_a", "_b"))
    if len(whole) >= 2:
        return whole[0], whole[1]
    return (left[0], right[1]) if len(left) >= 2 and len(right) >= 2 and left[1] == right[0] else None


def _rank(kind: str, shapes: Mapping[str, Mapping[str, Shape]]) -> int | None:
    if kind in _ON_LORA:
        return shapes["lora"]["down"][0]
    parts = shapes.get(kind, {})
    for name in ("w2_b", "w1_b"):
        if kind in ("loha", "lokr") and name in parts:
            return parts[name][0]
    return None


def _module(
    path: str, kind: str, shapes: Mapping[str, Mapping[str, Shape]], widths: tuple[int | None, int | None]
) -> Module:
    section, convention, flat = "denoiser", "", False
    searching = True
    while searching:  # PEFT wraps names that may have a prefix of their own
        searching = False
        for prefix in adapter_names().prefixes:
            if path.startswith(prefix.prefix):
                path = path.removeprefix(prefix.prefix)
                section, flat = prefix.section, prefix.flat
                convention = convention or prefix.convention
                searching = not flat
                break
    path = path.replace(".processor.to_out", ".to_out.0").replace(".processor.", ".")
    return Module(path, section, convention or "bare", flat, kind, _rank(kind, shapes), widths)


def _adapter_type(kinds: Counter[str]) -> str:
    company = {kind.name for kind in adapter_names().kinds if kind.company}
    ruling = [kind for kind in kinds if kind not in company] or list(kinds)
    if set(ruling) == {"lora", "dora"}:
        return "dora"
    return ruling[0] if len(ruling) == 1 else "mixed"


def _reasons(kinds: Counter[str], broken: list[str]) -> Iterator[str]:
    counted = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
    mixed = "mixed adapter: " if len(kinds) > 1 else ""
    yield f"{mixed}tensor names are those of adapted modules: {counted}"
    if broken:
        yield f"{len(broken)} modules lack a factor or have factors that do not fit each other, such as {broken[0]}"


def _declared_alphas(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[float]:
    declared = [config.get("lora_alpha"), metadata.get("ss_network_alpha")]
    try:
        kept = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        kept = {}
    if isinstance(kept, dict):
        declared += [value for key, value in kept.items() if str(key).endswith("lora_alpha")]
    for value in declared:
        try:
            number = float(value)  # type: ignore[arg-type]  # foreign metadata; what is no number is passed over
        except (TypeError, ValueError, OverflowError):
            continue
        if isfinite(number):
            yield number


def _read_marked(tensors: Mapping[str, ListedTensor]) -> Delta | None:
    """A method that is told by a word in its tensors' names, whose factors are not understood."""
    marked = {name: found for name in tensors if (found := adapter_names().marked(name))}
    modules = tuple(_module(path, method, {}, (None, None)) for path, method in dict.fromkeys(marked.values()))
    if not modules:
        return None
    kinds = Counter(module.kind for module in modules)
    note = "known by its names alone: it cannot be merged, and is not searched by weights"
    return Delta(
        _adapter_type(kinds), modules, base_candidates(modules), frozenset(marked), reasons=(*_reasons(kinds, []), note)
    )


def _read_special(tensors: Mapping[str, ListedTensor]) -> Delta | None:
    for special in adapter_names().special:
        expression = any_of((special.pattern,))
        fitting = frozenset(name for name in tensors if expression.fullmatch(name))
        modules = tuple(
            Module(
                path=name.removesuffix(".down.weight"),
                section="denoiser",
                convention="diffusers",
                flat=False,
                kind=special.adapter_type,
                rank=tensors[name].shape[0] if tensors[name].shape else None,
                widths=(None, None),
            )
            for name in sorted(fitting)
            if name.endswith(".down.weight")
        )
        if fitting:
            return Delta(special.adapter_type, modules, (), fitting, reasons=(special.reason,))
    return None

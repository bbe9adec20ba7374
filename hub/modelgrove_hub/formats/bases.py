"""Tell an adapter's base from the modules it adapts: by their names, and by the widths of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelgrove_hub.formats.families import size_fits
from modelgrove_hub.formats.patterns import any_of
from modelgrove_hub.formats.signature import Layout, Signature, load_signatures


@dataclass(frozen=True)
class Module:
    """One adapted module: where it is, how it is changed, and the (out, in) of the weight it changes."""

    path: str
    section: str
    convention: str
    flat: bool
    kind: str
    rank: int | None
    widths: tuple[int | None, int | None]


def base_candidates(modules: Sequence[Module]) -> tuple[str, ...]:
    """Families that have all these modules with these widths; one at least must have a telling width."""
    return tuple(signature.name for signature in load_signatures() if _signature_fits(signature, modules))


def _signature_fits(signature: Signature, modules: Sequence[Module]) -> bool:
    texts = [module for module in modules if module.section != "denoiser"]
    main = [module for module in modules if module.section == "denoiser"]
    if not _texts_fit(signature, texts):
        return False
    return any(_layout_fits(layout, main) for layout in signature.layouts) if main else bool(signature.text_widths)


def _texts_fit(signature: Signature, modules: Sequence[Module]) -> bool:
    if not signature.text_widths:
        return not modules
    for module in modules:
        wanted = signature.text_widths.get(module.section)
        if wanted is None or (
            module.path.endswith(("q_proj", "SelfAttention.q")) and module.widths[0] not in (None, wanted)
        ):
            return False
    return True


def _layout_fits(layout: Layout, modules: Sequence[Module]) -> bool:
    """Whether all modules are the layout's, none has a wrong width, and one has a telling width."""
    if not layout.adapts:
        return False
    told = False
    known = {flat: (layout.modules(flat=flat), layout.not_modules(flat=flat)) for flat in (False, True)}
    for module in modules:
        allowed, missing = known[module.flat]
        if not allowed.fullmatch(module.path) or missing.fullmatch(module.path):
            return False
        for pattern, size in layout.adapts.items():
            if any_of((pattern,), flat=module.flat).fullmatch(module.path):
                if not size_fits(module.widths, size):
                    return False
                told = told or module.widths != (None, None)
    return told

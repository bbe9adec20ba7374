"""How strongly a LoRA's factors act: alpha / rank by its own trainer's rule.

Three places tell: a tensor `alpha` beside the factors (kohya), `adapter_config.json` (PEFT), or
the same configuration in the file's metadata (diffusers ≥ 0.34). None of them: the factors act as
they are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.store.disk import open_regular

CONFIG = "adapter_config.json"
_UNDERSTOOD = ("LORA", "LOHA", "LOKR", "IA3", "ADALORA", "OFT", "BOFT")
METADATA = "lora_adapter_metadata"
MAX_CONFIG = 8 * 2**20

_LITERAL = re.compile(r"\^?[\w.]+\$?")
_PATTERN = re.compile(r"[\w.\\^$|()\[\]*+-]{1,4096}")
_QUANTIFIED = re.compile(r"(?:\.|\\[dw]|\])[*+]")
_NUMBER = re.compile(r"\\d\+(?=\\\.|_|$)")
_MAX_QUANTIFIERS = 2
_MAX_PATTERNS = 64
_MAX_PATH = 160
_MAX_MATCHES = 50_000
"""Together these bound the time that a stranger's expressions may take; real files need 10,000 matches of 70."""


class Rotation(BaseModel):
    """The part of PEFT's configuration of an OFT that decides what its numbers mean."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    block_share: bool = False
    coft: bool = False
    eps: float = Field(6e-5, allow_inf_nan=False, gt=0)
    use_cayley_neumann: bool = False
    """PEFT knew no other way than the exact one before it wrote this."""
    num_cayley_neumann_terms: int = Field(5, ge=1, le=64)


class LoraConfig(BaseModel):
    """The part of PEFT's configuration that decides what the factors mean."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str = "LORA"
    r: PositiveInt | None = None
    lora_alpha: float = Field(8.0, allow_inf_nan=False, validation_alias=AliasChoices("lora_alpha", "alpha"))
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    init_r: PositiveInt = 12
    """AdaLoRA's rank before it cut any; its factors stay scaled by it."""
    rotation: Rotation | None = None


class Scaling:
    """Scales of a file's modules. `configs` has one configuration a component; "" holds for all others."""

    def __init__(self, configs: Mapping[str, LoraConfig], where: str) -> None:
        self.configs, self._where = dict(configs), where
        self._patterns = {
            component: (_Patterns(config.rank_pattern, where), _Patterns(config.alpha_pattern, where))
            for component, config in configs.items()
        }

    def require_plain(self) -> None:
        """Raise UsageError unless the configurations are those of plain LoRAs."""
        for config in self.configs.values():
            if config.peft_type != "LORA" or config.use_dora:
                kind = "DoRA" if config.use_dora else config.peft_type
                raise UsageError(f"{self._where}: the configuration describes a {kind} adapter, not a plain LoRA")

    def scale(self, component: str, module: str, rank: int | None, alpha: float | None) -> float:
        """What the product of the factors is multiplied with; `alpha` is the tensor beside them, if there is one.

        A product that has no rank (None; LoKr of two whole matrices) has the configured one.

        Raises:
            DataError: the configuration gives another rank than the tensors have.
        """
        if alpha is not None and rank is not None:
            return alpha / rank if alpha else 1.0  # kohya's trainer reads an alpha of 0 as "equal to the rank"
        place = component if component in self.configs else ""
        config = self.configs.get(place)
        if config is None:
            return 1.0
        ranks, alphas = self._patterns[place]
        said = ranks.find(module, config.r)
        if rank is None:
            if said is None:
                return 1.0
            rank = int(said)
        if said is not None and said != rank:
            raise DataError(f"{self._where}: {module} has rank {rank}, but the configuration says {said:g}")
        strength = alphas.find(module, config.lora_alpha)
        return (strength or 0.0) / (math.sqrt(rank) if config.use_rslora else rank)

    def adaptive(self, component: str) -> float | None:
        """The scale of an AdaLoRA's product, as PEFT has it; None without its configuration."""
        config = self._config(component)
        if config is None or config.peft_type != "ADALORA":
            return None
        return (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)

    def rotation(self, component: str) -> Rotation | None:
        """How an OFT of PEFT rotates; None without its configuration."""
        config = self._config(component)
        return config.rotation if config else None

    def _config(self, component: str) -> LoraConfig | None:
        return self.configs.get(component, self.configs.get(""))


class _Patterns:
    """PEFT's rule: the first pattern that matches the end of the path, from a dot on, wins."""

    def __init__(self, patterns: Mapping[str, float], where: str) -> None:
        self._values, self._where, self._matches = list(patterns.values()), where, 0
        self._literal: dict[str, int] = {}
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        for place, pattern in enumerate(patterns):
            if _LITERAL.fullmatch(pattern):
                self._literal.setdefault(pattern.removesuffix("$"), place)
            else:
                self._expressions.append((place, _compile(pattern, where)))
        if len(self._expressions) > _MAX_PATTERNS:
            raise DataError(
                f"{where}: {len(self._expressions)} patterns that are no module names, at most {_MAX_PATTERNS}"
            )

    def find(self, module: str, default: float | None) -> float | None:
        parts = module.split(".")
        ends = [f"^{module}", *(".".join(parts[i:]) for i in range(len(parts)))]
        places = [self._literal[end] for end in ends if end in self._literal]
        if self._expressions and len(module) <= _MAX_PATH:
            self._matches += len(self._expressions)
            if self._matches > _MAX_MATCHES:
                raise DataError(f"{self._where}: more than {_MAX_MATCHES} matches of patterns with modules are needed")
            places += [place for place, expression in self._expressions if expression.match(module)]
        return self._values[min(places)] if places else default


def _compile(pattern: str, where: str) -> re.Pattern[str]:
    # A stranger's regular expression may take ages by backtracking: quantified groups are refused, and so are
    # many quantifiers. A number that ends at a dot can match in one way only and does not count.
    counted = _NUMBER.sub("0", pattern)
    quantifiers = len(re.findall(r"(?<!\\)[*+]", counted))
    simple = _PATTERN.fullmatch(pattern) and not re.search(r"\\\d", pattern)
    if not simple or not len(_QUANTIFIED.findall(counted)) == quantifiers <= _MAX_QUANTIFIERS:
        raise DataError(f"{where}: the pattern {pattern[:80]!a} is too complicated to be evaluated safely")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise DataError(f"{where}: {pattern[:80]!a} is no regular expression: {error}") from None


def read_scaling(files: Mapping[str, Path], metadata: Mapping[str, str], where: str) -> Scaling:
    """The scaling of a LoRA from its folders' configurations or else its file's metadata.

    Raises:
        DataError: a configuration is not valid JSON or not a valid configuration.
        UsageError: it describes something else than a plain LoRA, which is named.
    """
    found = {PurePosixPath(name).parent.name: files[name] for name in files if name.rsplit("/", 1)[-1] == CONFIG}
    if found:
        # A folder each, where there are several components.
        components = found if len(found) > 1 else {"": next(iter(found.values()))}
        configs = {
            component: _config(_read(path, where), f"{where}: {CONFIG}") for component, path in components.items()
        }
    elif METADATA in metadata:
        configs = _of_components(_parse(metadata[METADATA], f"{where}: metadata {METADATA}"), where)
    else:
        configs = {}
    return Scaling(configs, where)


def _read(path: Path, where: str) -> dict[str, Any]:
    with open_regular(path) as file:
        text = file.read(MAX_CONFIG + 1)
    if len(text) > MAX_CONFIG:
        raise DataError(f"{where}: {CONFIG} is larger than {MAX_CONFIG} bytes")
    return _parse(text, f"{where}: {CONFIG}")


def _parse(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where} is not a JSON object")
    return fields


def _of_components(fields: dict[str, Any], where: str) -> dict[str, LoraConfig]:
    """diffusers packs the configurations of several components into one object: "unet.r", "text_encoder.r"…"""
    grouped: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        component, _, field = name.rpartition(".")
        grouped.setdefault(component, {})[field] = value
    return {component: _config(group, f"{where}: metadata {METADATA}") for component, group in grouped.items()}


def _config(fields: dict[str, Any], where: str) -> LoraConfig:
    method = fields.get("peft_type")
    if method in ("OFT", "BOFT"):  # their r and alpha are no LoRA's
        fields = {name: fields.get(name) for name in ("peft_type", "base_model_name_or_path")} | {"rotation": fields}
    elif method == "ADALORA":  # its patterns say which directions of init_r are left, as the tensors do
        fields = {name: value for name, value in fields.items() if name not in ("r", "rank_pattern")}
    try:
        config = LoraConfig.model_validate(fields)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise DataError(f"{where}: {place}: {fault['msg']}") from None
    if config.peft_type not in _UNDERSTOOD:
        raise UsageError(f"{where} describes a {config.peft_type} adapter; understood are {', '.join(_UNDERSTOOD)}")
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise UsageError(
            f"{where}: the factors were started by {start}, which changes the base's weights too: "
            "convert the adapter with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config

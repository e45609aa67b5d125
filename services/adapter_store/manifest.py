"""An adapter_config.json, and what PEFT makes of it."""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from services.adapter_store.findings import Findings, Reason, shown
from services.adapter_store.manifest_fields import check_fields
from services.adapter_store.patterns import PatternError, Patterns, Value

MAX_CONFIG_BYTES = 1 << 20
# PEFT's own defaults, for a config that leaves them out.
_DEFAULT_R = 8
_DEFAULT_ALPHA = 8
_MAX_R = 1 << 20
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127
_INITS_THAT_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
_INITS_THAT_CHANGE_THE_BASE = re.compile(r"pissa.*|olora|corda|lora_ga|loftq")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The fields of a config that have a meaning here."""

    base_model: str | None
    r: int
    alpha: float
    ranks: Patterns[int]
    alphas: Patterns[float]
    use_rslora: bool
    changes_base: bool

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Rank and scale of a module, by its name in the model that was trained: α/r, or α/√r with rsLoRA.

        The one place where the two are computed. Source: PEFT 0.21, LoraModel._create_and_replace and
        LoraLayer.update_layer.
        """
        rank = self.ranks.lookup(module, self.r)
        alpha = self.alphas.lookup(module, self.alpha)
        return rank, alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_manifest(data: bytes, findings: Findings) -> Manifest | None:
    """Read a config, adding what is wrong with it to `findings`. None when no meaning can be given to it."""
    fields = _parse_json(data, findings)
    if fields is None:
        return None
    peft_type = fields.get("peft_type")
    if peft_type != "LORA":
        reason = Reason.UNSUPPORTED_FEATURE if isinstance(peft_type, str) else Reason.INVALID_ADAPTER_CONFIG
        findings.add(reason, f"peft_type is {shown(peft_type)}; only LORA is served", config_field="peft_type")
        return None
    check_fields(fields, findings)
    before = len(findings)
    manifest = Manifest(
        base_model=_base_model(fields, findings),
        r=_rank("r", fields.get("r", _DEFAULT_R), findings),
        alpha=_alpha("lora_alpha", fields.get("lora_alpha", _DEFAULT_ALPHA), findings),
        ranks=_ranks(fields, findings),
        alphas=_alphas(fields, findings),
        use_rslora=_rslora(fields, findings),
        changes_base=_changes_base(fields.get("init_lora_weights", True), findings),
    )
    return manifest if len(findings) == before else None


def _parse_json(data: bytes, findings: Findings) -> dict[str, Any] | None:
    try:
        fields = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _invalid(
            findings, f"adapter_config.json is no UTF-8 JSON ({shown(str(error))}); upload it as PEFT saved it", ""
        )
        return None
    if not isinstance(fields, dict):
        _invalid(findings, "adapter_config.json must be a JSON object; upload it as PEFT saved it", "")
        return None
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"key {shown(key)} is in it twice")
        fields[key] = value
    return fields


def _base_model(fields: dict[str, Any], findings: Findings) -> str | None:
    value = fields.get("base_model_name_or_path")
    if value is None or isinstance(value, str):
        return value
    _invalid(findings, f"base_model_name_or_path is {shown(value)}; text is needed", "base_model_name_or_path")
    return None


def _rank(field: str, value: Any, findings: Findings) -> int:
    if type(value) is int and 1 <= value <= _MAX_R:
        return value
    _invalid(findings, f"{field} is {shown(value)}; a rank is a whole number from 1", field)
    return 1


def _alpha(field: str, value: Any, findings: Findings) -> float:
    """Zero and below are PEFT's to allow: they switch off or subtract what was learned."""
    if type(value) in (int, float):
        with contextlib.suppress(OverflowError):  # a whole number too large for any float
            if abs(float(value)) <= _FLOAT32_MAX:
                return float(value)
    _invalid(findings, f"{field} is {shown(value)}; a finite number within float32 is needed", field)
    return 1.0


def _ranks(fields: dict[str, Any], findings: Findings) -> Patterns[int]:
    values = _mapping("rank_pattern", fields, findings)
    return _patterns(
        "rank_pattern",
        {key: _rank(f"rank_pattern[{shown(key)}]", value, findings) for key, value in values.items()},
        findings,
    )


def _alphas(fields: dict[str, Any], findings: Findings) -> Patterns[float]:
    values = _mapping("alpha_pattern", fields, findings)
    return _patterns(
        "alpha_pattern",
        {key: _alpha(f"alpha_pattern[{shown(key)}]", value, findings) for key, value in values.items()},
        findings,
    )


def _mapping(field: str, fields: dict[str, Any], findings: Findings) -> dict[str, Any]:
    value = fields.get(field)
    if value is None or isinstance(value, dict):
        return value or {}
    _invalid(findings, f"{field} is {shown(value)}; an object from module patterns to numbers is needed", field)
    return {}


def _patterns(field: str, values: dict[str, Value], findings: Findings) -> Patterns[Value]:
    try:
        return Patterns(values)
    except PatternError as error:
        _invalid(findings, f"{field}: {error}", field)
        return Patterns({})


def _rslora(fields: dict[str, Any], findings: Findings) -> bool:
    value = fields.get("use_rslora", False)
    if value is None or isinstance(value, bool):
        return bool(value)
    _invalid(findings, f"use_rslora is {shown(value)}; true or false is needed", "use_rslora")
    return False


def _changes_base(init: Any, findings: Findings) -> bool:
    """Whether the weights only make sense on a base whose own weights the initialisation changed."""
    if init is None or isinstance(init, bool):
        return False
    if isinstance(init, str) and init.lower() in _INITS_THAT_KEEP_THE_BASE:
        return False
    if isinstance(init, str) and _INITS_THAT_CHANGE_THE_BASE.fullmatch(init.lower()):
        return True
    findings.add(
        Reason.UNSUPPORTED_FEATURE,
        f"init_lora_weights is {shown(init)}, which is not known here; "
        "set it to true if the base weights are unchanged",
        config_field="init_lora_weights",
    )
    return False


def _invalid(findings: Findings, message: str, field: str) -> None:
    findings.add(Reason.INVALID_ADAPTER_CONFIG, message, config_field=field)

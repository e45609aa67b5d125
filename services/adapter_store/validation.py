"""Every rule an upload must pass. All findings are collected; what passes is ready to be packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from services.adapter_store.findings import Findings, Reason, shown
from services.adapter_store.manifest import Manifest, parse_manifest
from services.adapter_store.records import Overrides
from services.adapter_store.safetensors_header import HeaderError, PickleError, TensorEntry, parse_header
from services.adapter_store.tensor_keys import BaseCopy, LoraKey, UnservedKey, normalise, split_layer
from services.adapter_store.upload import WEIGHTS_FILE
from services.adapter_store.weights import DTYPES, Values, inspect
from services.common.profile import BaseModelProfile, Shape

# From here on, the adapter's cost comes near that of full fine-tuning.
_HIGH_RANK = 256


@dataclass(frozen=True, slots=True)
class CheckedModule:
    """One linear with its A and B, fit to be packed."""

    name: str
    layer: int
    rank: int
    scale: float
    shape: Shape
    a: TensorEntry
    b: TensorEntry


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """What an upload that passed holds: modules in the profile's order."""

    modules: tuple[CheckedModule, ...]
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Pair:
    """The tensors found for one module."""

    trained_as: str
    a: TensorEntry | None = None
    b: TensorEntry | None = None


@dataclass(frozen=True, slots=True)
class Examined:
    """Everything that is wrong with an upload, and the modules that are sound all the same."""

    findings: Findings
    modules: tuple[CheckedModule, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Structure:
    """What an upload's config and header say, before any value is looked at.

    tensors: all of the file, by name, in payload order
    """

    findings: Findings
    modules: tuple[CheckedModule, ...]
    pairs: dict[str, _Pair]
    tensors: dict[str, TensorEntry]
    overrides: Overrides

    @property
    def packs_whole(self) -> bool:
        """Nothing is wrong so far, and a pack of the modules holds every byte after the header."""
        return not self.findings and len(self.tensors) == 2 * len(self.modules)

    def served(self) -> Iterator[TensorEntry]:
        """The tensors whose values count."""
        for pair in self.pairs.values():
            for entry in (pair.a, pair.b):
                if entry is not None and entry.dtype in DTYPES:
                    yield entry

    def examined(self, values: Mapping[str, Values]) -> Examined:
        """Apply the other rules, which need the values of every served tensor."""
        contributes = _check_values(values, self.pairs, self.findings)
        contributes -= {module.name for module in self.modules if module.scale == 0}
        if self.pairs and not self.overrides.allow_zero:
            _check_contribution(len(self.pairs), contributes, self.findings)
        return Examined(self.findings, self.modules, _warnings(self.modules))


def validate(config: bytes, weights: memoryview, profile: BaseModelProfile, overrides: Overrides) -> CheckedAdapter:
    """Check an upload against a profile. Raises InvalidArgument or FailedPrecondition that carry every finding."""
    examined = examine(config, weights, profile, overrides)
    examined.findings.raise_if_any()
    return CheckedAdapter(examined.modules, examined.warnings)


def examine(config: bytes, weights: memoryview, profile: BaseModelProfile, overrides: Overrides) -> Examined:
    """Apply every rule. Memory stays flat: `weights` is the mapped file, read in chunks."""
    structure = examine_structure(config, weights, profile, overrides)
    return structure.examined(
        {entry.name: inspect(weights[entry.begin : entry.end], entry) for entry in structure.served()}
    )


def examine_structure(
    config: bytes, weights: memoryview, profile: BaseModelProfile, overrides: Overrides, *, is_whole: bool = True
) -> Structure:
    """Apply the rules that need no values; without `is_whole`, `weights` holds the file's header and no more."""
    findings = Findings()
    manifest = parse_manifest(config, findings)
    if manifest is not None:
        _check_base(manifest, profile, overrides, findings)
    tensors = _read_header(weights, findings, is_whole=is_whole)
    pairs = _bind(tensors, profile, findings)
    modules = [
        module
        for name in profile.modules
        if name in pairs and (module := _check_module(name, pairs[name], manifest, profile, findings)) is not None
    ]
    if not pairs and not findings:
        findings.add(Reason.NO_MODULES, f"{WEIGHTS_FILE} adapts no module of {profile.name}; it would change nothing")
    return Structure(findings, tuple(modules), pairs, tensors, overrides)


def _check_base(manifest: Manifest, profile: BaseModelProfile, overrides: Overrides, findings: Findings) -> None:
    if manifest.base_model not in profile.accepted_names and not overrides.force_base:
        findings.add(
            Reason.BASE_MODEL_MISMATCH,
            f"base_model_name_or_path is {shown(manifest.base_model)}; {profile.name} accepts "
            f"{', '.join(map(shown, profile.accepted_names))}; set force_base if it was trained on that model",
            base_model=profile.name,
        )
    if manifest.changes_base and not overrides.allow_changed_base:
        findings.add(
            Reason.CHANGED_BASE_WEIGHTS,
            "init_lora_weights says that the base weights were changed in training; convert the adapter with "
            "path_initial_model_for_weight_conversion, or set allow_changed_base",
            config_field="init_lora_weights",
        )


def _read_header(weights: memoryview, findings: Findings, *, is_whole: bool) -> dict[str, TensorEntry]:
    try:
        return parse_header(weights, is_whole=is_whole)
    except PickleError as error:
        findings.add(Reason.UNSAFE_FORMAT, f"{WEIGHTS_FILE}: {error}; save it as safetensors")
    except HeaderError as error:
        findings.add(Reason.INVALID_SAFETENSORS, f"{WEIGHTS_FILE}: {error}; save it again")
    return {}


def _bind(tensors: dict[str, TensorEntry], profile: BaseModelProfile, findings: Findings) -> dict[str, _Pair]:
    """Tensors by the module they belong to; what belongs to none is a finding."""
    pairs: dict[str, _Pair] = {}
    for name, entry in tensors.items():
        key = normalise(name)
        if isinstance(key, BaseCopy):
            _check_vocabulary(entry, profile, findings)
        elif isinstance(key, UnservedKey):
            findings.add(Reason.UNSUPPORTED_FEATURE, f"tensor {shown(name)}: {key.why}", tensor=shown(name))
        elif key is None or key.module not in profile.modules:
            _report_unbound(name, key, profile, findings)
        else:
            pair = pairs.setdefault(key.module, _Pair(key.trained_as))
            if (pair.a if key.side == "A" else pair.b) is not None:
                findings.add(
                    Reason.DUPLICATE_TENSOR,
                    f"tensor {shown(name)} is a second lora_{key.side} of {key.module}; keep one",
                    tensor=shown(name),
                )
            elif key.side == "A":
                pair.a = entry
            else:
                pair.b = entry
    return pairs


def _check_vocabulary(entry: TensorEntry, profile: BaseModelProfile, findings: Findings) -> None:
    most = profile.vocab_size + profile.lora_extra_vocab_size
    if not entry.shape or entry.shape[0] > most:
        findings.add(
            Reason.EXTRA_VOCABULARY,
            f"tensor {shown(entry.name)} has shape {list(entry.shape)}; {profile.name} has {profile.vocab_size} rows "
            f"and takes {profile.lora_extra_vocab_size} more; train without added tokens",
            tensor=shown(entry.name),
        )


def _report_unbound(name: str, key: LoraKey | None, profile: BaseModelProfile, findings: Findings) -> None:
    place = split_layer(key.module) if key is not None else None
    if place is not None and place[0] >= profile.num_layers and f"model.layers.0.{place[1]}" in profile.modules:
        findings.add(
            Reason.LAYER_OUT_OF_RANGE,
            f"tensor {shown(name)} is of layer {place[0]}; {profile.name} has layers 0 to {profile.num_layers - 1}; "
            "register it under the base model it was trained on",
            layer=place[0],
            num_layers=profile.num_layers,
        )
    else:
        findings.add(
            Reason.UNKNOWN_MODULE,
            f"tensor {shown(name)} belongs to no module of {profile.name}; adapters may target "
            f"{', '.join(sorted({name.rsplit('.', 1)[-1] for name in profile.modules}))}",
            tensor=shown(name),
        )


def _check_module(
    name: str, pair: _Pair, manifest: Manifest | None, profile: BaseModelProfile, findings: Findings
) -> CheckedModule | None:
    """Check one module's shapes, dtypes and ranks; None when anything is wrong or the config gave no meaning."""
    a, b = pair.a, pair.b
    if a is None or b is None:
        there, missing = ("lora_A", "lora_B") if b is None else ("lora_B", "lora_A")
        findings.add(Reason.UNPAIRED_TENSOR, f"{name} has {there} but no {missing}; save both", module=name)
        return None
    before = len(findings)
    shape = profile.modules[name]
    _check_dtypes(name, a, b, findings)
    if len(a.shape) != 2 or a.shape[1] != shape.in_features:
        _add_shape(a, f"[r, {shape.in_features}]", profile, findings)
    if len(b.shape) != 2 or b.shape[0] != shape.out_features:
        _add_shape(b, f"[{shape.out_features}, r]", profile, findings)
    if len(a.shape) != 2 or len(b.shape) != 2:
        return None
    meaning = manifest.rank_and_scale(pair.trained_as) if manifest is not None else None
    rank, says = (meaning[0], f"the config says rank {meaning[0]}, ") if meaning else (a.shape[0], "")
    if not a.shape[0] == b.shape[1] == rank:
        findings.add(
            Reason.RANK_MISMATCH,
            f"{name}: {says}lora_A has {a.shape[0]} and lora_B {b.shape[1]}; "
            "upload the config that was saved with these weights",
            module=name,
        )
    highest = max(a.shape[0], b.shape[1], rank)
    if highest > profile.max_lora_rank:
        findings.add(
            Reason.ADAPTER_RANK_TOO_HIGH,
            f"{name} has rank {highest}; {profile.name} serves at most {profile.max_lora_rank}; "
            "train with a lower r, or raise max_lora_rank of the fleet",
            module=name,
            rank=highest,
            max_lora_rank=profile.max_lora_rank,
        )
    place = split_layer(name)
    if len(findings) > before or place is None or meaning is None:
        return None
    return CheckedModule(name, place[0], *meaning, shape, a, b)


def _check_dtypes(name: str, a: TensorEntry, b: TensorEntry, findings: Findings) -> None:
    for entry in (a, b):
        if entry.dtype not in DTYPES:
            findings.add(
                Reason.UNSUPPORTED_DTYPE,
                f"tensor {shown(entry.name)} is {entry.dtype}; save it as one of {', '.join(DTYPES)}",
                tensor=shown(entry.name),
            )
    if a.dtype != b.dtype:
        findings.add(
            Reason.DTYPE_MISMATCH, f"{name}: lora_A is {a.dtype}, lora_B {b.dtype}; save both alike", module=name
        )


def _add_shape(entry: TensorEntry, needed: str, profile: BaseModelProfile, findings: Findings) -> None:
    findings.add(
        Reason.SHAPE_MISMATCH,
        f"tensor {shown(entry.name)} has shape {list(entry.shape)}; {profile.name} needs {needed}; "
        "register it under the base model it was trained on",
        tensor=shown(entry.name),
    )


def _check_values(values: Mapping[str, Values], pairs: dict[str, _Pair], findings: Findings) -> set[str]:
    """The modules whose A and B are both not all zero."""
    contributes = set()
    for name, pair in pairs.items():
        found = {entry.name: values[entry.name] for entry in (pair.a, pair.b) if entry and entry.name in values}
        for tensor, of_tensor in found.items():
            if of_tensor.non_finite:
                findings.add(
                    Reason.NON_FINITE_WEIGHTS,
                    f"tensor {shown(tensor)} holds {of_tensor.non_finite} values that are NaN or infinite; "
                    "train it again, with a lower learning rate",
                    tensor=shown(tensor),
                )
        if not any(of_tensor.all_zero for of_tensor in found.values()):
            contributes.add(name)
    return contributes


def _check_contribution(num_modules: int, contributes: set[str], findings: Findings) -> None:
    if not contributes:
        findings.add(
            Reason.ZERO_ADAPTER,
            f"lora_B, lora_A or lora_alpha is zero in each of its {num_modules} modules, so it would serve the base "
            "model; set allow_zero if that is meant",
        )


def _warnings(modules: Sequence[CheckedModule]) -> tuple[str, ...]:
    warnings = []
    highest = max(modules, key=lambda module: module.rank, default=None)
    if highest is not None and highest.rank >= _HIGH_RANK:
        warnings.append(
            f"rank {highest.rank} in {highest.name}: from {_HIGH_RANK} on, full fine-tuning in a deployment of its own "
            "may serve better"
        )
    if any(module.scale < 0 for module in modules):
        warnings.append("lora_alpha is negative, so the adapter subtracts what it learned")
    return tuple(warnings)

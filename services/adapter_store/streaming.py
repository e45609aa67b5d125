"""An upload's weights on their way straight into a pack, each tensor once all of it has come.

So the store writes every byte once. What the pack does not hold is the weights' header: with it, original.py gives the
uploaded file back.
"""

from __future__ import annotations

import hashlib

from services.adapter_store.blobs.interface import PartialBlob
from services.adapter_store.findings import Findings, Reason
from services.adapter_store.packing import PackWriter
from services.adapter_store.safetensors_header import HeaderError, TensorEntry, check_size
from services.adapter_store.upload import WEIGHTS_FILE
from services.adapter_store.validation import Examined, Structure
from services.adapter_store.weights import Values, inspect
from services.common.packed import PackedHeader


class WeightsStream:
    """Weights whose header was found sound.

    header: the file's bytes up to the first tensor's
    structure: whose `packs_whole` is true
    packed: owned by this from now on
    size: of what came so far, in bytes
    """

    def __init__(self, header: bytes, structure: Structure, packed: PartialBlob, *, base_model: str) -> None:
        self.header = header
        self.packed = packed
        self.size = len(header)
        self._hash = hashlib.sha256(header)
        self._structure = structure
        self._values: dict[str, Values] = {}
        self._writer = PackWriter(structure.modules, base_model=base_model, write_at=packed.write_at)
        self._coming = iter(structure.tensors.values())
        self._entry: TensorEntry | None = next(self._coming)
        self._tensor = memoryview(bytearray(max(entry.end - entry.begin for entry in structure.tensors.values())))

    @property
    def digest(self) -> str:
        """Of what came so far."""
        return f"sha256:{self._hash.hexdigest()}"

    def write(self, data: bytes | memoryview) -> None:
        """The file's next bytes. Raises ResourceExhausted when the disk is full."""
        self._hash.update(data)
        rest = memoryview(data)
        while rest and self._entry is not None:
            begin, size = self.size - self._entry.begin, self._entry.end - self._entry.begin
            piece, rest = rest[: size - begin], rest[size - begin :]
            self._tensor[begin : begin + len(piece)] = piece
            self.size += len(piece)
            if self.size == self._entry.end:
                self._put(self._entry, self._tensor[:size])
                self._entry = next(self._coming, None)
        self.size += len(rest)

    def examine(self) -> Examined:
        """What validation.examine says of the whole file."""
        try:
            check_size(max(entry.end for entry in self._structure.tensors.values()), self.size)
        except HeaderError as error:
            findings = Findings()
            findings.add(Reason.INVALID_SAFETENSORS, f"{WEIGHTS_FILE}: {error}; save it again")
            return Examined(findings, (), ())
        return self._structure.examined(self._values)

    def finish(self, content_digest: str) -> PackedHeader:
        """Write the pack's header, which is returned; the file came whole."""
        return self._writer.finish(content_digest)

    def discard(self) -> None:
        self.packed.discard()

    def _put(self, entry: TensorEntry, data: memoryview) -> None:
        self._values[entry.name] = inspect(data, entry)
        self._writer.put(entry, data)

"""A whole decoder step on a CPU as one compiled call. Built from `src/` by the package's build, or at first use."""

from lora_kernels.cpu.batch import InvalidStepError, StepBatch
from lora_kernels.cpu.build import UnavailableError, load_library
from lora_kernels.cpu.decoder import CpuCache, CpuDecoder, DecoderShape, PackedLayer, StepResult
from lora_kernels.cpu.packing import BlockWeights, PackedWeights, Packer

__all__ = [
    "BlockWeights",
    "CpuCache",
    "CpuDecoder",
    "DecoderShape",
    "InvalidStepError",
    "PackedLayer",
    "PackedWeights",
    "Packer",
    "StepBatch",
    "StepResult",
    "UnavailableError",
    "load_library",
]

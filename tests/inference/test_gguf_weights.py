"""What a GGUF file's tensors stand for, beside the gguf package's own reading of them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from numpy.typing import NDArray
from torch import Tensor

from lora_kernels.cpu import BlockWeights
from services.common.errors import Unimplemented
from services.inference.model.config import load_config
from services.inference.model.gguf_weights import read_gguf
from services.inference.model.weights import dense, load_stored_weights, load_weights
from tests.assets.tiny_model import make_tiny_llama

KEPT = {Type.Q4_0, Type.Q4_1, Type.Q8_0}


def write(path: Path, tensors: dict[str, tuple[NDArray[np.uint8], Type]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [*sorted(KEPT), Type.Q5_0, Type.F16, Type.F32], ids=lambda kind: kind.name)
def test_tensors_are_what_they_stand_for(tmp_path: Path, kind: Type) -> None:
    """Bit for bit, q and k in Hugging Face's order of rows, with scales from zero and the least float16 on."""
    config = load_config(make_tiny_llama(tmp_path / "config"))
    rows = config.num_heads * config.head_dim
    values = np.random.default_rng(0).standard_normal((rows, 128)).astype(np.float32)
    values[::3] *= 1e-7
    values[5] = 0
    data = gguf.quants.quantize(values, kind)
    path = write(tmp_path / "model.gguf", {f"blk.1.{part}.weight": (data, kind) for part in ("attn_q", "ffn_up")})
    found = dict(read_gguf(path, config))
    expected = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
    up, q = (found[f"model.layers.1.{name}.weight"] for name in ("mlp.up_proj", "self_attn.q_proj"))
    assert isinstance(up, BlockWeights) == isinstance(q, BlockWeights) == (kind in KEPT)
    assert torch.equal(dense(up).float(), expected.float())
    half = config.head_dim // 2
    assert torch.equal(dense(q)[:half].float(), expected[: config.head_dim : 2].float())
    assert torch.equal(dense(q)[half : config.head_dim].float(), expected[1 : config.head_dim : 2].float())


def test_a_type_that_nobody_reads_is_refused_by_name(tmp_path: Path) -> None:
    config = load_config(make_tiny_llama(tmp_path / "config"))
    data = np.zeros((2, 8), np.int32)
    path = write(tmp_path / "model.gguf", {"output_norm.weight": (data.view(np.uint8), Type.I32)})
    with pytest.raises(Unimplemented, match=r"GGUF type I32 of output_norm\.weight"):
        list(read_gguf(path, config))


@pytest.mark.slow
def test_the_real_file(real_model: Path) -> None:
    """Its linears are in Q4_1 and its embedding in Q8_0; both are kept, and stand for what torch gets."""
    config = load_config(real_model, dtype="bfloat16")
    stored, plain = load_stored_weights(real_model, config), load_weights(real_model, config)
    blocks = {name: weight for name, weight in stored.items() if isinstance(weight, BlockWeights)}
    assert len(blocks) == 7 * config.num_layers + 1
    assert {type(weight) for name, weight in stored.items() if name not in blocks} == {Tensor}
    reader = {str(tensor.name): tensor for tensor in GGUFReader(real_model).tensors}
    down = reader["blk.3.ffn_down.weight"]
    theirs = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type).copy())
    assert torch.equal(dense(stored["model.layers.3.mlp.down_proj.weight"]), theirs)
    for name in list(blocks)[::40]:
        assert torch.equal(dense(stored[name]).bfloat16(), plain[name])

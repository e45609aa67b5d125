"""What the peers are given: the model as a Hugging Face directory that says what the GGUF file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.bench.peers.__main__ import PLOTTED, ROWS
from services.bench.peers.model import write_directory
from services.inference.model.config import load_config
from services.inference.model.weights import load_weights
from services.inference.tokenizer import Tokenizer


@pytest.mark.slow
def test_the_directory_is_the_gguf_file(real_model: Path, tmp_path: Path) -> None:
    directory = write_directory(real_model, tmp_path / "model")
    of_file, of_directory = (load_config(path, name="m", dtype="bfloat16") for path in (real_model, directory))
    assert (of_file.num_layers, of_file.rope_theta) == (of_directory.num_layers, of_directory.rope_theta)
    expected, written = load_weights(real_model, of_file), load_file(directory / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    texts = [Tokenizer.load(path, of_file.eos_token_ids).encode("Tides, 1917.") for path in (real_model, directory)]
    assert texts[0] == texts[1]
    assert json.loads((directory / "tokenizer_config.json").read_text())["eos_token"]


def test_rows_differ() -> None:
    rows = [*ROWS.values(), *PLOTTED.values()]
    assert len({str(row) for row in rows}) == len(rows)
    assert str(ROWS["churn-16"]) == "16 adapters over 8 slots, concurrency 16"

from __future__ import annotations

import pytest

from tests.inference.adapters.packs import ALL, Pack, make_pack

SHAPES = {
    "rank-1": {"r": 1, "target_modules": ["q_proj"]},
    "rank-16": {"r": 16, "target_modules": ALL},
    "rank-17": {"r": 17, "target_modules": ["v_proj", "o_proj", "up_proj"]},
    "rank-40": {"r": 40, "target_modules": ALL},
    "one-layer": {"r": 9, "target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1]},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "gate_proj", "down_proj"],
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 33, "down_proj": 2},
        "alpha_pattern": {"gate_proj": 5},
    },
    "half": {"r": 8, "target_modules": ALL, "dtype": "float16"},
    "brain": {"r": 20, "target_modules": ["k_proj", "v_proj"], "dtype": "bfloat16"},
}


@pytest.fixture(scope="package")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pack]:
    root = tmp_path_factory.mktemp("packs")
    return {name: make_pack(root, name, seed=seed, **shape) for seed, (name, shape) in enumerate(SHAPES.items())}

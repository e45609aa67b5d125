"""The decoder: one file for the Llama family, driven by its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from services.inference.model.attention import Attention, KVCache
from services.inference.model.config import ModelConfig
from services.inference.model.layers import RotaryEmbedding, rms_norm, rotate
from services.inference.model.linear import Linear, Widener, widener_for
from services.inference.model.lora import LINEAR_GROUPS, LoraLayer
from services.inference.parallel.collectives import ALONE, Collectives
from services.inference.parallel.shard import Shard


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's weights; linears that share their input are stacked into one."""

    input_norm: Tensor
    post_attention_norm: Tensor
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One forward pass.

    token_ids, positions: [rows] integers
    attention: how rows attend
    sampled_rows: [n] int64, the rows whose logits are wanted
    """

    token_ids: Tensor
    positions: Tensor
    attention: Attention
    sampled_rows: Tensor


class Decoder:
    """Weights of the base model, or of a rank's part of it, on the device where they are given, and the forward pass.

    config: of that part
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], ranks: Collectives = ALONE) -> None:
        self.config = config
        self._ranks = ranks
        self._embedding = weights["model.embed_tokens.weight"]
        widener = None if self._embedding.is_cuda else widener_for(config.dtype)
        self._layers = [_layer(weights, f"model.layers.{index}.", widener) for index in range(config.num_layers)]
        self._norm = weights["model.norm.weight"]
        self._head = Linear(_head(config, weights, ranks.shard), widener)
        self._rotary = RotaryEmbedding(config, self._embedding.device)

    def forward(self, batch: ForwardBatch, cache: KVCache, lora: Callable[[int], LoraLayer]) -> Tensor:
        """Logits [n, vocab] of the rows asked for, float32. `lora(layer)` gives that layer's adapters.

        Of several ranks all must be here, with the same batch; rank 0 has the logits, the others a part of them.
        """
        eps = self.config.rms_norm_eps
        cos_sin = self._rotary.at(batch.positions)
        x = F.embedding(batch.token_ids, self._embedding)
        for index, layer in enumerate(self._layers):
            adapters = lora(index)
            x = x + self._attention(rms_norm(x, layer.input_norm, eps), layer, index, cos_sin, batch, cache, adapters)
            x = x + self._mlp(rms_norm(x, layer.post_attention_norm, eps), layer, adapters)
        x = rms_norm(x[batch.sampled_rows], self._norm, eps)
        return self._ranks.gather(self._head(x), self.config.vocab_size).float()

    def _attention(
        self,
        x: Tensor,
        layer: DecoderLayer,
        index: int,
        cos_sin: tuple[Tensor, Tensor],
        batch: ForwardBatch,
        cache: KVCache,
        adapters: LoraLayer,
    ) -> Tensor:
        heads, kv_heads, head_dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        qkv = adapters.add("qkv", layer.qkv(x), x)
        q, k, v = torch.split(qkv.view(-1, heads + 2 * kv_heads, head_dim), [heads, kv_heads, kv_heads], dim=1)
        out = batch.attention.attend(rotate(q, *cos_sin), rotate(k, *cos_sin), v, cache, index)
        return self._ranks.sum(adapters.add("o", layer.o(out), out))

    def _mlp(self, x: Tensor, layer: DecoderLayer, adapters: LoraLayer) -> Tensor:
        gate, up = adapters.add("gate_up", layer.gate_up(x), x).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        return self._ranks.sum(adapters.add("down", layer.down(inner), inner))


def _head(config: ModelConfig, weights: Mapping[str, Tensor], shard: Shard) -> Tensor:
    """A tied head is a view of the embedding, which is whole; of one of its own the rank keeps its rows alone."""
    if config.tie_word_embeddings:
        return weights["model.embed_tokens.weight"][shard.rows_of_head(config.vocab_size)]
    head = weights["lm_head.weight"]
    return head if shard.size == 1 else head[shard.rows_of_head(config.vocab_size)].clone()


def _layer(weights: Mapping[str, Tensor], prefix: str, widener: Widener | None) -> DecoderLayer:
    def stacked(group: str) -> Linear:
        return Linear(torch.cat([weights[f"{prefix}{name}.weight"] for name in LINEAR_GROUPS[group]]), widener)

    return DecoderLayer(
        input_norm=weights[prefix + "input_layernorm.weight"],
        post_attention_norm=weights[prefix + "post_attention_layernorm.weight"],
        qkv=stacked("qkv"),
        o=stacked("o"),
        gate_up=stacked("gate_up"),
        down=stacked("down"),
    )

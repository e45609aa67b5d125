"""How a model is cut among ranks.

q, k, v, gate and up are cut by their outputs, o and down by their inputs, so that a layer needs two sums over the ranks
and nothing else. An adapter is cut as its linear is: B of the first by outputs, A of the others by inputs. Its other
half is whole on every rank, and LoRA adds no collective to the base's. With `fully_sharded` that half is cut as well,
for memory: then each linear group's shrink result, [rows, ranks], is summed over the ranks before it is expanded.

The embedding and the norms are whole everywhere; the head is cut by the vocabulary, its last part the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.common.profile import check_parts
from services.inference.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part. size: ranks, one process each"""

    rank: int = 0
    size: int = 1
    fully_sharded: bool = False

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The model as this rank has it: its share of the heads and of the MLP's width.

        Raises FailedPrecondition naming what does not divide.
        """
        check_parts(whole.hf_config, self.size, self.fully_sharded)
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=whole.num_kv_heads // self.size,
            intermediate_size=whole.intermediate_size // self.size,
        )

    @property
    def adapter_parts(self) -> int:
        """Into how many the half of an adapter is cut that its linear leaves whole."""
        return self.size if self.fully_sharded else 1

    def rows_of_head(self, vocab: int) -> slice:
        part = -(-vocab // self.size)
        return slice(self.rank * part, (self.rank + 1) * part)


WHOLE = Shard()

"""A KV cache with room for what comes: a step writes its own token instead of copying all the earlier ones."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache


ROOM = 64  # tokens


def give_room(cache: Cache) -> None:
    """Replace the cache's plain growing layers; sliding windows and recurrent states have a fixed size as it is."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache  # the other one does not grow
    cache.layers[:] = [_Roomy(x) if type(x) is DynamicLayer and x.get_seq_length() else x for x in cache.layers]


class _Roomy(DynamicLayer):
    """``keys`` and ``values`` are views of the used part of two larger tensors (rows, heads, room, size)."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys, self.values = layer.keys, layer.values
        self._stores = (layer.keys, layer.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        used = self.keys.size(-2)
        end = used + key_states.size(-2)
        if end > self._stores[0].size(-2):
            self._stores = tuple(_grown(x, end + ROOM) for x in (self.keys, self.values))
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, used:end] = new
        self._look(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, which may name one several times."""
        self._stores = tuple(store.index_select(0, beam_idx.to(store.device)) for store in self._stores)
        self._look(self.keys.size(-2))

    def _look(self, used: int) -> None:
        self.keys, self.values = (store[:, :, :used] for store in self._stores)


def _grown(used: Tensor, length: int) -> Tensor:
    grown = used.new_empty(*used.shape[:2], length, used.size(-1))
    grown[:, :, : used.size(-2)] = used
    return grown

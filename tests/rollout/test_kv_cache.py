"""KV-cache layers: buffers that are rarely moved, and buffers that never are."""

import torch

from apa_cli.rollout.kv_cache import PreallocatedCacheLayer, StaticCacheLayer


def test_the_buffers_are_reallocated_once_per_spare_room():
    """300 tokens, with room for 129 after each allocation: three addresses."""
    layer, addresses = PreallocatedCacheLayer(), set()
    for _ in range(300):
        keys, values = layer.update(torch.ones(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
        addresses.add(keys.data_ptr())
    assert len(addresses) == 3 and keys.shape == values.shape == (2, 1, 300, 4)
    assert bool(keys.all()) and not bool(values.any())


def test_a_static_layer_takes_over_the_content_and_appends_in_place():
    source = PreallocatedCacheLayer()
    source.update(torch.ones(2, 1, 3, 4), torch.full((2, 1, 3, 4), 2.0))
    cache_position = torch.tensor([3])
    layer = StaticCacheLayer(source, 2, cache_position)
    assert source.keys is source.values is source.buffers is None  # the memory is released
    first = layer.update(torch.full((2, 1, 1, 4), 5.0), torch.full((2, 1, 1, 4), 6.0))
    cache_position.add_(1)
    keys, values = layer.update(torch.full((2, 1, 1, 4), 7.0), torch.full((2, 1, 1, 4), 8.0))
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 5, 7] and values[1, 0, :, 3].tolist() == [2, 2, 2, 6, 8]
    assert [x.data_ptr() for x in first] == [keys.data_ptr(), values.data_ptr()]

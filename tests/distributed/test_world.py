"""World: shards of indices, and errors of rank 0."""

import pytest

from apa_cli.distributed.world import SINGLE_PROCESS, RankLost, World
from apa_cli.errors import UserError


def test_shards_have_equal_length_and_are_in_order():
    worlds = [World(rank, 3, rank, None, 0.0) for rank in range(3)]
    assert [world.shard_indices(6) for world in worlds] == [[0, 1], [2, 3], [4, 5]]
    assert [world.shard_indices(5) for world in worlds] == [[0, 1], [2, 3], [4, 4]]
    assert [world.shard_indices(1) for world in worlds] == [[0], [0], [0]]
    assert [world.shard_indices(0) for world in worlds] == [[], [], []]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", range(9))
def test_the_shards_of_all_ranks_cut_to_the_count_are_the_indices(size, count):
    shards = [World(rank, size, rank, None, 0.0).shard_indices(count) for rank in range(size)]
    assert len({len(shard) for shard in shards}) == 1
    assert [index for shard in shards for index in shard][:count] == list(range(count))


def test_an_error_of_rank_0_is_raised_there_and_ends_the_others(monkeypatch):
    def fail():
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        SINGLE_PROCESS.broadcast_from_main(fail)
    sent = []
    monkeypatch.setattr(World, "all_gather", lambda self, value: sent.append(value) or [(None, True), value])
    with pytest.raises(UserError, match="the disk is full"):
        World(0, 2, 0, None, 0.0).broadcast_from_main(fail)
    with pytest.raises(RankLost):
        World(1, 2, 1, None, 0.0).broadcast_from_main(fail)
    assert sent == [(None, True), (None, False)]

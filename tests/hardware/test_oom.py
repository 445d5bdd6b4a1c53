"""Out-of-memory retry: sizes are halved down to the smallest, and stay halved."""

import pytest
import torch

from apa_cli.errors import UserError
from apa_cli.hardware.oom import BatchSizeHalver


def test_the_batch_size_is_halved_until_memory_suffices():
    messages, attempts = [], []

    def work(size: int) -> int:
        attempts.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("out of memory")
        return size

    halver = BatchSizeHalver("microbatch_size", 12, 1, messages.append)
    assert halver.run(work) == 3 and attempts == [12, 6, 3]
    assert halver.run(work) == 3 and attempts == [12, 6, 3, 3]  # larger sizes are not tried again
    assert len(messages) == 2 and messages[1].startswith("microbatch_size: out of memory; reduced to 3")
    with pytest.raises(RuntimeError, match="another"):
        halver.run(lambda size: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(UserError, match="microbatch_size: out of memory with 6"):
        BatchSizeHalver("microbatch_size", 12, 6, messages.append).run(work)

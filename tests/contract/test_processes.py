import json
import time
import pytest
from tests.contract.scenarios import SCENARIOS
@pytest.mark.parametrize("name", SCENARIOS)
def test_it(name, train_on_ranks, logged_data, tmp_path, comparable, records):
    overrides = [f"algo={SCENARIOS[name][0]}", *SCENARIOS[name][1:], *logged_data, "iterations=4", "evaluation.every=2"]
    s = time.time()
    one = train_on_ranks(tmp_path / "one", 1, *overrides)
    m = time.time()
    two = train_on_ranks(tmp_path / "two", 2, *overrides)
    print(m - s, time.time() - m)
    ranks = json.loads((two / "ranks.json").read_text())
    assert len(ranks) == 2 and ranks[0] == ranks[1]
    for row, expected in zip(comparable(two / "metrics.jsonl"), comparable(one / "metrics.jsonl"), strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            if row[name] != pytest.approx(value, rel=1e-4, abs=1e-6): print(row["iteration"], name, value, row[name])
    texts = [[(row["iteration"], row["prompt"], row["response"], row["ending"]) for row in records(r / "samples.jsonl")] for r in (one, two)]
    print([a for a, b in zip(*texts) if a != b])

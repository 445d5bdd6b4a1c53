"""Pools: rows in memory, the file that rank 0 brings up to date, and what a killed run leaves in it."""

import pytest

from apa_cli.errors import UserError
from apa_cli.pool import Pool


def make_pool(*numbers: int) -> Pool:
    """Return a pool of rows {"n": number}."""
    pool = Pool()
    pool.append([{"n": number} for number in numbers])
    return pool


def read_numbers(pool: Pool) -> list[int]:
    return [row["n"] for row in pool.rows(range(pool.length))]


def test_rows_are_returned_in_the_order_of_the_indices():
    pool = make_pool(10, 11)
    pool.append([{"n": 12}])
    assert pool.length == len(pool) == 3
    assert pool.rows([2, 0, 2]) == [{"n": 12}, {"n": 10}, {"n": 12}]
    with pytest.raises(IndexError):
        pool.rows([3])


def test_rows_in_memory_equal_rows_from_the_file(tmp_path):
    """1/3 and 1e-310 (subnormal) return to the bit; a line separator in a text and a lone surrogate end no line."""
    row = {"p": 1 / 3, "q": 1e-310, "nan": float("inf"), "ids": (1, 2), "text": "a\u2028b\nc\ud800é", "none": None}
    pool = Pool()
    pool.append([row, {}])
    pool.save(tmp_path / "pool.jsonl")
    expected = [{**row, "ids": [1, 2]}, {}]
    assert pool.rows([0, 1]) == Pool.read(tmp_path / "pool.jsonl", 2).rows([0, 1]) == expected


def test_a_row_that_is_changed_outside_stays_the_same_in_the_pool():
    row = {"ids": [1]}
    pool = Pool()
    pool.append([row])
    row["ids"].append(2)
    pool.rows([0])[0]["ids"].append(3)
    assert pool.rows([0]) == [{"ids": [1]}]


@pytest.mark.parametrize("row", [[1], {"x": {1, 2}}, "text"])
def test_a_row_that_is_not_json_is_refused_with_all_rows_beside_it(row):
    pool = make_pool(1)
    with pytest.raises(TypeError):
        pool.append([{"n": 2}, row])
    assert read_numbers(pool) == [1]


def test_a_save_appends_the_new_rows_alone(tmp_path):
    """The mark that a test sets before the old rows would be lost if the file were written anew."""
    file, pool = tmp_path / "pools" / "a" / "pool.jsonl", make_pool(1)
    pool.save(file)
    assert file.read_text() == '{"n": 1}\n'
    file.write_text('{"mark": 1}\n' + file.read_text())
    pool.append([{"n": 2}, {"n": 3}])
    pool.save(file)
    pool.save(file)
    assert file.read_text() == '{"mark": 1}\n{"n": 1}\n{"n": 2}\n{"n": 3}\n'
    assert [path.name for path in file.parent.iterdir()] == ["pool.jsonl"]


def test_an_empty_pool_has_no_file(tmp_path):
    file = tmp_path / "pools" / "pool.jsonl"
    Pool().save(file)
    assert not file.parent.exists()
    make_pool(1).save(file)
    Pool.read(file, 0).save(file)  # a run that goes on from before the first row
    assert not file.exists() and Pool.read(file, 0).length == 0


def test_a_killed_run_continues_from_the_rows_of_its_checkpoint(tmp_path):
    """The file has the checkpoint's 2 rows, a later row, and half a row that a killed process was writing."""
    file = tmp_path / "pool.jsonl"
    make_pool(1, 2, 3).save(file)
    with file.open("a") as handle:
        handle.write('{"n": 4')
    ranks = [Pool.read(file, 2) for _ in range(2)]
    for pool in ranks:
        pool.append([{"n": 30}])
    ranks[0].save(file)
    assert file.read_text() == '{"n": 1}\n{"n": 2}\n{"n": 30}\n'
    assert read_numbers(ranks[0]) == read_numbers(ranks[1]) == read_numbers(Pool.read(file, 3)) == [1, 2, 30]


def test_a_fork_copies_the_rows_and_leaves_the_other_file(tmp_path):
    source, target = tmp_path / "source" / "pool.jsonl", tmp_path / "fork" / "pool.jsonl"
    make_pool(1, 2, 3).save(source)
    content = source.read_bytes()
    pool = Pool.read(source, 2)
    pool.append([{"n": 9}])
    pool.save(target)
    assert source.read_bytes() == content
    assert target.read_text() == '{"n": 1}\n{"n": 2}\n{"n": 9}\n'


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"n": 1}\n', 2),  # the second row is missing
        ('{"n": 1}\n{"n": 2}', 2),  # the second row does not end
        ('{"n": \n{"n": 2}\n', 1),
        ('{"n": 1}\n[2]\n', 2),
        ('{"n": 1}\n{"n": "\udcff"}\n', 2),  # not UTF-8
    ],
)
def test_a_missing_or_damaged_row_is_one_line_that_names_it(content, line, tmp_path):
    file = tmp_path / "pool.jsonl"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"^{file}, line {line}: missing or damaged.* 2 rows; .*$"):
        Pool.read(file, 2)
    file.unlink()
    with pytest.raises(UserError, match=rf"^{file}: cannot be read \(No such file.*\); the checkpoint needs 2 rows$"):
        Pool.read(file, 2)


def test_after_a_failed_save_the_next_writes_the_whole_file(tmp_path):
    """A full disk may leave half a row, which must not be continued. Here a folder is in the file's place."""
    file, pool = tmp_path / "pool.jsonl", make_pool(1)
    pool.save(file)
    pool.append([{"n": 2}])
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=rf"^{file}: cannot be written \(Is a directory\); checkpoints are intact$"):
        pool.save(file)
    file.rmdir()
    file.write_text('{"n": 1}\n{"n":')
    pool.save(file)
    assert file.read_text() == '{"n": 1}\n{"n": 2}\n'

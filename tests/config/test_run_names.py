"""Names of runs and of their directories."""

from apa_cli.config.run_names import LONGEST_NAME, locate_run_directory, make_job_name


def test_job_names_have_no_path_separators():
    assert make_job_name("model.path=/a/b,seed=0") == "model.path=_a_b,seed=0"
    assert make_job_name("") == "default"


def test_the_model_that_a_path_implies_is_not_named():
    assert make_job_name("lambda=1,model.path=X,model=local,seed=0") == "lambda=1,model.path=X,seed=0"
    assert make_job_name("model.path=X,model=local") == "model.path=X"
    assert make_job_name("model=local,seed=0") == "model=local,seed=0"


def test_a_long_job_name_keeps_its_end_and_gets_a_digest():
    first, second = (make_job_name(f"reward.target={letter * 300},seed=0") for letter in "ab")
    assert len(first.encode()) <= LONGEST_NAME and ",seed=0-" in first
    assert first != second


def test_a_resumed_run_stays_in_its_directory():
    assert locate_run_directory("new", None) == locate_run_directory("new", "auto") == "outputs/new"
    assert locate_run_directory("new", "outputs/old") == "outputs/old"
    assert locate_run_directory("new", "outputs/old/checkpoints/iteration_000004") == "outputs/old"

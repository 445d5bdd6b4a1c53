"""The model card of an export: the run's settings and results, and a program that runs."""

import json
import shutil

import pytest
import torch
import yaml

from apa_cli.config.build import build_config
from apa_cli.config.from_run import compose_from_run
from apa_cli.inference.export import export_policy
from apa_cli.inference.model_card import format_example, format_front_matter, format_model_card
from apa_cli.inference.trained_policy import PromptKind
from apa_cli.runs.records import RecordedRun


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    overrides = ("iterations=2", "optimizer.lr=1e-2", "checkpoint.keep_last=9", "evaluation.every=1")
    return train(tmp_path_factory.mktemp("exported") / "run", *overrides)


def parse_tables(card: str) -> dict[str, list[str]]:
    """Return the rows of all tables by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_the_card_has_the_runs_settings_and_results(run, records):
    card = format_model_card(RecordedRun.find(str(run)), torch.float32)
    first, _, last = [row for row in records(run / "metrics.jsonl") if "eval/reward_mean" in row]
    tables = parse_tables(card)
    assert tables["score"] == [f"{first['eval/reward_mean']:.4g}", f"{last['eval/reward_mean']:.4g}"]
    assert tables["exact KL to the SFT model, nats per response"][1] == f"{last['eval/kl_exact']:.4g}"
    assert tables["responses sampled"] == ["16"] and tables["iterations"] == ["2 of 2"] and tables["seed"] == ["0"]
    assert tables["reward"] == ["FunctionReward `vowels.py:vowels` (local)"]
    assert tables["trained from"] == ["`tiny` (local)"] and tables["prompts"] == ["StoryOpenings"]
    assert tables["`optimizer.lr`"] == ["0.01"] and tables["`whitening`"] == ["none"]
    assert tables["`lambda_`"] == ["0.1"]
    assert "APA, λ = 0.1" in card and "After iteration 2" in card and f"torch {torch.__version__}" in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["rlhf", "apa", "apa-cli"]


def test_a_checkpoints_card_is_of_its_iteration(run, records):
    card = format_model_card(RecordedRun.find(f"{run}/checkpoints/iteration_000001"), torch.bfloat16)
    row = records(run / "metrics.jsonl")[1]
    tables = parse_tables(card)
    assert tables["score"][1] == f"{row['eval/reward_mean']:.4g}"
    assert tables["responses sampled"] == ["8"] and tables["precision of the weights"] == ["bfloat16"]
    assert "After iteration 1" in card


def test_the_algorithm_is_described_as_environment_json_records_it(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    environment = json.loads((copy / "environment.json").read_text())
    facts = {"label": "APA, mine: new", "color": "#000000", "lambda_meaning": "strength"}
    (copy / "environment.json").write_text(json.dumps({**environment, "algorithm": facts}))
    card = format_model_card(RecordedRun.find(str(copy)), torch.float32)
    assert "online RLHF with APA, mine: new, λ = 0.1 (strength), by" in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["rlhf", "apa, mine: new", "apa-cli"]


def test_a_local_base_model_is_not_named_to_hubs(tmp_path):
    assert "base_model" not in format_front_matter(str(tmp_path), "APA")
    assert "base_model: org/name" in format_front_matter("org/name", "APA")


def test_the_card_has_the_report_of_apa_eval_on_this_policy(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    metrics = {
        "eval/reward_mean": 0.25, "eval/reward_ci": 0.125, "eval/gain/size": 2.0, "eval/gain_ci/size": 0.5,
        "eval/best_of_4/reward_mean": 3.0, "eval/best_of_4/reward_ci": 0.75,
    }  # fmt: skip
    for iteration in (1, 2):  # a report of before the run was continued is not on this policy
        (copy / "eval.json").write_text(json.dumps({"iteration": iteration, "prompts": 99, "metrics": metrics}))
        card = format_model_card(RecordedRun.find(str(copy)), torch.float32)
        assert ("apa-eval" in card) == (iteration == 2)
    assert "on 99 held-out prompts" in card
    tables = parse_tables(card.split("`apa-eval`")[1])
    assert tables["score"] == ["0.25 ± 0.12"] and tables["gain in size"] == ["2 ± 0.5"]
    assert tables["score of the SFT model's best of 4 responses"] == ["3 ± 0.75"]


def test_the_cards_program_runs(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "written"
    overrides = [f"run={run}", f"export.folder={folder}"]
    export_policy(build_config(compose_from_run(overrides, uses_reward=lambda cfg: False)), RecordedRun.find(str(run)))
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    exec(program)
    assert capsys.readouterr().out.strip()


def test_the_prompt_of_a_chat_is_given_to_the_template():
    sampling = {"stop_strings": ["Human:", r"\n"], "temperature": 0.5, "top_k": 0, "top_p": 1.0, "max_new_tokens": 7}
    text = "\n\nHuman: Hi\n\nAssistant: "
    program = format_example(sampling, text, PromptKind.chat)
    assert "messages = [{'role': 'user', 'content': 'Hi'}]" in program and "prompt =" not in program
    assert "temperature=0.5" in program and "stop_strings=['Human:', '\\n']" in program
    assert f"prompt = {text!r}" in format_example(sampling, text, PromptKind.dialogue)

"""Loading: models of another task, and what a folder must hold."""

import pytest
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from apa_cli.errors import UserError
from apa_cli.models.loading import load_model_config, load_policy


def test_a_model_of_another_task_is_one_line(make_config, tmp_path):
    t5 = AutoConfig.for_model("t5", vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    AutoModelForSeq2SeqLM.from_config(t5).save_pretrained(tmp_path)
    settings = make_config(f"model.path={tmp_path}").model
    with pytest.raises(UserError, match=r"^model.path: .* is a t5 model, which is not a causal language model$"):
        load_model_config(settings, str(tmp_path))
    with pytest.raises(
        UserError, match=r"^model.path: cannot load .*AutoModelForCausalLM$"
    ):  # not the list of all types
        load_policy(settings, str(tmp_path))

"""Loading: models of another task, and what a folder must hold."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from apa_cli.errors import UserError
from apa_cli.models.loading import load_model_config, load_policy, load_tokenizer


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


def test_weights_of_another_shape_are_named_with_both_shapes(make_config, tmp_path):
    """The file has 11 rows of embeddings, of 8 values each; the configuration is then changed to 12 rows."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=11, tie_word_embeddings=True, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config.vocab_size = 12
    config.save_pretrained(tmp_path)
    shapes = r"model\.embed_tokens\.weight has the shape \[11, 8\], but \[12, 8\] by config\.json$"
    with pytest.raises(UserError, match=rf"^model\.path: cannot load .*: {shapes}"):
        load_policy(make_config(f"model.path={tmp_path}").model, str(tmp_path))


def test_a_model_without_a_tokenizer_says_so(make_config, tmp_path):
    AutoConfig.for_model("llama", vocab_size=11).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^model\.path: cannot load .*: no tokenizer that .*tokenizer\.json"):
        load_tokenizer(make_config(f"model.path={tmp_path}").model, str(tmp_path))

"""Low-rank adapters: what they change and what they leave unchanged, and the folders that hold them."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from apa_cli.errors import UserError
from apa_cli.inference.trained_policy import load_trained_policy
from apa_cli.models.forward import TrainingModel, compute_response_logprobs, enable_activation_checkpointing
from apa_cli.models.lm_head import find_linear_head
from apa_cli.models.loading import load_policy, load_tokenizer, save_model
from apa_cli.models.lora import (
    POLICY_ADAPTER,
    AdapterDisabledModel,
    add_adapter,
    find_adapter_parameters,
    get_active_adapter,
    merge_adapter_tensors,
    use_adapter,
)
from apa_cli.runs.records import RecordedRun
from apa_cli.settings import CriticKind
from apa_cli.training.models import build_training_model
from tests.builders import (
    add_random_adapter,
    build_tiny_policy,
    build_value_critic,
    build_word_tokenizer,
    make_lora_settings,
    make_sequences,
)

LORA = make_lora_settings(rank=3, alpha=6.0)
IDS = torch.tensor([[5, 40, 31, 7, 99, 12]])
TOKENS = make_sequences([[5, 40, 31]], [[7, 99, 12]])


def load_model(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def find_trained_names(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def randomize(model) -> None:
    """Set every adapter's second factor and every value head to weights other than zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("head.weight") and parameter.shape[0] == 1:  # a critic's
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def adapted(tiny):
    """A tiny model with an adapter for the policy and one for a critic, both with an effect."""
    model = load_model(tiny)
    add_adapter(model, LORA, POLICY_ADAPTER, seed=0)
    add_adapter(model, LORA, "critic_value", seed=1)
    randomize(model)
    return model


def test_a_new_adapter_changes_no_output_and_is_all_that_is_trained(tiny):
    model = load_model(tiny)
    before = model(IDS).logits
    add_adapter(model, LORA, POLICY_ADAPTER, seed=0)
    assert torch.equal(model(IDS).logits, before)
    names = find_trained_names(model)
    # Two layers, one wrapped matrix each (peft's choice for GPT-NeoX is query_key_value), two factors each.
    assert len(names) == 4 and all(".query_key_value.lora_" in name and ".policy." in name for name in names)


def test_an_adapter_depends_on_its_seed_alone(tiny):
    def first_factor(seed):
        model = load_model(tiny)
        torch.manual_seed(int(torch.randint(1000, ())))
        add_adapter(model, LORA, POLICY_ADAPTER, seed)
        return next(p for n, p in model.named_parameters() if ".lora_A." in n).clone()

    assert torch.equal(first_factor(3), first_factor(3)) and not torch.equal(first_factor(3), first_factor(4))


def test_adapters_are_float32_on_a_bfloat16_base(tiny):
    model = load_model(tiny, torch.bfloat16)
    add_adapter(model, LORA, POLICY_ADAPTER, seed=0)
    dtypes = {".lora_" in name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_switching_adapters_changes_the_output_and_not_what_is_trained(tiny, adapted):
    base = load_model(tiny)(IDS).logits
    names = find_trained_names(adapted)
    assert len(names) == 8
    policy = adapted(IDS).logits
    assert get_active_adapter(adapted) == POLICY_ADAPTER and not torch.allclose(policy, base)
    with use_adapter(adapted, None):
        assert get_active_adapter(adapted) is None and find_trained_names(adapted) == names
        assert torch.equal(adapted(IDS).logits, base)
        with use_adapter(adapted, "critic_value"):
            critic = adapted(IDS).logits
        assert torch.equal(adapted(IDS).logits, base)
    assert not torch.allclose(critic, policy) and not torch.allclose(critic, base)
    assert torch.equal(adapted(IDS).logits, policy) and find_trained_names(adapted) == names
    assert torch.equal(AdapterDisabledModel(adapted)(input_ids=IDS).logits, base)


def test_an_error_in_the_block_restores_the_adapter(adapted):
    with pytest.raises(RuntimeError), use_adapter(adapted, None):
        raise RuntimeError
    assert get_active_adapter(adapted) == POLICY_ADAPTER


def test_the_weight_update_is_alpha_over_rank_times_the_product(tiny):
    model = load_model(tiny)
    add_adapter(model, LORA, POLICY_ADAPTER, seed=0)
    randomize(model)
    weight = load_model(tiny).gpt_neox.layers[0].attention.query_key_value.weight
    layer = model.gpt_neox.layers[0].attention.query_key_value
    expected = weight + 6.0 / 3 * layer.lora_B[POLICY_ADAPTER].weight @ layer.lora_A[POLICY_ADAPTER].weight
    merged = merge_adapter_tensors(model)
    torch.testing.assert_close(merged["gpt_neox.layers.0.attention.query_key_value.weight"], expected)
    assert merged.keys() == load_model(tiny).state_dict().keys()


def test_saved_merged_model_and_saved_adapter_give_the_same_logits(tiny, adapted, tmp_path):
    expected = adapted(IDS).logits
    save_model(adapted, AutoTokenizer.from_pretrained(tiny), tmp_path / "model")
    torch.testing.assert_close(load_model(tmp_path / "model")(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    loaded = PeftModel.from_pretrained(load_model(tiny), tmp_path / "model" / "adapter")
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    stored = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(tiny) and stored["task_type"] == "CAUSAL_LM"


def test_an_adapter_folder_loads_merged_with_its_base_models_tokenizer(tiny, adapted, make_config, tmp_path):
    save_model(adapted, AutoTokenizer.from_pretrained(tiny), tmp_path / "model")
    folder = str(tmp_path / "model" / "adapter")
    settings = make_config(f"model.path={folder}", "model.attn_implementation=eager").model
    model = load_policy(settings, folder)
    torch.testing.assert_close(model(IDS).logits, adapted(IDS).logits, rtol=1e-5, atol=1e-5)
    assert len(find_trained_names(model)) == len(find_trained_names(load_model(tiny)))  # no adapter weights remain
    assert load_tokenizer(settings, folder).get_vocab() == AutoTokenizer.from_pretrained(tiny).get_vocab()


@pytest.fixture
def tied(tmp_path):
    """The folder of a tiny GPT-2, whose output head is tied to its embeddings, with a tokenizer."""
    build_tiny_policy("gpt2").save_pretrained(tmp_path / "tied")
    build_word_tokenizer().save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.mark.parametrize(
    "targets",
    [
        ["wte", "lm_head"],
        *(pytest.param(one, marks=pytest.mark.slow) for one in (["wte"], ["lm_head"], ["c_attn"], ["all-linear"])),
    ],
)
def test_plain_folder_adapter_alone_and_adapter_as_a_model_are_the_trained_model(targets, tied, make_config, tmp_path):
    ids, trained = torch.tensor([[2, 5, 9]]), load_model(tied)
    base = trained(ids).logits
    add_adapter(trained, make_lora_settings(target_modules=targets), POLICY_ADAPTER, 0)
    torch.testing.assert_close(trained(ids).logits, base, rtol=0, atol=0)
    parameters = find_adapter_parameters(trained, POLICY_ADAPTER)
    assert set(find_trained_names(trained)) == set(parameters)
    if targets != ["all-linear"]:
        assert {any(f".{target}." in f".{name}" for name in parameters) for target in targets} == {True}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(std=0.3)
    expected = trained(ids).logits
    assert (expected - base).abs().max() > 0.1
    save_model(trained, AutoTokenizer.from_pretrained(tied), tmp_path / "out")
    plain = load_model(tmp_path / "out")
    is_tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert is_tied == plain.config.tie_word_embeddings == (not {"wte", "lm_head"} & set(targets))
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-5, atol=1e-5)
    alone = PeftModel.from_pretrained(load_model(tied), tmp_path / "out" / "adapter")
    torch.testing.assert_close(alone(ids).logits, expected, rtol=1e-5, atol=1e-5)
    merged = load_policy(make_config().model, str(tmp_path / "out" / "adapter"))
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)
    save_model(merged, AutoTokenizer.from_pretrained(tied), tmp_path / "again")
    torch.testing.assert_close(load_model(tmp_path / "again")(ids).logits, expected, rtol=1e-5, atol=1e-5)
    with use_adapter(trained, None):
        torch.testing.assert_close(trained(ids).logits, base, rtol=0, atol=0)


def test_an_adapter_on_an_adapter_names_the_earlier_one_as_its_base(tied, make_config, tmp_path):
    first = load_model(tied)
    add_random_adapter(first, make_lora_settings())
    save_model(first, AutoTokenizer.from_pretrained(tied), tmp_path / "first")
    second = load_policy(make_config().model, str(tmp_path / "first" / "adapter"))
    add_random_adapter(second, make_lora_settings(rank=1))
    save_model(second, AutoTokenizer.from_pretrained(tied), tmp_path / "second")
    loaded = load_policy(make_config().model, str(tmp_path / "second" / "adapter"))
    ids = torch.tensor([[2, 5, 9]])
    assert (second(ids).logits - first(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(loaded(ids).logits, second(ids).logits, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(make_config().model, str(tmp_path / "second" / "adapter")).get_vocab()["j"] == 9


def test_adapters_on_experts_that_share_one_tensor_are_saved_as_trained(tmp_path):
    sizes = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "intermediate_size": 16, "num_key_value_heads": 2, "first_k_dense_replace": 0,
    }  # fmt: skip
    model = build_tiny_policy("deepseek_v3", **sizes)
    targets = ["gate_proj", "up_proj", "down_proj"]
    try:
        add_random_adapter(model, make_lora_settings(target_modules=targets))
    except UserError:
        pytest.skip("this version of peft cannot wrap experts")
    ids = torch.tensor([[2, 5, 9]])
    save_model(model, build_word_tokenizer(), tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["c_attn", "nothing"], ["nothing"]])
def test_a_target_that_the_model_lacks_is_one_line(targets):
    with pytest.raises(
        UserError, match=r"^lora.target_modules: this gpt2 model has no layer nothing; its linear.*c_fc"
    ):
        add_adapter(build_tiny_policy("gpt2"), make_lora_settings(target_modules=targets), POLICY_ADAPTER, 0)


def test_a_layer_whose_weights_the_model_reads_directly_is_one_line():
    policy = build_tiny_policy("mamba", state_size=4)
    with pytest.raises(UserError, match=r"^lora.target_modules: an adapter on dt_proj has no effect.*mamba"):
        add_adapter(policy, make_lora_settings(target_modules=["in_proj", "dt_proj"]), POLICY_ADAPTER, 0)


@pytest.mark.parametrize("kind", [CriticKind.adapter, CriticKind.separate])
def test_a_critic_has_no_adapter_on_the_output_head(kind):
    policy = build_tiny_policy("gpt2")
    critic = build_value_critic(policy, kind, lora=make_lora_settings(target_modules=["wte", "lm_head"]))
    adapted = policy if kind is CriticKind.adapter else critic.backbone
    names = find_trained_names(adapted)
    assert len(names) == 2 and all("wte.lora_embedding" in name for name in names)
    with pytest.raises(UserError, match=r"^lora.target_modules: .*critic, which has no output head, has no layer lm_h"):
        build_value_critic(build_tiny_policy("gpt2"), kind, lora=make_lora_settings(target_modules=["lm_head"]))


def test_the_embeddings_adapter_of_a_critic_is_the_critics_alone():
    policy, settings = build_tiny_policy("gpt2"), make_lora_settings(target_modules=["wte"])
    add_adapter(policy, settings, POLICY_ADAPTER, 0)
    model = TrainingModel(policy, {"value": build_value_critic(policy, CriticKind.adapter, lora=settings)}, 1.0)
    named = {id(p): name for name, p in model.named_parameters()}
    assert {named[id(p)].rpartition(".")[2] for p in model.policy_parameters()} == {"policy"}
    critic = {named[id(p)].rpartition(".")[2] for p in model.list_output_parameters("value")}
    assert critic == {"critic_value", "weight", "bias"}


# --- folders that cannot be loaded --------------------------------------------------------------------------


def save_tied_adapter(tied, folder, **changes):
    """Save an adapter of the model in `tied` in `folder`, with changes to its adapter_config.json."""
    model = load_model(tied)
    add_random_adapter(model, make_lora_settings())
    save_model(model, AutoTokenizer.from_pretrained(tied), folder.parent / "plain")
    shutil.copytree(folder.parent / "plain" / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "/nowhere/base"}, "cannot load the base model of the adapter .*/nowhere/base"),
        ({"base_model_name_or_path": None}, "adapter_config.json names no base_model_name_or_path"),
        ({"base_model_name_or_path": "SELF"}, "names the adapter itself"),
    ],
)
def test_an_adapter_without_its_base_is_one_line(changes, message, tied, make_config, tmp_path):
    folder = tmp_path / "adapter"
    changes = {key: str(folder) if value == "SELF" else value for key, value in changes.items()}
    save_tied_adapter(tied, folder, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_policy(make_config().model, str(folder))
    assert "\n" not in str(error.value)


def test_a_damaged_adapter_config_is_one_line(tied, make_config, tmp_path):
    save_tied_adapter(tied, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": ')
    with pytest.raises(UserError, match=r"adapter_config.json cannot be read: Expecting value"):
        load_policy(make_config().model, str(tmp_path / "adapter"))


def test_a_config_beside_an_adapter_does_not_make_it_a_model_but_weights_are_refused(tied, make_config, tmp_path):
    folder, ids = tmp_path / "adapter", torch.tensor([[2, 5, 9]])
    expected = save_tied_adapter(tied, folder)(ids).logits
    shutil.copy(tied / "config.json", folder)
    loaded = load_policy(make_config().model, str(folder))
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
    shutil.copy(tied / "model.safetensors", folder)
    with pytest.raises(
        UserError, match=r"^model.path: .* contains both a model and an adapter \(adapter_config.json\)"
    ):
        load_policy(make_config().model, str(folder))


# --- in training --------------------------------------------------------------------------------------------


def load_training_model(make_config, tiny, *overrides):
    config = make_config("lora=default", "lora.rank=3", "model.attn_implementation=eager", *overrides)
    model, reference = build_training_model(config, load_policy(config.model, str(tiny), frozen_base=True))
    return model, reference


def find_reached_names(model: TrainingModel, value: bool) -> set[str]:
    """Return the names of the parameters that get gradients from a loss on the values, or else on the log-probs."""
    randomize(model)
    model.zero_grad(set_to_none=True)
    output = model(TOKENS)
    (output.values["value"] if value else output.logprobs).sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}


@pytest.mark.parametrize("kind", ["adapter", "separate", "head"])
def test_each_loss_reaches_only_its_own_weights(kind, make_config, tiny):
    model, _ = load_training_model(make_config, tiny, f"critic={kind}")
    by_policy, by_value = find_reached_names(model, value=False), find_reached_names(model, value=True)
    assert by_policy and all(".policy." in name for name in by_policy)
    heads = {"critics.value.head.weight", "critics.value.head.bias"}
    trunk = by_value - heads
    assert heads <= by_value
    if kind == "adapter":
        assert trunk and all(".critic_value." in name for name in trunk)
    elif kind == "separate":
        assert trunk and all(name.startswith("critics.value.backbone.") and ".lora_" in name for name in trunk)
    else:
        assert trunk == by_policy  # the trunk is shared
    names = dict(model.named_parameters())
    assert {id(names[name]) for name in by_policy} <= {id(p) for p in model.policy_parameters()}
    critic_group = {id(p) for p in model.critic_parameters()}
    assert {id(names[name]) for name in (heads if kind == "head" else by_value)} == critic_group
    assert not critic_group & {id(p) for p in model.policy_parameters()}


def test_the_reference_stays_the_base_while_adapters_change(make_config, tiny):
    model, reference = load_training_model(make_config, tiny, "critic=adapter")
    expected = compute_response_logprobs(load_model(tiny), TOKENS, 1.0)
    randomize(model)
    assert torch.equal(compute_response_logprobs(reference, TOKENS, 1.0), expected)
    assert not torch.allclose(compute_response_logprobs(model.policy, TOKENS, 1.0), expected)


@pytest.mark.parametrize("overrides", [["critic=adapter"], ["critic=separate"], ["critic=head"], ["lora.rank=0"]])
def test_recomputed_activations_give_the_same_gradients(overrides, make_config, tiny):
    gradients = {}
    for checkpointing in ("false", "true"):
        model, _ = load_training_model(make_config, tiny, *overrides, f"model.gradient_checkpointing={checkpointing}")
        find_linear_head(model.policy)  # its first call probes the model with a pass
        calls = []
        block = model.policy.gpt_neox.layers[0]
        block.attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        randomize(model)
        output = model(TOKENS)
        before = len(calls)
        (output.logprobs.sum() + output.values["value"].sum()).backward()
        gradients[checkpointing] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(calls) == (2 * before if checkpointing == "true" else before)
        with torch.no_grad():
            model(TOKENS)
        assert not any(module.training for module in model.policy.modules())
    assert gradients["true"].keys() == gradients["false"].keys()
    for name, gradient in gradients["false"].items():
        torch.testing.assert_close(gradients["true"][name], gradient, rtol=1e-5, atol=1e-7)


def test_activation_checkpointing_does_not_enable_dropout_in_blocks():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16,
        max_position_embeddings=32, dropout=0.5,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    expected = compute_response_logprobs(model, TOKENS, 1.0)
    enable_activation_checkpointing(model)
    logprobs = TrainingModel(model, {}, 1.0)(TOKENS).logprobs
    torch.testing.assert_close(logprobs, expected)
    logprobs.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["critic=adapter"], "critic.kind: adapter needs lora"),
        (["lora=default", "model.trainable_layers=1"], "model.trainable_layers: with lora"),
        (["model.quantization=int8"], "model.quantization: only a frozen base"),
        (["model.quantization=int4", "lora=default"], "model.quantization: the critic shares the base"),
        (["model.trainable_layers=3"], "model.trainable_layers: 3 is more than the model's 2 blocks"),
        (["lora=default", "lora.target_modules=[nothing]"], "lora.target_modules: .*nothing"),
    ],
)
def test_settings_that_exclude_each_other_are_an_error_of_one_line(overrides, message, run_train):
    with pytest.raises(UserError, match=f"^{message}") as error:
        run_train(*overrides)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_lora_run_saves_the_policy_that_it_evaluated(run_train, records, tiny):
    directory = run_train(
        "lora=default", "lora.rank=3", "critic=adapter", "optimizer.lr=5e-3", "model.gradient_checkpointing=true",
        "lora.target_modules=[all-linear]",
    )  # fmt: skip
    rows = records(directory / "metrics.jsonl")
    assert abs(rows[0]["eval/kl_exact"]) < 1e-6 < rows[-1]["eval/kl_exact"]
    # Evaluating the saved folder by itself gives the same replies.
    again = run_train(f"model.path={directory / 'model'}", "iterations=0", name="again")
    replies = [row["response"] for row in records(directory / "samples.jsonl") if row["iteration"] == 3]
    assert [row["response"] for row in records(again / "samples.jsonl")] == replies
    assert (directory / "critic" / "value_adapter" / "adapter_model.safetensors").is_file()
    sizes = {file.name: file.stat().st_size for file in (directory / "checkpoints/iteration_000003").iterdir()}
    assert sizes["policy.safetensors"] < (tiny / "model.safetensors").stat().st_size / 2  # the base is not in it


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_run_on_a_quantized_base_saves_an_unquantized_model_with_the_same_logits(
    bits, tiny, make_config, run_train, records, tmp_path
):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    overrides = [f"model.path={tmp_path / 'base'}", "model.attn_implementation=eager"]
    lora = ["lora=default", "lora.rank=3", "critic=adapter", f"model.quantization={bits}", "optimizer.lr=1e-2"]
    directory = run_train(*overrides, *lora)
    rows = records(directory / "metrics.jsonl")
    assert abs(rows[0]["eval/kl_exact"]) < 1e-6 < rows[-1]["eval/kl_exact"]
    assert "quantization_config" not in json.loads((directory / "model" / "config.json").read_text())
    # The saved folder in float32 and the trained policy differ by the rounding of quantization.
    checkpoint = directory / "checkpoints" / "iteration_000003"
    run = RecordedRun.find(str(checkpoint))
    quantized = load_trained_policy(make_config(*overrides, *lora, f"run={checkpoint}"), run, torch.device("cpu"))
    expected, actual = quantized(IDS).logits.float(), load_model(directory / "model")(IDS).logits
    base = load_model(tmp_path / "base")(IDS).logits
    assert (actual - expected).abs().max() < 0.2 * (actual - base).abs().max()

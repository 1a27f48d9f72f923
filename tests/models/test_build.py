import pytest
import torch
from safetensors.torch import load_file, save_file

from moevlm.models.build import build_vlm
from tests.tiny import (
    save_tiny_decoder,
    save_tiny_vision_encoder,
    save_tiny_vlm,
    tiny_batch,
    tiny_decoder_config,
    tiny_vision_config,
    tiny_vlm,
)

MOE = {"num_experts": 2, "top_k": 2}


def test_the_same_arguments_give_the_same_weights_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    first, second, other = tiny_vlm(MOE, seed=1), tiny_vlm(MOE, seed=1), tiny_vlm(MOE, seed=2)
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.connector.layers[0].weight, other.connector.layers[0].weight)


def test_pretrained_parts_arrive_unchanged(tmp_path):
    decoder, vision = save_tiny_decoder(tmp_path / "lm", seed=5), save_tiny_vision_encoder(tmp_path / "vit", seed=6)
    vlm = build_vlm(tiny_vision_config(weights=str(vision)), "linear", str(decoder), vocab_size=259)
    expected = tiny_vlm(seed=5, vision=None).language_model.state_dict()
    for name, tensor in vlm.language_model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert vlm.training


def test_a_next_stage_keeps_the_model_settings_and_takes_the_weights(tmp_path):
    save_tiny_vlm(tmp_path, seed=3)
    vlm = tiny_vlm(seed=9, weights=str(tmp_path))
    torch.testing.assert_close(vlm(tiny_batch()).hidden_states, tiny_vlm(seed=3)(tiny_batch()).hidden_states)


def test_a_dense_folder_is_upcycled_when_asked(tmp_path):
    save_tiny_vlm(tmp_path, seed=3)
    vlm = tiny_vlm(MOE, weights=str(tmp_path))
    assert list(vlm.moe_layers) == [0, 2]
    torch.testing.assert_close(
        vlm(tiny_batch()).hidden_states, tiny_vlm(seed=3)(tiny_batch()).hidden_states, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("moe", [None, MOE, {"num_experts": [2, 2], "top_k": 2, "placement": [0, 2]}])
def test_a_sparse_folder_is_a_start_like_any_other(tmp_path, moe):
    save_tiny_vlm(tmp_path, MOE)
    assert tiny_vlm(moe, weights=str(tmp_path)).moe == tiny_vlm(MOE).moe


def test_a_sparse_folder_with_other_experts_is_refused(tmp_path):
    save_tiny_vlm(tmp_path, MOE)
    with pytest.raises(ValueError, match=r"num_experts is \[2, 2\], not \[4, 4\]; set model.moe=null"):
        tiny_vlm({"num_experts": 4, "top_k": 2}, weights=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connector": "linear"}, "connector is 'mlp2x_gelu', not 'linear'"),
        ({"vision": None}, "vision_encoder is .*, not None"),
        ({"vision": tiny_vision_config(feature_layer=-1)}, "vision_encoder.feature_layer is -2, not -1"),
        ({"language_model": tiny_decoder_config(hidden_size=64)}, "language_model.hidden_size is 32, not 64"),
        ({"language_model": tiny_decoder_config("llama")}, "language_model.model_type is 'qwen2', not 'llama'"),
    ],
)
def test_a_folder_that_contradicts_the_settings_is_refused(tmp_path, options, message):
    save_tiny_vlm(tmp_path)
    with pytest.raises(ValueError, match=f"checkpoint of another model: .*{message}"):
        tiny_vlm(weights=str(tmp_path), **options)


@pytest.mark.parametrize("moe", [None, MOE])
def test_a_folder_is_taken_as_it_stands(tmp_path, moe):
    save_tiny_vlm(tmp_path, moe, seed=3)
    vlm = build_vlm({}, None, {}, weights=str(tmp_path), seed=9)
    torch.testing.assert_close(vlm(tiny_batch()).hidden_states, tiny_vlm(moe, seed=3)(tiny_batch()).hidden_states)


def test_a_vision_encoder_without_a_connector_is_refused():
    with pytest.raises(ValueError, match=r"a vision encoder needs a connector; set model.connector"):
        build_vlm(tiny_vision_config(), None, tiny_decoder_config())


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the tokenizer has 400 ids, .* embeds only 320"):
        tiny_vlm(vocab_size=400)
    save_tiny_vlm(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer has 400 ids, .* embeds only 320"):
        tiny_vlm(vocab_size=400, weights=str(tmp_path))


@pytest.mark.parametrize(
    ("language_model", "message"),
    [
        ("./nowhere", "no folder ./nowhere; set model.language_model"),
        ({"hidden_size": 8}, "needs model_type"),
        (
            {"model_type": "qwen99"},
            r"unknown model_type 'qwen99' \(did you mean qwen.*; set model.language_model.model_type$",
        ),
    ],
)
def test_a_language_model_that_does_not_exist_is_refused(language_model, message):
    with pytest.raises(ValueError, match=message):
        tiny_vlm(language_model=language_model)


def test_a_language_model_with_a_missing_shard_is_refused(tmp_path):
    tiny_vlm(vision=None).language_model.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"no language model at .*{shard.name}; set model.language_model") as caught:
        tiny_vlm(language_model=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_language_model_that_lacks_a_weight_is_refused(tmp_path):
    tiny_vlm(vision=None).language_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold all weights of its qwen2: model.layers.1.mlp.up_proj.weight"):
        tiny_vlm(language_model=str(tmp_path))


def test_an_unknown_hub_id_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"no language model at 'nobody/nothing': .*; set model.language_model"
    ) as caught:
        tiny_vlm(language_model="nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_model_folder_is_no_language_model(tmp_path):
    save_tiny_vlm(tmp_path)
    with pytest.raises(ValueError, match=r"is a whole VLM, .* set model.weights"):
        tiny_vlm(language_model=str(tmp_path))


def test_a_decoder_with_a_shape_and_weights_is_loaded_and_compared(tmp_path):
    decoder = save_tiny_decoder(tmp_path / "lm", seed=5)
    shape = tiny_decoder_config()
    vlm = build_vlm(None, "linear", {**shape, "weights": str(decoder)})
    expected = tiny_vlm(seed=5, vision=None).language_model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vlm.language_model.state_dict().items())
    with pytest.raises(ValueError, match=r"num_hidden_layers is 4, not 5; set model\.language_model\.weights"):
        build_vlm(None, "linear", {**shape, "num_hidden_layers": 5, "weights": str(decoder)})
    assert build_vlm(None, "linear", {**shape, "weights": None}).language_model.config.num_hidden_layers == 4

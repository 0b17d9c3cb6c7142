"""Configs of every supported family, against published counts and the catalogue; and files that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servecast.model.llm import Llm
from servecast.readers.catalogues import llm
from servecast.readers.huggingface import MAX_CONFIG_BYTES, SUPPORTED_MODEL_TYPES, llm_from_config, read_config

Config = dict[str, Any]


def _config(model_type: str, layers: int, hidden: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> Config:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
        **more,
    }


def _latent(nope: int = 128, value: int = 128, query: int | None = 1536) -> Config:
    return {
        "kv_lora_rank": 512,
        "q_lora_rank": query,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": nope,
        "v_head_dim": value,
    }


def _routed(experts: int, per_token: int, width: int, first_dense: int, shared: int = 1) -> Config:
    return {
        "n_routed_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": width,
        "first_k_dense_replace": first_dense,
        "n_shared_experts": shared,
    }


FP8_BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
INT4_EXPERTS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group"}}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
}
DEEPSEEK = _config(
    "deepseek_v3", 61, 7168, 128, 128, 129280, intermediate_size=18432, max_position_embeddings=163840,
    quantization_config=FP8_BLOCK, **_latent(), **_routed(256, 8, 2048, 3),
)  # fmt: skip
KIMI = _config(
    "kimi_k2", 61, 7168, 64, 64, 163840, intermediate_size=18432, max_position_embeddings=262144,
    **_latent(), **_routed(384, 8, 2048, 1),
)  # fmt: skip
GPT_OSS_ALTERNATION = ["sliding_attention", "full_attention"] * 18
LINEAR = {
    "head_dim": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "full_attention_interval": 4, "max_position_embeddings": 262144,
}  # fmt: skip

# Origin of the dimensions: the published config.json of the model on the left.
CONFIGS: dict[str, Config] = {
    "meta-llama/Llama-3.1-8B-Instruct": _config(
        "llama", 32, 4096, 32, 8, 128256, intermediate_size=14336, max_position_embeddings=131072,
    ),
    "meta-llama/Llama-3.2-1B": _config(
        "llama", 16, 2048, 32, 8, 128256, intermediate_size=8192, max_position_embeddings=131072, head_dim=64,
        tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
    ),
    "mistralai/Mistral-7B-v0.1": _config(
        "mistral", 32, 4096, 32, 8, 32000, intermediate_size=14336, max_position_embeddings=32768, sliding_window=4096,
    ),
    "mistralai/Mistral-Nemo-Instruct-2407": _config(
        "mistral", 40, 5120, 32, 8, 131072, intermediate_size=14336, max_position_embeddings=131072, head_dim=128,
        sliding_window=None,
    ),
    "mistralai/Mixtral-8x7B-v0.1": _config(
        "mixtral", 32, 4096, 32, 8, 32000, intermediate_size=14336, max_position_embeddings=32768, sliding_window=None,
        num_local_experts=8, num_experts_per_tok=2,
    ),
    "Qwen/Qwen2.5-7B-Instruct": _config(
        "qwen2", 28, 3584, 28, 4, 152064, intermediate_size=18944, max_position_embeddings=32768,
        sliding_window=131072, use_sliding_window=False, max_window_layers=28,
    ),
    "Qwen/Qwen2-57B-A14B": _config(
        "qwen2_moe", 28, 3584, 28, 4, 151936, intermediate_size=18944, moe_intermediate_size=2560, num_experts=64,
        num_experts_per_tok=8, shared_expert_intermediate_size=20480, decoder_sparse_step=1,
        max_position_embeddings=32768,
    ),
    "Qwen/Qwen3-32B": _config(
        "qwen3", 64, 5120, 64, 8, 151936, intermediate_size=25600, head_dim=128, max_position_embeddings=40960,
    ),
    "Qwen/Qwen3-235B-A22B-FP8": _config(
        "qwen3_moe", 94, 4096, 64, 4, 151936, intermediate_size=12288, moe_intermediate_size=1536, num_experts=128,
        num_experts_per_tok=8, head_dim=128, mlp_only_layers=[], decoder_sparse_step=1, max_position_embeddings=40960,
        quantization_config={**FP8_BLOCK, "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]},
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": _config(
        "qwen3_next", 48, 2048, 16, 2, 151936, intermediate_size=5120, moe_intermediate_size=512, num_experts=512,
        num_experts_per_tok=10, shared_expert_intermediate_size=512, linear_num_value_heads=32, mlp_only_layers=[],
        **LINEAR,
    ),
    "Qwen/Qwen3.5-397B-A17B": {
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": _config(
            "qwen3_5_moe_text", 60, 4096, 32, 2, 248320, moe_intermediate_size=1024, num_experts=512,
            num_experts_per_tok=10, shared_expert_intermediate_size=1024, linear_num_value_heads=64,
            layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 15, attn_output_gate=True, **LINEAR,
        ),
    },
    "deepseek-ai/DeepSeek-R1": DEEPSEEK,
    "deepseek-ai/DeepSeek-V2-Lite": _config(
        "deepseek_v2", 27, 2048, 16, 16, 102400, intermediate_size=10944, moe_layer_freq=1,
        max_position_embeddings=163840, **_latent(query=None), **_routed(64, 6, 1408, 1, shared=2),
    ),
    "deepseek-ai/DeepSeek-V3.2": {
        **DEEPSEEK, "model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
    },
    "moonshotai/Kimi-K2.5": {
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        "text_config": {**KIMI, "quantization_config": INT4_EXPERTS},
    },
    "zai-org/GLM-4.5-Air": _config(
        "glm4_moe", 46, 4096, 96, 8, 151552, intermediate_size=10944, head_dim=128, attention_bias=True,
        max_position_embeddings=131072, **_routed(128, 8, 1408, 1),
    ),
    "zhipuai/GLM-5": _config(
        "glm_moe_dsa", 78, 6144, 64, 64, 154880, intermediate_size=12288, head_dim=64, max_position_embeddings=202752,
        **_latent(192, 256, 2048), **_routed(256, 8, 2048, 3),
    ),
    "MiniMaxAI/MiniMax-M2": _config(
        "minimax_m2", 62, 3072, 48, 8, 200064, intermediate_size=1536, head_dim=128, num_local_experts=256,
        num_experts_per_tok=8, max_position_embeddings=196608, quantization_config=FP8_BLOCK,
    ),
    "openai/gpt-oss-120b": _config(
        "gpt_oss", 36, 2880, 64, 8, 201088, intermediate_size=2880, head_dim=64, num_local_experts=128,
        experts_per_token=4, num_experts_per_tok=4, sliding_window=128, layer_types=GPT_OSS_ALTERNATION,
        attention_bias=True, max_position_embeddings=131072,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    ),
    "google/gemma-7b": _config(
        "gemma", 28, 3072, 16, 16, 256000, intermediate_size=24576, head_dim=256, max_position_embeddings=8192,
    ),
    "google/gemma-2-27b": _config(
        "gemma2", 46, 4608, 32, 16, 256000, intermediate_size=36864, head_dim=128, max_position_embeddings=8192,
        sliding_window=4096,
    ),
    "google/gemma-3-4b-it": {
        "model_type": "gemma3",  # this published file leaves out all that its config class defaults
        "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
    },
    "microsoft/phi-2": _config(
        "phi", 32, 2560, 32, 32, 51200, intermediate_size=10240, max_position_embeddings=2048, torch_dtype="float16",
    ),
    "microsoft/Phi-3-mini-4k-instruct": _config(
        "phi3", 32, 3072, 32, 32, 32064, intermediate_size=8192, max_position_embeddings=4096, sliding_window=2047,
    ),
    "microsoft/phi-4": _config(
        "phi3", 40, 5120, 40, 10, 100352, intermediate_size=17920, max_position_embeddings=16384, sliding_window=None,
    ),
    "microsoft/Phi-3.5-MoE-instruct": _config(
        "phimoe", 32, 4096, 32, 8, 32064, intermediate_size=6400, num_local_experts=16, num_experts_per_tok=2,
        attention_bias=True, max_position_embeddings=131072, sliding_window=131072,
    ),
    "facebook/opt-6.7b": {
        "model_type": "opt", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "ffn_dim": 16384,
        "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 4096, "torch_dtype": "float16",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_read_as_the_catalogue_has_it(name: str):
    # Origin: the catalogue's record, whose counts are tested against the published ones.
    read, expected = llm_from_config(CONFIGS[name], llm(name).name), llm(name)
    assert read == expected


def test_every_family_is_tried():
    tried = {c["model_type"] for c in CONFIGS.values()} | {
        c["text_config"]["model_type"] for c in CONFIGS.values() if "text_config" in c
    }
    assert set(SUPPORTED_MODEL_TYPES) - tried == {"glm4_moe_lite", "mistral3", "qwen3_5", "qwen3_5_text"}


def _llama(**changes: Any) -> Config:
    return {**CONFIGS["meta-llama/Llama-3.1-8B-Instruct"], **changes}


def _read(**changes: Any) -> Llm:
    return llm_from_config(_llama(**changes), "changed")


@pytest.mark.parametrize(
    ("quantization", "native", "expert"),
    [
        ({"quant_method": "fp8"}, "fp8", None),
        (FP8_BLOCK, "fp8_block", None),
        ({"quant_method": "fbgemm_fp8"}, "fp8", None),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4", None),
        ({"quant_method": "gptq", "bits": 4}, "int4", None),
        ({"quant_method": "gptq", "bits": 8}, "int8", None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4", None),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", None),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8", None),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, "nvfp4", None),
        ({"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}, "nvfp4", None),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
            None,
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "int"}}}},
            "int8",
            None,
        ),
        ({}, "bf16", None),
        (None, "bf16", None),
    ],
)
def test_formats_of_a_dense_checkpoint(quantization: Config | None, native: str, expert: str | None):
    model = _read(quantization_config=quantization)
    assert (model.native_format, model.expert_format) == (native, expert)


def test_attention_left_in_16_bit_narrows_the_experts_only():
    # Origin: nvidia/DeepSeek-V3-0324-NVFP4 lists every layer's attention among its excluded modules.
    excluded = [f"model.layers.{i}.self_attn*" for i in range(61)] + ["lm_head"]
    quantization = {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4", "exclude_modules": excluded}}
    model = llm_from_config({**DEEPSEEK, "quantization_config": quantization}, "nvfp4")
    assert (model.native_format, model.expert_format) == ("bf16", "nvfp4")


def test_attention_of_one_layer_left_in_16_bit_does_not():
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["model.layers.0.self_attn*"]}
    model = llm_from_config({**DEEPSEEK, "quantization_config": quantization}, "nvfp4")
    assert (model.native_format, model.expert_format) == ("nvfp4", None)


def test_windows_by_upper_layers():
    # Origin: hand. Qwen2 windows the layers from max_window_layers on.
    config = {**CONFIGS["Qwen/Qwen2.5-7B-Instruct"], "use_sliding_window": True, "max_window_layers": 20}
    model = llm_from_config({**config, "sliding_window": 4096}, "windowed")
    assert (model.window, model.windowed_layers) == (4096, 8)


def test_experts_in_every_second_layer():
    config = {**CONFIGS["Qwen/Qwen2-57B-A14B"], "decoder_sparse_step": 2, "mlp_only_layers": [1, 3]}
    model = llm_from_config(config, "sparse")
    assert (model.moe_layers, model.intermediate) == (14 - 2, 18944)  # hand


def test_a_multimodal_wrapper_without_its_inner_type():
    text = {k: v for k, v in _llama().items() if k != "model_type"}
    assert llm_from_config({"model_type": "mistral3", "text_config": text}, "m").layers == 32


def test_dense_hybrid_model():
    text = {k: v for k, v in CONFIGS["Qwen/Qwen3.5-397B-A17B"]["text_config"].items() if "expert" not in k}
    dense = {**text, "model_type": "qwen3_5_text", "intermediate_size": 12288}
    model = llm_from_config({"model_type": "qwen3_5", "text_config": dense}, "dense")
    assert (model.experts, model.linear_layers, model.intermediate) == (0, 45, 12288)


# ---- refused -----------------------------------------------------------------------------------------

REFUSED: list[tuple[Config, str]] = [
    ({}, "model_type must be one of .*llama.*, got None"),
    ({"_class_name": "StableDiffusionPipeline"}, "model_type must be one of"),
    (_llama(model_type="bert"), "model_type must be one of .*, got 'bert'"),
    (_llama(model_type="t5"), "model_type must be one of"),
    (_llama(model_type=["llama"]), "model_type must be one of"),
    (_llama(hidden_size=None), r"hidden_size must be an integer in \[1, .*\], got None"),
    (_llama(hidden_size="4096"), "hidden_size must be an integer in .*, got '4096'"),
    (_llama(hidden_size=4096.0), "hidden_size must be an integer"),
    (_llama(hidden_size=True), "hidden_size must be an integer"),
    (_llama(hidden_size=-1), "hidden_size must be an integer"),
    (_llama(num_hidden_layers=0), "num_hidden_layers must be an integer"),
    (_llama(num_hidden_layers=10**9), "num_hidden_layers must be an integer"),
    (_llama(vocab_size=10**12), "vocab_size must be an integer"),
    (_llama(vocab_size=float("nan")), "vocab_size must be an integer"),
    (_llama(num_key_value_heads=5), "num_key_value_heads must be a divisor of num_attention_heads = 32, got 5"),
    (_llama(num_attention_heads=48, num_key_value_heads=8), "num_attention_heads must be a divisor of hidden_size"),
    (_llama(head_dim="128"), "head_dim must be an integer"),
    (_llama(attention_bias=1), "attention_bias must be true or false, got 1"),
    (_llama(tie_word_embeddings="yes"), "tie_word_embeddings must be true or false"),
    (_llama(torch_dtype="float8_e4m3fn"), "torch_dtype must be one of"),
    (_llama(layer_types=["full_attention"], sliding_window=4), "layer_types must be a list of num_hidden_layers = 32"),
    (_llama(layer_types=["linear_attention"] * 32, sliding_window=4), "layer_types must be made of"),
    (_llama(sliding_window=0), "sliding_window must be an integer"),
    (_llama(quantization_config="fp8"), "quantization_config must be an object"),
    (_llama(quantization_config={"quant_method": "hqq"}), "quantization_config.quant_method must be one of .*'hqq'"),
    (_llama(quantization_config={"quant_method": "awq", "bits": 3}), "quantization_config.bits must be 4 or 8, got 3"),
    (_llama(quantization_config={"quant_method": "modelopt"}), "quantization_config.quant_algo must be one of"),
    (
        _llama(quantization_config={"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": []}}}),
        "quantization_config.config_groups must be",
    ),
    ({"model_type": "gemma3", "text_config": []}, "text_config must be an object"),
    ({"model_type": "gemma3", "text_config": {"model_type": "bert"}}, "text_config.model_type must be one of"),
    ({**DEEPSEEK, "first_k_dense_replace": None}, "first_k_dense_replace must be an integer"),
    ({**DEEPSEEK, "first_k_dense_replace": 62}, "first_k_dense_replace must be an integer"),
    ({**DEEPSEEK, "num_experts_per_tok": 257}, "num_experts_per_tok must be at most the number of experts 256"),
    ({**DEEPSEEK, "kv_lora_rank": None}, "kv_lora_rank must be an integer"),
    ({**CONFIGS["Qwen/Qwen2-57B-A14B"], "mlp_only_layers": [99]}, "mlp_only_layers must be a list of layer numbers"),
    (
        {**CONFIGS["Qwen/Qwen3-Next-80B-A3B-Instruct"], "linear_value_head_dim": 64},
        "linear_value_head_dim must be equal",
    ),
    ({**CONFIGS["facebook/opt-6.7b"], "word_embed_proj_dim": 512}, "word_embed_proj_dim must be equal to hidden_size"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_bad_config_is_refused_in_one_line(config: Config, message: str):
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        llm_from_config(config, "bad")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match="config must be a JSON object"):
        llm_from_config([1], "bad")  # type: ignore[arg-type]  # the wrong type is the test


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _params_or_complaint(config: Config) -> tuple[int, str]:
    try:
        return llm_from_config(config, "any").params_total, ""
    except ValueError as error:
        return 0, str(error)


@given(name=st.sampled_from(sorted(CONFIGS)), data=st.data())
def test_any_value_in_any_field_is_read_or_refused(name: str, data: st.DataObject):
    config = dict(CONFIGS[name])
    part = config["text_config"] = dict(config["text_config"]) if "text_config" in config else config
    part[data.draw(st.sampled_from(sorted(set(part) - {"text_config"})))] = data.draw(JSON_VALUES)
    if part is config:
        del config["text_config"]
    params, complaint = _params_or_complaint(config)
    assert params > 0 or complaint
    assert "\n" not in complaint


# ---- files -------------------------------------------------------------------------------------------


def test_read_config_from_file_and_folder(tmp_path: Path):
    folder = tmp_path / "Llama-mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_llama()))
    assert read_config(folder) == read_config(str(folder / "config.json"))
    assert read_config(folder).name == "Llama-mine"
    assert read_config(folder).params_total == 8_030_261_248  # published


def test_a_hub_snapshot_is_named_after_its_repository(tmp_path: Path):
    folder = tmp_path / "models--Qwen--Qwen3-32B" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS["Qwen/Qwen3-32B"]))
    assert read_config(folder) == llm("Qwen/Qwen3-32B")


def test_quantisation_stated_beside_the_config(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen/Qwen3-32B"]))
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    assert read_config(tmp_path).native_format == "nvfp4"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config must be valid JSON"),
        (b"{", "config must be valid JSON"),
        (b"[1]", "config must be a JSON object, got list"),
        (b'{"hidden_size": NaN}', "config must be valid JSON.*NaN"),
        (b"\xff\xfe\x00", "config must be valid JSON"),
        (b"[" * 100_000, "config must be valid JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "config must be valid JSON"),
        (b" " * (MAX_CONFIG_BYTES + 1), "config must be a file of at most 4194304 bytes"),
    ],
    ids=range(8),
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        read_config(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ValueError, match=r"config must be a config\.json or a folder with one"):
            read_config(path)

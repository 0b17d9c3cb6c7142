"""Architecture of a model from the `config.json` beside its weights.

A config states dimensions, and leaves unsaid what its `model_type` implies (Qwen2 has biases on q, k and v whatever the
file says; Gemma ties its embeddings). `_FAMILIES` holds what is implied; the rest is read from the file, each value
checked, and a `model_type` that is not listed is refused: a count that looks right for an unknown architecture would be
a guess.

Formats come from `quantization_config`. Engines keep embeddings and the output head in 16 bit, so `Llm.native_format`
names the format of the trunk and `Llm.expert_format` the one of routed experts where a checkpoint narrows these only.

Not counted, all below 0.1 % of a model: query and key norms, attention sinks, router biases, short convolutions.
Multi-token prediction heads and vision towers are not part of the language model and are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from servecast.model.llm import Llm

MAX_CONFIG_BYTES = 4 * 1024 * 1024
"""A larger `config.json` is refused; published ones have some kB. [B]"""

# Upper limits of plausible dimensions, several times the largest published ones: a unit or typing slip must not pass.
_MAX_LAYERS = 2048
_MAX_WIDTH = 1 << 20
_MAX_HEADS = 8192
_MAX_VOCABULARY = 1 << 23
_MAX_EXPERTS = 1 << 16
_MAX_CONTEXT = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What a `model_type` implies where its config is silent."""

    experts: bool = False
    latent: bool = False
    """Multi-head latent attention."""
    linear: bool = False
    """Some layers are Gated DeltaNet; queries of the others carry an output gate."""
    gated_mlp: bool = True
    tied: bool = False
    attention_bias: bool | None = None
    """None reads the config's flag."""
    mlp_bias: bool | None = None
    head_dim: int = 0
    """0 is hidden / heads."""
    full_every: int = 0
    """One layer in so many sees the whole context, the others a window or a recurrent state; 0 is no such rule."""
    window_opt_in: bool = False
    """`sliding_window` counts only with `use_sliding_window`."""
    defaults: tuple[tuple[str, int], ...] = ()
    """Values of the family's config class that published files leave out."""


_GEMMA3_DEFAULTS = (
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("vocab_size", 262208),
    ("sliding_window", 4096),
    ("max_position_embeddings", 131072),
)
_GLM5_INDEXER = (("index_n_heads", 32), ("index_head_dim", 128), ("index_topk", 2048))

_FAMILIES: dict[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family(),
    "mixtral": _Family(experts=True),
    "qwen2": _Family(attention_bias=True, window_opt_in=True),
    "qwen2_moe": _Family(attention_bias=True, window_opt_in=True, experts=True),
    "qwen3": _Family(head_dim=128, window_opt_in=True),
    "qwen3_moe": _Family(window_opt_in=True, experts=True),
    "qwen3_next": _Family(head_dim=256, experts=True, linear=True, full_every=4, window_opt_in=True),
    "qwen3_5_text": _Family(head_dim=256, linear=True, full_every=4, window_opt_in=True),
    "qwen3_5_moe_text": _Family(head_dim=256, experts=True, linear=True, full_every=4, window_opt_in=True),
    "deepseek_v2": _Family(latent=True, experts=True),
    "deepseek_v3": _Family(latent=True, experts=True),
    "deepseek_v32": _Family(latent=True, experts=True),
    "kimi_k2": _Family(latent=True, experts=True),
    "glm4_moe": _Family(experts=True),
    "glm4_moe_lite": _Family(latent=True, experts=True),
    "glm_moe_dsa": _Family(latent=True, experts=True, defaults=_GLM5_INDEXER),
    "minimax_m2": _Family(experts=True),
    "gpt_oss": _Family(experts=True, attention_bias=True, mlp_bias=True, head_dim=64, full_every=2),
    "gemma": _Family(tied=True, head_dim=256),
    "gemma2": _Family(tied=True, head_dim=256, full_every=2),
    "gemma3_text": _Family(tied=True, head_dim=256, full_every=6, defaults=_GEMMA3_DEFAULTS),
    "phi": _Family(gated_mlp=False, attention_bias=True, mlp_bias=True),
    "phi3": _Family(),
    "phimoe": _Family(experts=True),
    "opt": _Family(gated_mlp=False, tied=True, defaults=(("max_position_embeddings", 2048),)),
}

_WRAPPERS = {
    "gemma3": "gemma3_text",
    "kimi_k25": "kimi_k2",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
"""Multimodal configs that keep the language model under `text_config`, and its `model_type` where they leave it out."""

_OUTER_FIELDS = ("tie_word_embeddings", "quantization_config", "torch_dtype", "dtype")
"""Fields of a multimodal config that speak for its language model, too."""

SUPPORTED_MODEL_TYPES: tuple[str, ...] = tuple(sorted({*_FAMILIES, *_WRAPPERS}))
"""Values of `model_type` that `llm_from_config` reads."""

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32"}

_LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")


def _shown(value: object) -> str:
    """`repr` short enough for one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(field: str, rule: str, value: object) -> NoReturn:
    raise ValueError(f"{field} must be {rule}, got {_shown(value)}")


class _Fields:
    """Checked access to a config; null is absent, as in the config classes themselves."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, int]) -> None:
        self._values = {**defaults, **{name: value for name, value in values.items() if value is not None}}

    def has(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def count(self, *names: str, limit: int, default: int | None = None, least: int = 1) -> int:
        """The first of `names` that is present, an integer in [least, limit]."""
        name = next((name for name in names if name in self._values), None)
        if name is None:
            if default is None:
                _refuse(" or ".join(names), f"an integer in [{least}, {limit}]", None)
            return default
        value = self._values[name]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= limit:
            _refuse(name, f"an integer in [{least}, {limit}]", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            _refuse(name, "true or false", value)
        return value

    def layer_types(self, layers: int, linear: bool) -> list[str] | None:
        """Kind of each layer where the config lists it."""
        kinds = self._values.get("layer_types")
        if kinds is None:
            return None
        allowed = _LAYER_TYPES if linear else _LAYER_TYPES[:2]
        if not isinstance(kinds, list) or len(kinds) != layers:
            _refuse("layer_types", f"a list of num_hidden_layers = {layers} entries", kinds)
        for kind in kinds:
            if kind not in allowed:
                _refuse("layer_types", f"made of {', '.join(allowed)}", kind)
        return kinds

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        value = self._values.get(name)
        if value is not None and not isinstance(value, Mapping):
            _refuse(name, "an object", value)
        return value


# ---- parts of the architecture; each returns fields of `Llm` -----------------------------------------


def _attention(f: _Fields, family: _Family, hidden: int) -> dict[str, Any]:
    heads = f.count("num_attention_heads", limit=_MAX_HEADS)
    kv_heads = f.count("num_key_value_heads", limit=_MAX_HEADS, default=heads)
    if heads % kv_heads:
        _refuse("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads)
    if not f.has("head_dim") and not family.head_dim and hidden % heads:
        _refuse("num_attention_heads", f"a divisor of hidden_size = {hidden} where head_dim is absent", heads)
    head_dim = f.count("head_dim", limit=_MAX_WIDTH, default=family.head_dim or hidden // heads)
    bias = f.flag("attention_bias", False) if family.attention_bias is None else family.attention_bias
    gate = {"query_gate": f.flag("attn_output_gate", True)} if family.linear else {}
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "attention_bias": bias, **gate}


def _latent_attention(f: _Fields) -> dict[str, Any]:
    """Multi-head latent attention; `head_dim` is the query's, its two parts together."""
    heads = f.count("num_attention_heads", limit=_MAX_HEADS)
    nope = f.count("qk_nope_head_dim", limit=_MAX_WIDTH)
    rope = f.count("qk_rope_head_dim", limit=_MAX_WIDTH)
    part: dict[str, Any] = {
        "heads": heads,
        "kv_heads": heads,
        "head_dim": nope + rope,
        "kv_rank": f.count("kv_lora_rank", limit=_MAX_WIDTH),
        "q_rank": f.count("q_lora_rank", limit=_MAX_WIDTH, default=0),
        "nope_dim": nope,
        "rope_dim": rope,
        "value_dim": f.count("v_head_dim", limit=_MAX_WIDTH),
    }
    if f.has("index_topk"):
        part["index_heads"] = f.count("index_n_heads", limit=_MAX_HEADS)
        part["index_dim"] = f.count("index_head_dim", limit=_MAX_WIDTH)
        part["index_topk"] = f.count("index_topk", limit=_MAX_CONTEXT)
    return part


def _expert_layers(f: _Fields, layers: int) -> int:
    """Layers whose MLP is a mixture of experts."""
    # DeepSeek-style configs always state the first; without it the count would be silently wrong.
    first = f.count("first_k_dense_replace", limit=layers, least=0, default=None if f.has("n_routed_experts") else 0)
    every = f.count("moe_layer_freq", limit=layers, default=1)
    step = f.count("decoder_sparse_step", limit=layers, default=1)
    listed = f.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(isinstance(i, int) and 0 <= i < layers for i in listed):
        _refuse("mlp_only_layers", f"a list of layer numbers below {layers}", listed)
    dense = set(listed)
    return sum(i >= first and i % every == 0 and (i + 1) % step == 0 and i not in dense for i in range(layers))


def _experts(f: _Fields, layers: int) -> dict[str, Any]:
    experts = f.count("num_experts", "n_routed_experts", "num_local_experts", limit=_MAX_EXPERTS)
    per_token = f.count("num_experts_per_tok", "experts_per_token", limit=_MAX_EXPERTS)
    if per_token > experts:
        _refuse("num_experts_per_tok", f"at most the number of experts {experts}", per_token)
    width = f.count("moe_intermediate_size", "intermediate_size", limit=_MAX_WIDTH)
    shared = f.count("n_shared_experts", limit=_MAX_EXPERTS, least=0, default=0) * width
    shared_fields = ("shared_expert_intermediate_size", "shared_intermediate_size")
    moe_layers = _expert_layers(f, layers)
    return {
        "intermediate": f.count("intermediate_size", limit=_MAX_WIDTH) if moe_layers < layers else 0,
        "experts": experts,
        "experts_per_token": per_token,
        "expert_intermediate": width,
        "shared_intermediate": f.count(*shared_fields, limit=_MAX_WIDTH, least=0, default=shared),
        "moe_layers": moe_layers,
    }


def _linear_layers(f: _Fields, family: _Family, layers: int) -> dict[str, Any]:
    """Layers with a recurrent state (Gated DeltaNet)."""
    kinds = f.layer_types(layers, linear=True)
    interval = f.count("full_attention_interval", limit=layers, default=family.full_every)
    head_dim = f.count("linear_key_head_dim", limit=_MAX_WIDTH)
    value_dim = f.count("linear_value_head_dim", limit=_MAX_WIDTH)
    if value_dim != head_dim:
        _refuse("linear_value_head_dim", f"equal to linear_key_head_dim = {head_dim}", value_dim)
    return {
        "linear_layers": layers - layers // interval if kinds is None else kinds.count("linear_attention"),
        "linear_key_heads": f.count("linear_num_key_heads", limit=_MAX_HEADS),
        "linear_value_heads": f.count("linear_num_value_heads", limit=_MAX_HEADS),
        "linear_head_dim": head_dim,
    }


def _windows(f: _Fields, family: _Family, layers: int, max_context: int) -> dict[str, Any]:
    """Layers that see a window only; a window as long as the trained context never binds and is left out."""
    if not f.has("sliding_window") or not f.flag("use_sliding_window", not family.window_opt_in):
        return {}
    window = f.count("sliding_window", limit=_MAX_CONTEXT)
    kinds = f.layer_types(layers, linear=family.linear)
    full_every = f.count("sliding_window_pattern", limit=_MAX_LAYERS, default=family.full_every or _MAX_LAYERS + 1)
    if kinds is not None:
        windowed = kinds.count("sliding_attention")
    elif family.window_opt_in:
        windowed = layers - min(layers, f.count("max_window_layers", limit=_MAX_LAYERS, least=0))
    else:
        windowed = layers - layers // full_every
    return {"window": window, "windowed_layers": windowed} if windowed and window < (max_context or window + 1) else {}


def _opt(f: _Fields) -> dict[str, Any]:
    """OPT: its own field names, learned positions with two rows of offset, biases everywhere."""
    layers = f.count("num_hidden_layers", limit=_MAX_LAYERS)
    hidden = f.count("hidden_size", limit=_MAX_WIDTH)
    projected = f.count("word_embed_proj_dim", limit=_MAX_WIDTH, default=hidden)
    if projected != hidden:
        _refuse("word_embed_proj_dim", f"equal to hidden_size = {hidden}", projected)
    heads = f.count("num_attention_heads", limit=_MAX_HEADS)
    if hidden % heads:
        _refuse("num_attention_heads", f"a divisor of hidden_size = {hidden}", heads)
    context = f.count("max_position_embeddings", limit=_MAX_CONTEXT)
    bias = f.flag("enable_bias", True)
    return {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "vocabulary": f.count("vocab_size", limit=_MAX_VOCABULARY),
        "intermediate": f.count("ffn_dim", limit=_MAX_WIDTH),
        "attention_bias": bias,
        "mlp_bias": bias,
        "position_embeddings": context + 2,
        "max_context": context,
    }


def _decoder(f: _Fields, family: _Family) -> dict[str, Any]:
    layers = f.count("num_hidden_layers", limit=_MAX_LAYERS)
    hidden = f.count("hidden_size", limit=_MAX_WIDTH)
    max_context = f.count("max_position_embeddings", limit=_MAX_CONTEXT, default=0)
    mlp = _experts(f, layers) if family.experts else {"intermediate": f.count("intermediate_size", limit=_MAX_WIDTH)}
    return {
        "layers": layers,
        "hidden": hidden,
        "vocabulary": f.count("vocab_size", limit=_MAX_VOCABULARY),
        "mlp_bias": f.flag("mlp_bias", False) if family.mlp_bias is None else family.mlp_bias,
        "max_context": max_context,
        **mlp,
        **(_latent_attention(f) if family.latent else _attention(f, family, hidden)),
        **(_linear_layers(f, family, layers) if family.linear else {}),
        **_windows(f, family, layers, max_context),
    }


# ---- number formats ----------------------------------------------------------------------------------


def _group_format(weights: object, packing: str) -> str:
    """Format of one `config_groups` entry of compressed-tensors."""
    if not isinstance(weights, Mapping):
        _refuse("quantization_config.config_groups", "groups that describe their weights", weights)
    narrow = {
        "int4": "int4",
        "int8": "int8",
        "float8": "fp8_block" if weights.get("strategy") == "block" else "fp8",
        "float4": "mxfp4" if "mxfp4" in packing or weights.get("group_size") == 32 else "nvfp4",
    }
    kind = f"{weights.get('type', 'int')}{weights.get('num_bits')}"
    if kind not in narrow:
        _refuse("quantization_config.config_groups", "int or float weights of 4 or 8 bits", kind)
    return narrow[kind]


def _groups_format(quantization: Mapping[str, Any]) -> str:
    groups = quantization.get("config_groups")
    entries = list(groups.values()) if isinstance(groups, Mapping) else []
    packing = str(quantization.get("format", ""))
    formats = {_group_format(e.get("weights") if isinstance(e, Mapping) else e, packing) for e in entries}
    if len(formats) != 1:
        _refuse("quantization_config.config_groups", "groups of one weight format", sorted(formats))
    return formats.pop()


_MODELOPT = {
    "NVFP4": "nvfp4",
    "FP8": "fp8",
    "FP8_PB_WO": "fp8_block",
    "MXFP4": "mxfp4",
    "INT4_AWQ": "int4",
    "W4A16_AWQ": "int4",
    "W4A8_AWQ": "int4",
    "INT8_SQ": "int8",
    "W8A8_SQ_PER_CHANNEL": "int8",
}


def _modelopt_format(quantization: Mapping[str, Any]) -> str:
    nested = quantization.get("quantization")
    algorithm = quantization.get("quant_algo") or (nested.get("quant_algo") if isinstance(nested, Mapping) else None)
    if algorithm is None and "config_groups" in quantization:
        return _groups_format(quantization)
    if str(algorithm).upper() not in _MODELOPT:
        _refuse("quantization_config.quant_algo", f"one of {', '.join(_MODELOPT)}", algorithm)
    return _MODELOPT[str(algorithm).upper()]


def _bits_format(quantization: Mapping[str, Any]) -> str:
    bits = quantization.get("bits", quantization.get("w_bit", 4))
    if bits not in (4, 8):
        _refuse("quantization_config.bits", "4 or 8", bits)
    return "int4" if bits == 4 else "int8"


def _weight_format(quantization: Mapping[str, Any]) -> str:
    """Narrow format that a `quantization_config` names."""
    method = str(quantization.get("quant_method", "modelopt" if "quant_algo" in quantization else None)).lower()
    if method in {"fp8", "fbgemm_fp8"}:
        return "fp8_block" if quantization.get("weight_block_size") else "fp8"
    if method == "mxfp4":
        return "mxfp4"
    if method in {"awq", "gptq"}:
        return _bits_format(quantization)
    if method == "bitsandbytes":
        return "int4" if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit") else "int8"
    if method == "compressed-tensors":
        return _groups_format(quantization)
    if method.startswith("modelopt"):
        return _modelopt_format(quantization)
    known = "fp8, fbgemm_fp8, mxfp4, awq, gptq, bitsandbytes, compressed-tensors, modelopt"
    _refuse("quantization_config.quant_method", f"one of {known}", quantization.get("quant_method"))


def _attention_is_spared(quantization: Mapping[str, Any], layers: int) -> bool:
    """Whether the list of unconverted modules keeps the attention of most layers in 16 bit."""
    nested = quantization.get("quantization")
    sources = (quantization, nested) if isinstance(nested, Mapping) else (quantization,)
    names = ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers")
    lists = [source[name] for source in sources for name in names if isinstance(source.get(name), list)]
    # Only whole attention blocks or their output projection count; checkpoints also list single norms and indexers.
    spared = [m for listed in lists for m in listed if isinstance(m, str) and re.search(r"self_attn(\W*$|\.o_proj)", m)]
    return any(not re.search(r"layers\.\d", m) for m in spared) or 2 * len(set(spared)) >= layers


def _formats(f: _Fields, family: _Family, layers: int) -> dict[str, Any]:
    dtype = f.get("torch_dtype") or f.get("dtype") or "bfloat16"
    native = _DTYPES.get(str(dtype).removeprefix("torch."))
    if native is None:
        _refuse("torch_dtype", f"one of {', '.join(_DTYPES)}", dtype)
    quantization = f.mapping("quantization_config")
    if not quantization:
        return {"native_format": native}
    narrow = _weight_format(quantization)
    # The mxfp4 method converts nothing but routed experts, listed or not.
    if family.experts and (quantization.get("quant_method") == "mxfp4" or _attention_is_spared(quantization, layers)):
        return {"native_format": native, "expert_format": narrow}
    return {"native_format": narrow}


# ---- public ------------------------------------------------------------------------------------------


def _language_model(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The part of a config that describes the language model, and its `model_type`."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in SUPPORTED_MODEL_TYPES:
        _refuse("model_type", f"one of {', '.join(SUPPORTED_MODEL_TYPES)}", model_type)
    if model_type not in _WRAPPERS:
        return config, model_type
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        _refuse("text_config", "an object", text)
    inner = _WRAPPERS[model_type] if text is config else text.get("model_type", _WRAPPERS[model_type])
    if not isinstance(inner, str) or inner not in _FAMILIES:
        _refuse("text_config.model_type", f"one of {', '.join(sorted(_FAMILIES))}", inner)
    return {**{name: config[name] for name in _OUTER_FIELDS if name in config}, **text}, inner


def llm_from_config(config: Mapping[str, Any], name: str) -> Llm:
    """Architecture that a parsed `config.json` describes.

    Parameters
    ----------
    config : the parsed file; multimodal ones are read for their language model only.
    name : what to call the model, usually its repository.

    Raises
    ------
    ValueError
        With one line naming the field, the rule and the value, for a family that is not in `SUPPORTED_MODEL_TYPES` and
        for a field that is missing, of the wrong type or out of range.

    >>> sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    >>> llm = llm_from_config({"model_type": "llama", "intermediate_size": 14336, "vocab_size": 128256} | sizes, "mine")
    >>> llm.params_total
    8030261248
    """
    if not isinstance(config, Mapping):
        _refuse("config", "a JSON object", config)
    text, model_type = _language_model(config)
    family = _FAMILIES[model_type]
    f = _Fields(text, dict(family.defaults))
    parts = _opt(f) if model_type == "opt" else _decoder(f, family)
    tied = f.flag("tie_word_embeddings", family.tied)
    formats = _formats(f, family, parts["layers"])
    return Llm(name=name, gated_mlp=family.gated_mlp, tied_embeddings=tied, **parts, **formats)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _parse(path: Path) -> dict[str, Any]:
    """JSON object in a file of bounded size."""
    if not path.is_file():
        raise ValueError(f"config must be a config.json or a folder with one, got {str(path)!r}")
    with path.open("rb") as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    if len(raw) > MAX_CONFIG_BYTES:
        raise ValueError(
            f"config must be a file of at most {MAX_CONFIG_BYTES} bytes, got a larger one in {str(path)!r}"
        )
    try:
        document = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"config must be valid JSON, got {str(path)!r}: {problem}") from error
    if not isinstance(document, dict):
        raise ValueError(f"config must be a JSON object, got {type(document).__name__} in {str(path)!r}")
    return document


def _name(file: Path, config: Mapping[str, Any]) -> str:
    """Name of a model by where its config lies: the folder, or the repository of a hub cache's snapshot."""
    if file.name != "config.json":
        return file.stem
    folder = file.absolute().parent  # not resolved: a hub cache links to files named by their hash
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return folder.name or str(config.get("_name_or_path") or "model")


def read_config(path: str | PathLike[str]) -> Llm:
    """Architecture in a `config.json`, or in a folder with one; the model is named after the folder.

    A `hf_quant_config.json` beside it supplies the number format where `config.json` states none.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    config = _parse(file)
    beside = file.with_name("hf_quant_config.json")
    if not config.get("quantization_config") and beside.is_file():
        config["quantization_config"] = {"quant_method": "modelopt", **_parse(beside)}
    return llm_from_config(config, _name(file, config))

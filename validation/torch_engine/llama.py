"""Decoder of the Llama architecture on a slot cache, and its Hugging Face folder.

RMS norm, rotary embedding (halves rotated together, as Hugging Face stores them), grouped-query attention, SwiGLU, no
biases. A pass takes a flat list of tokens: linear layers see all rows at once, attention is done for the decoding
sequences together and for each prompt chunk by itself. Query heads of one KV head are stacked along the query axis, so
that no KV head is ever repeated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Names as in a Hugging Face config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `end` of the prompt in `slot`."""

    slot: int
    start: int
    end: int


class SlotCache:
    """Keys and values, [layers, slots, kv heads, positions, head size]; a sequence lives in one slot."""

    def __init__(self, shape: LlamaShape, slots: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (shape.num_hidden_layers, slots, shape.num_key_value_heads, length, shape.head_dim)
        self.keys = torch.zeros(size, dtype=dtype, device=device)
        self.values = torch.zeros(size, dtype=dtype, device=device)
        self.slots, self.length = slots, length

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Exchange the first `tokens` positions of two slots."""
        for store in (self.keys, self.values):
            held = store[:, one, :, :tokens].clone()
            store[:, one, :, :tokens] = store[:, other, :, :tokens]
            store[:, other, :, :tokens] = held

    def move(self, source: int, target: int, tokens: int) -> None:
        """The first `tokens` positions of one slot into another, whose own are not needed any more."""
        for store in (self.keys, self.values):
            store[:, target, :, :tokens] = store[:, source, :, :tokens]


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        hidden = shape.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [.., heads, size], keys and values [.., kv heads, size] of rows [.., hidden], rotated."""
        lead = x.shape[:-1]
        q = self.q_proj(x).view(*lead, self.heads, self.head_dim)
        k = self.k_proj(x).view(*lead, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(*lead, self.kv_heads, self.head_dim)
        return _rotated(q, cos, sin), _rotated(k, cos, sin), v

    def stacked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention of q [b, n, heads, size] over k, v [b, kv heads, m, size] where mask [b, n, m]; [b, n, hidden]."""
        b, n = q.shape[:2]
        group = self.heads // self.kv_heads
        q = q.view(b, n, self.kv_heads, group, self.head_dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(b, self.kv_heads, group * n, self.head_dim)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, group, 1).unsqueeze(1))
        out = out.view(b, self.kv_heads, group, n, self.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(b, n, self.heads * self.head_dim)


class Mlp(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape)


class Llama(nn.Module):
    """Parameters are named as Hugging Face names them, without the prefix ``model.``."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        if not shape.tie_word_embeddings:
            self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        angle = torch.outer(torch.arange(shape.max_position_embeddings, dtype=torch.float64), shape.rope_theta**-half)
        angle = torch.cat([angle, angle], dim=-1)
        self.register_buffer("cos", angle.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angle.sin().to(torch.get_default_dtype()), persistent=False)

    @torch.no_grad()
    def scores(self, hidden: Tensor) -> Tensor:
        """`logits` for serving."""
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token for normed rows."""
        weight = self.embed_tokens.weight if self.shape.tie_word_embeddings else self.lm_head.weight
        return functional.linear(hidden, weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of whole sequences [batch, length] without a cache: training, and the slow form for tests."""
        length = tokens.shape[1]
        cos, sin = self._angles(torch.arange(length, device=tokens.device))
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril().unsqueeze(0)
        x = self.embed_tokens(tokens)
        for layer in self._layers():
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
            attended = layer.self_attn.stacked(q, k.transpose(1, 2), v.transpose(1, 2), mask)
            x = x + layer.self_attn.o_proj(attended)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.logits(self.norm(x))

    @torch.inference_mode()
    def step(
        self,
        cache: SlotCache,
        decode: Tensor,
        cached: Tensor,
        chunks: Sequence[Chunk] = (),
        prompts: Tensor | None = None,
    ) -> Tensor:
        """Normed hidden rows of one engine step, decode rows first. [rows, hidden]

        Parameters
        ----------
        decode : tokens of the sequences in slots 0, 1, ..., [sequences, n]; they follow what is cached.
        cached : tokens cached in those slots. [sequences]
        chunks : prompt parts, computed after the decode rows in their order.
        prompts : tokens of the chunks one after another.
        """
        width = decode.shape[1] if decode.numel() else 0
        rows, slots, positions = self._places(decode, cached, chunks, prompts)
        cos, sin = self._angles(positions)
        mask, reach = _decode_mask(cached, width) if width else (None, 0)
        x = self.embed_tokens(rows)
        for number, layer in enumerate(self._layers()):
            keys, values = cache.keys[number], cache.values[number]
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
            keys[slots, :, positions], values[slots, :, positions] = k, v
            attended = []
            count = decode.shape[0]
            if mask is not None:
                grouped = q[: count * width].view(count, width, *q.shape[1:])
                out = layer.self_attn.stacked(grouped, keys[:count, :, :reach], values[:count, :, :reach], mask)
                attended.append(out.flatten(0, 1))
            attended += _chunk_attention(layer.self_attn, q[count * width :], keys, values, chunks)
            x = x + layer.self_attn.o_proj(torch.cat(attended) if len(attended) > 1 else attended[0])
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return cast(Tensor, self.norm(x))

    def _places(
        self, decode: Tensor, cached: Tensor, chunks: Sequence[Chunk], prompts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token, slot and position of every row."""
        count, device = decode.shape[0], cached.device
        width = decode.shape[1] if decode.numel() else 0
        tokens = [decode.reshape(-1)] if width else []
        slots = [torch.arange(count, device=device).repeat_interleave(width)] if width else []
        positions = [(cached.unsqueeze(1) + torch.arange(width, device=device)).reshape(-1)] if width else []
        if prompts is not None and chunks:
            tokens.append(prompts)
            sizes = [chunk.end - chunk.start for chunk in chunks]
            numbers = torch.tensor([chunk.slot for chunk in chunks], device=device)
            slots.append(numbers.repeat_interleave(torch.tensor(sizes, device=device)))
            positions += [torch.arange(chunk.start, chunk.end, device=device) for chunk in chunks]
        return torch.cat(tokens), torch.cat(slots), torch.cat(positions)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cast(Tensor, self.cos), cast(Tensor, self.sin)
        return cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)

    def _layers(self) -> list[Layer]:
        return cast("list[Layer]", list(self.layers))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def _decode_mask(cached: Tensor, width: int) -> tuple[Tensor, int]:
    """What each of the `width` new rows of a sequence may see, [sequences, width, reach], and the longest reach."""
    reach = int(cached.max()) + width
    last = cached.unsqueeze(1) + torch.arange(width, device=cached.device)
    return torch.arange(reach, device=cached.device) <= last.unsqueeze(-1), reach


def _chunk_attention(
    attention: Attention, q: Tensor, keys: Tensor, values: Tensor, chunks: Sequence[Chunk]
) -> list[Tensor]:
    out, at = [], 0
    for chunk in chunks:
        size = chunk.end - chunk.start
        seen = torch.arange(chunk.end, device=q.device)
        mask = seen <= torch.arange(chunk.start, chunk.end, device=q.device).unsqueeze(-1)
        k, v = (store[chunk.slot, :, : chunk.end].unsqueeze(0) for store in (keys, values))
        out.append(attention.stacked(q[at : at + size].unsqueeze(0), k, v, mask.unsqueeze(0))[0])
        at += size
    return out


def save(model: Llama, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Weights and config.json as Hugging Face's LlamaForCausalLM reads them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name if name.startswith("lm_head") else f"model.{name}": value.detach().to(dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(state, str(folder / WEIGHTS), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": model.shape.head_dim,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 0,
        "eos_token_id": 1,
        **asdict(model.shape),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llama:
    """A Llama checkpoint folder: one safetensors file and its config.

    Raises
    ------
    ValueError : not a Llama of this form, or a file is missing or damaged; one line.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    shape = read_shape(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder}: must hold {WEIGHTS}")
    try:
        state = load_file(str(path), device=device)
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a safetensors file ({error})") from None
    model = Llama(shape)
    try:
        model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    except RuntimeError as error:
        raise ValueError(f"{path}: does not fit {CONFIG}: {' '.join(str(error).split())[:200]}") from None
    return model.to(device=device, dtype=dtype).eval()


def read_shape(folder: Path) -> LlamaShape:
    """Shape from a config.json; a field that would change the arithmetic and is not known here is refused."""
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type must be llama")
    if config.get("rope_scaling") or config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"{path}: rope_scaling and biases must be absent")
    known = {name: config[name] for name in LlamaShape.__dataclass_fields__ if name in config}
    try:
        return LlamaShape(**known)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None

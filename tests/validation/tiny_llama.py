"""Small random Llamas in double precision, so that no two scores are ever equal by rounding."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the PyTorch engine needs torch (extra live)")

from servecast.validation.torch_engine.llama import Llama, LlamaShape  # noqa: E402 (after the check for torch)

TARGET = LlamaShape(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=31,
    max_position_embeddings=256,
)


def tiny(seed: int = 0, **changes: Any) -> Llama:
    """A model whose weights are large enough that its greedy text is no constant."""
    from dataclasses import replace

    torch.manual_seed(seed)
    model = Llama(replace(TARGET, **changes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.35)
    return model


def plain_greedy(model: Llama, prompt: list[int], count: int) -> list[int]:
    """The slow obvious form: the whole sequence again for every token, no cache."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            scores = model(torch.tensor([tokens]))[0, -1]
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :]

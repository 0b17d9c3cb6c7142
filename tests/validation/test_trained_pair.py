"""Training and growth. Truth: the core itself, and the files as their own readers see them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_llama import TARGET, tiny, torch

pytest.importorskip("safetensors", reason="needs safetensors (extra live)")
pytest.importorskip("tokenizers", reason="needs tokenizers (extra live)")

from servecast.validation.torch_engine import llama, trained_pair

TINY = trained_pair.Recipe(
    name="tiny",
    core=replace(TARGET, vocab_size=300),
    draft=replace(TARGET, vocab_size=300, num_hidden_layers=1),
    layers=3,
    intermediate_size=96,
    steps=3,
    sequence=32,
    batch=2,
    files=60,
)


def test_growth_keeps_the_function() -> None:
    core = tiny().float()
    large = trained_pair.grown(core, layers=5, intermediate_size=160, seed=4)
    tokens = torch.randint(0, 31, (2, 20))
    with torch.no_grad():
        assert torch.allclose(core(tokens), large(tokens), rtol=1e-4, atol=1e-4)
    assert sum(one.numel() for one in large.parameters()) > 2 * sum(one.numel() for one in core.parameters())


def test_growth_does_not_shrink() -> None:
    with pytest.raises(ValueError, match="must not be below"):
        trained_pair.grown(tiny(), layers=1, intermediate_size=64, seed=0)


def test_a_pair_is_made_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVECAST_CACHE", str(tmp_path))
    seen: list[int] = []
    pair = trained_pair.trained_pair(TINY, progress=lambda done, _: seen.append(done))
    assert seen == [1, 2, 3]
    again = trained_pair.trained_pair(TINY, progress=lambda done, _: seen.append(done))
    assert (again, seen) == (pair, [1, 2, 3])
    target, draft = trained_pair.load_pair(pair)
    assert (target.shape.num_hidden_layers, draft.shape.num_hidden_layers) == (3, 1)
    config = json.loads((pair.target / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    parts = [pair.tokens(name) for name in ("calibration", "validation")]
    assert all(max(part) < 300 for part in parts)
    assert parts[0][:192] != parts[1][:192]


def test_a_model_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    model = tiny(3).float()
    llama.save(model, tmp_path)
    back = llama.load(tmp_path)
    tokens = torch.randint(0, 31, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens), back(tokens))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gpt2"}, "model_type must be llama"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"hidden_size": 96}, "does not fit config.json"),
    ],
)
def test_another_architecture_is_refused_in_one_line(tmp_path: Path, change: dict[str, object], word: str) -> None:
    llama.save(tiny().float(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=word) as error:
        llama.load(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    llama.save(tiny().float(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        llama.load(tmp_path)

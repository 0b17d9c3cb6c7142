"""A target and a draft model with real agreement, trained in minutes from text that every Python installation has.

Text: the standard library's own sources, split by file into a training part and a held-out one. The held-out text is
dealt in pieces to calibration and validation, so that the two are different texts of one kind, as a service's traffic
of yesterday and of today. A byte-level BPE is learnt on the training part. The target's core is trained on next
tokens, the draft on next tokens and on the core's distribution in the same loop. The target then grows to a size whose
steps are worth forecasting without a change of its output: further layers whose output projections are 0, a wider MLP
whose new columns are 0. It pays the full price of its size, and agrees with its draft as the core did.

Steps are counted, not timed, so that a seed and a recipe give the same pair on the same machine and library; it is
cached by what went into it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from servecast.validation.torch_engine.llama import Llama, LlamaShape, load, save
from servecast.validation.torch_engine.threads import threads

Report = Callable[[int, int], None]
VERSION = 2
"""Of the recipe; part of the cache's key."""
PIECE = 192
"""Tokens that go to one part at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Sizes and length of training."""

    name: str
    core: LlamaShape
    draft: LlamaShape
    layers: int
    """Of the grown target."""
    intermediate_size: int
    """Of the grown target."""
    steps: int
    sequence: int = 128
    batch: int = 12
    files: int = 560
    seed: int = 1


_CORE = LlamaShape(
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=1024,
)
_DRAFT = replace(
    _CORE,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=1,
    num_attention_heads=4,
)
RECIPES = {
    "full": Recipe(name="full", core=_CORE, draft=_DRAFT, layers=12, intermediate_size=3072, steps=450),
    "quick": Recipe(
        name="quick",
        core=replace(
            _CORE,
            num_hidden_layers=2,
            hidden_size=192,
            intermediate_size=512,
            num_attention_heads=3,
            num_key_value_heads=1,
        ),
        draft=replace(_DRAFT, hidden_size=128, intermediate_size=384, num_attention_heads=2, num_key_value_heads=1),
        layers=10,
        intermediate_size=3072,
        steps=220,
        files=250,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPair:
    """Two Hugging Face folders, a tokenizer in each, and token ids of texts that no training has seen."""

    folder: Path

    @property
    def target(self) -> Path:
        return self.folder / "target"

    @property
    def draft(self) -> Path:
        return self.folder / "draft"

    def tokens(self, part: str) -> list[int]:
        """Token ids of one part, ``calibration`` or ``validation``."""
        found: list[int] = json.loads((self.folder / f"{part}.json").read_text(encoding="utf-8"))
        return found

    def facts(self) -> dict[str, float]:
        """Training's own record: cross-entropies and agreement on text that was not trained on."""
        found: dict[str, float] = json.loads((self.folder / "facts.json").read_text(encoding="utf-8"))
        return found


def cache_folder() -> Path:
    """``SERVECAST_CACHE``, else the user's cache folder."""
    given = os.environ.get("SERVECAST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "servecast"


def trained_pair(recipe: Recipe, *, progress: Report | None = None) -> TrainedPair:
    """The cached pair of a recipe, made first where it is not there.

    Raises
    ------
    ValueError : this Python has no standard library sources to learn from.
    """
    key = hashlib.sha256(
        json.dumps([VERSION, asdict(recipe), torch.__version__, sysconfig.get_python_version()]).encode()
    ).hexdigest()[:16]
    folder = cache_folder() / f"pair-{recipe.name}-{key}"
    if not folder.is_dir():
        # made beside its place: a half-made pair is never found
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with threads():
                _make(recipe, partial, progress)
            if not folder.is_dir():
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return TrainedPair(folder=folder)


def library_files(limit: int) -> list[Path]:
    """Sources of the running Python's standard library, tests and generated tables aside, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__", "encodings"}
    found = [
        path
        for path in sorted(root.rglob("*.py"))
        if not skipped & set(path.relative_to(root).parts) and 2_000 < path.stat().st_size < 200_000
    ]
    if len(found) < 60:
        raise ValueError(
            f"the standard library must hold at least 60 sources to learn from, got {len(found)} in {root}"
        )
    return found[:limit]


def _make(recipe: Recipe, folder: Path, progress: Report | None) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    files = library_files(recipe.files)
    random.Random(recipe.seed).shuffle(files)  # noqa: S311 (a split of texts, not a secret)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    held = max(len(texts) // 5, 16)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.core.vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[held:], trainer)

    def encoded(sources: list[str]) -> list[int]:
        return [token for one in tokenizer.encode_batch(sources) for token in [0, *one.ids]]

    core, draft, facts = _train(recipe, torch.tensor(encoded(texts[held:])), progress)
    parts = _dealt(encoded(texts[:held]))
    facts |= _agreement(core, draft, torch.tensor(parts["calibration"][: 64 * recipe.sequence]))
    target = grown(core, layers=recipe.layers, intermediate_size=recipe.intermediate_size, seed=recipe.seed)
    for name, model in (("target", target), ("draft", draft)):
        save(model, folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
        (folder / name / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}) + "\n"
        )
    for name, tokens in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(tokens))
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


def _dealt(tokens: list[int]) -> dict[str, list[int]]:
    """Pieces of the held-out text by turns to calibration and validation."""
    pieces = [tokens[at : at + PIECE] for at in range(0, len(tokens) - PIECE, PIECE)]
    return {
        name: [token for piece in pieces[first::2] for token in piece]
        for first, name in enumerate(("calibration", "validation"))
    }


def _train(recipe: Recipe, data: Tensor, progress: Report | None) -> tuple[Llama, Llama, dict[str, float]]:
    torch.manual_seed(recipe.seed)
    core, draft = _fresh(recipe.core), _fresh(recipe.draft)
    rng = torch.Generator().manual_seed(recipe.seed)
    parameters = [*core.parameters(), *draft.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    warm, steps = max(recipe.steps // 20, 1), recipe.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda at: min((at + 1) / warm, 1.0) * (0.05 + 0.95 * max(1.0 - at / steps, 0.0))
    )
    target_loss = draft_loss = torch.zeros(())
    for at in range(steps):
        start = torch.randint(len(data) - recipe.sequence - 1, (recipe.batch,), generator=rng)
        rows = torch.stack([data[one : one + recipe.sequence + 1] for one in start.tolist()])
        inputs, wanted = rows[:, :-1], rows[:, 1:].reshape(-1)
        of_target, of_draft = core(inputs).flatten(0, 1), draft(inputs).flatten(0, 1)
        target_loss = functional.cross_entropy(of_target, wanted)
        draft_loss = functional.cross_entropy(of_draft, wanted)
        distilled = functional.kl_div(
            of_draft.log_softmax(-1), of_target.detach().log_softmax(-1), log_target=True, reduction="batchmean"
        )
        optimiser.zero_grad(set_to_none=True)
        loss = target_loss + 0.3 * draft_loss + distilled * at / steps
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(at + 1, steps)
    facts = {
        "train_cross_entropy_target": target_loss.detach().item(),
        "train_cross_entropy_draft": draft_loss.detach().item(),
    }
    return core.eval(), draft.eval(), facts


def _fresh(shape: LlamaShape) -> Llama:
    model = Llama(shape)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            torch.nn.init.normal_(parameter, std=scale)
    return model


@torch.inference_mode()
def _agreement(core: Llama, draft: Llama, tokens: Tensor) -> dict[str, float]:
    """Teacher-forced agreement on unseen text: share of equal argmaxes, and mean sum of min(p, q)."""
    rows = tokens[: len(tokens) // 128 * 128].view(-1, 128)
    p, q = core(rows).softmax(-1), draft(rows).softmax(-1)
    return {
        "argmax_agreement": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
        "overlap": float(torch.minimum(p, q).sum(-1).mean()),
        "rows": float(rows.numel()),
    }


def grown(core: Llama, *, layers: int, intermediate_size: int, seed: int) -> Llama:
    """The same function in a larger model: new layers and MLP columns whose outputs are multiplied by 0."""
    old = core.shape
    if layers < old.num_hidden_layers or intermediate_size < old.intermediate_size:
        raise ValueError(
            f"layers and intermediate_size must not be below the core's, got {layers}, {intermediate_size}"
        )
    torch.manual_seed(seed)
    large = _fresh(replace(old, num_hidden_layers=layers, intermediate_size=intermediate_size))
    state, width = large.state_dict(), old.intermediate_size
    for name, value in core.state_dict().items():
        if ".mlp.down_proj" in name:
            state[name].zero_()
            state[name][:, :width] = value
        elif ".mlp." in name:
            state[name][:width] = value
        else:
            state[name].copy_(value)
    for number in range(old.num_hidden_layers, layers):
        state[f"layers.{number}.self_attn.o_proj.weight"].zero_()
        state[f"layers.{number}.mlp.down_proj.weight"].zero_()
    large.load_state_dict(state)
    return large.eval()


def load_pair(pair: TrainedPair, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Llama, Llama]:
    """Target and draft, ready to serve."""
    return load(pair.target, dtype=dtype, device=device), load(pair.draft, dtype=dtype, device=device)

"""Step times in closed form, for tests that want a simulator and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from servecast.model.batch_steps import Chunk, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyticSteps:
    """t = [step + sequence B + cached K, if B] + sum over chunks of [prompt once + token (e - s) + square (e^2 - s^2)].

    The steps of attention replicas in lockstep take as long as the slowest one's.
    """

    step_s: float = 0.0
    sequence_s: float = 0.0
    cached_s: float = 0.0
    prompt_s: float = 0.0
    token_s: float = 0.0
    square_s: float = 0.0
    first_token_s: float = 0.0

    def decode(self, batch: int, cached: int) -> tuple[float, float, int]:
        """See `servecast.model.batch_steps.StepTimes`."""
        return self.step_s + self.sequence_s * batch + self.cached_s * cached, self.cached_s, 1 << 40

    def mixed(self, chunks: Sequence[Chunk], finishing: int, batch: int, cached: int) -> float:  # noqa: ARG002 (the protocol's)
        """See `servecast.model.batch_steps.StepTimes`."""
        seconds = self.decode(batch, cached)[0] if batch else 0.0
        for start, end in chunks:
            seconds += self.token_s * (end - start) + self.square_s * (end**2 - start**2)
            seconds += 0.0 if start else self.prompt_s
        return seconds

    def lockstep(self, ranks: Sequence[Work]) -> float:
        """See `servecast.model.batch_steps.GroupStepTimes`."""
        return max(self.mixed(*rank) for rank in ranks)

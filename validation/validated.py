"""One scenario, what the run showed, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass

from servecast.validation.live_facts import LiveFacts
from servecast.validation.scenario import Scenario
from servecast.validation.verdicts import Comparison, Verdict, overall


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """See the module."""

    scenario: Scenario
    facts: LiveFacts
    comparisons: tuple[Comparison, ...]
    missing: tuple[str, ...]
    """Parts that the run did not come to."""
    reasons: tuple[str, ...] = ()
    """Why figures of the others are not judged."""
    wall_s: float

    @property
    def verdict(self) -> Verdict:
        """Of the whole; a run that did not come to everything is never within."""
        found = overall(self.comparisons)
        short = bool(self.missing) or self.facts.stopped is not None
        return Verdict.NOT_JUDGED if short and found is Verdict.WITHIN else found

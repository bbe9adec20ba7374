"""Evolutionary search for the coefficients of a combination: they add up to one, and are free in sign and size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import fsum
from random import Random

DECAYS = (0.3, 0.5, 0.7, 0.9, 1.0)
"""Of the averages that the search begins with: weights over the states, from the last one back."""
_BEYOND = 0.5
"""How far a blend may lie beyond its parents, as a share of their distance (Eshelman & Schaffer's BLX-α)."""
_LAST = 0.02
"""The mutation at the end of the search, as a share of the first."""

SINGLE, AVERAGE, NOISE, BLEND, CROSSOVER = "single", "average", "noise", "blend", "crossover"
"""Where candidates come from."""


@dataclass(frozen=True)
class Candidate:
    """Coefficients αₖ, one for each state, and the score of Σ αₖθₖ, lower being better.

    Generation 0 is what the search began with; after that as many children as the population has are one.
    """

    coefficients: tuple[float, ...]
    score: float
    generation: int
    origin: str


@dataclass
class Evolution:
    """A steady-state search: two parents by rank, their child in the place of the worst if it is better than that."""

    states: int
    budget: int
    """Candidates that are scored in all."""
    population: int
    sigma: float
    """Standard deviation of the first mutations, of each coefficient."""
    seed: int
    score: Callable[[Sequence[float]], float]
    tried: list[Candidate] = field(default_factory=list)
    """All candidates in the order in which they were scored."""

    def run(self) -> list[Candidate]:
        """Search until the budget is spent; returns `tried`."""
        dice = Random(self.seed)  # noqa: S311  (a reproducible draw, no secret)
        for coefficients, origin in starts(self.states):
            self._try(coefficients, 0, origin)
        best = min(self.tried, key=_score).coefficients
        while len(self.tried) < min(self.population, self.budget):
            self._try(_mutated(best, self.sigma, dice), 0, NOISE)
        alive = sorted(self.tried, key=_score)[: self.population]
        begun, children = len(self.tried), self.budget - len(self.tried)
        for number in range(children):
            first, second = _parents(alive, dice)
            coefficients, origin = _child(first.coefficients, second.coefficients, dice)
            coefficients = _mutated(coefficients, self.sigma * _LAST ** (number / children), dice)
            child = self._try(coefficients, 1 + (len(self.tried) - begun) // self.population, origin)
            if child.score < alive[-1].score:
                alive = sorted([*alive[:-1], child], key=_score)
        return self.tried

    def _try(self, coefficients: tuple[float, ...], generation: int, origin: str) -> Candidate:
        found = Candidate(coefficients, self.score(coefficients), generation, origin)
        self.tried.append(found)
        return found


def starts(states: int) -> Iterator[tuple[tuple[float, ...], str]]:
    """Every state alone, and exponential moving averages of all of them."""
    for place in range(states):
        yield tuple(float(place == other) for other in range(states)), SINGLE
    for decay in DECAYS:
        weights = [decay ** (states - 1 - place) for place in range(states)]
        yield balanced([weight / fsum(weights) for weight in weights]), AVERAGE


def balanced(coefficients: Sequence[float]) -> tuple[float, ...]:
    """The nearest coefficients that add up to one, but for rounding."""
    rest = (1.0 - fsum(coefficients)) / len(coefficients)
    return tuple(value + rest for value in coefficients)


def _score(candidate: Candidate) -> float:
    return candidate.score


def _parents(alive: Sequence[Candidate], dice: Random) -> list[Candidate]:
    """Two different ones, the better the likelier; `alive` is sorted."""
    ranks = range(len(alive), 0, -1)
    first = dice.choices(range(len(alive)), ranks)[0]
    others = [place for place in range(len(alive)) if place != first]
    second = dice.choices(others, [ranks[place] for place in others])[0]
    return [alive[first], alive[second]]


def _child(first: Sequence[float], second: Sequence[float], dice: Random) -> tuple[tuple[float, ...], str]:
    if dice.random() < 0.5:
        share = dice.uniform(-_BEYOND, 1 + _BEYOND)
        return tuple(a + share * (b - a) for a, b in zip(first, second, strict=True)), BLEND
    return tuple(a if dice.random() < 0.5 else b for a, b in zip(first, second, strict=True)), CROSSOVER


def _mutated(coefficients: Sequence[float], sigma: float, dice: Random) -> tuple[float, ...]:
    return balanced([value + dice.gauss(0, sigma) for value in coefficients])

"""How often the intervals of :mod:`d2obench.stats.intervals` contain the true value, by simulation.

Every row of the result is one kind of figure under one model of noise with ``n`` samples: the share of trials whose
interval contains the true value, and the median width of the interval, for times and ratios on the log scale. Rows with
too few samples for an interval are left out, because a report prints a range for them. The simulation calls the same
functions as the intervals do, with many trials at once, so that a whole study takes about a minute.

Models of noise:

* ``normal``: normal noise of 3 %. ``heavy tails``: t with 3 degrees of freedom. ``spikes``: normal noise, and 8 % of
  the samples (``many spikes``: 15 %) are slower by a lognormal share around 30 %. In a ratio, either side can have
  spikes; with ``one side``, one side has them with 15 % and the other with 2 %.
* ``drift``: the level varies by 4 % with an autocorrelation of 0.8 from round to round; the true value is the median of
  the run. ``trend``: the level rises by 30 % from the first to the last sample.
* ``shared machine``: pairs in ABBA order, with spikes, on a level that varies by 4 % with an autocorrelation of 0.9.
* ``alike 0.3`` to ``alike 0.7``: the shared machine, and the ratio itself has this autocorrelation from pair to pair.
  Rounds of whole requests were measured to have 0.0 (``reports/gate-study-cpu``); for windows, up to 0.7 is tried.
* items: the figures of documents are distributed between normal and lognormal with sigma 1. The published runs have
  coefficients of variation of 0.4 to 0.8, which correspond to a sigma of 0.4 to 0.7.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from d2obench.record import write_atomic
from d2obench.stats.intervals import (
    ITEMS,
    LEVEL,
    ROUNDS,
    SCORES,
    WINDOWS,
    Bounds,
    Floats,
    blocks_t,
    proportion,
    quantile_bounds,
    scores_t,
    skewed_t,
    trimmed_t,
)

LEAST = 0.93
"""The lowest coverage that an interval may have to be printed."""
COUNTS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)
STEPS = ((5, 31), (3, 63), (5, 63), (8, 63), (3, 511))
"""Number of rounds, and of steps in each, for the percentiles of steps."""
Draw = Callable[[np.random.Generator, int, int], Floats]
Method = Callable[[Floats], Bounds]


class Covered(msgspec.Struct, frozen=True):
    """One row of the result.

    Args:
        figure: the kind of figure that is estimated.
        method: of the interval.
        model: of the noise.
        n: number of samples.
        trials: number of simulated trials.
        coverage: share of the intervals that contain the true value.
        width: median width of the intervals.
    """

    figure: str
    method: str
    model: str
    n: int
    trials: int
    coverage: float
    width: float


class Kind(NamedTuple):
    """One kind of figure: its method, the least number of samples, and for each model the draw and the true value."""

    figure: str
    name: str
    method: Method
    least: int
    models: dict[str, tuple[Draw, float]]


def study(trials: int = 4000, counts: Sequence[int] = COUNTS, seed: int = 0) -> list[Covered]:
    """The coverage of every kind of interval under every model, for every number of samples that gets an interval."""
    rows = []
    for kind in kinds():
        for model, (draw, truth) in kind.models.items():
            for n in counts:
                if n >= kind.least:
                    rng = np.random.default_rng([seed, n, *f"{kind.figure} {model}".encode()])
                    lo, hi = kind.method(draw(rng, trials, n))
                    rows.append(_row(kind, model, n, lo, hi, truth))
    return [*rows, *_percentiles(max(200, trials // 4), seed)]


def bootstrap(trials: int = 1000, counts: Sequence[int] = COUNTS, seed: int = 0) -> list[Covered]:
    """The coverage of the percentile bootstrap of a median, which earlier versions used at 95 %, or 98 % in gates."""
    rows = []
    for level in (LEVEL, 0.98):
        for n in counts if level == LEVEL else (8, 16, 32):
            rng = np.random.default_rng([seed, n])
            x = _pairs(0.08, 0.08)(rng, trials, n)
            draws = rng.integers(0, n, (1000, n))
            ends = [np.quantile(np.median(one[draws], axis=1), [(1 - level) / 2, (1 + level) / 2]) for one in x]
            kind = Kind("ratio of rounds", f"percentile bootstrap, {level:.0%}", trimmed_t, 2, {})
            lo, hi = np.array(ends).T
            rows.append(_row(kind, "shared machine", n, lo, hi, 0.0))
    return rows


def kinds() -> Iterator[Kind]:
    """Every kind of figure, in the order of the table."""
    singles: dict[str, tuple[Draw, float]] = {
        "normal": (_normal, 0.0),
        "heavy tails": (_heavy, 0.0),
        "spikes": (_spikes(0.08), _median_of(_spikes(0.08))),
        "many spikes": (_spikes(0.15), _median_of(_spikes(0.15))),
        "drift": (_drift, _median_of(_spikes(0.08))),
        "trend": (_trend, 0.15 + _median_of(_spikes(0.08))),
    }
    pairs: dict[str, tuple[Draw, float]] = {
        "normal": (_normal, 0.0),
        "heavy tails": (_heavy, 0.0),
        "spikes": (_pairs(0.08, 0.08, level=0.0), 0.0),
        "one side": (_pairs(0.02, 0.15, level=0.0), _median_of(_pairs(0.02, 0.15, level=0.0))),
        "trend": (_pairs(0.08, 0.08, level=0.0, trend=0.3), 0.0),
        "shared machine": (_pairs(0.08, 0.08), 0.0),
        "alike 0.3": (_pairs(0.08, 0.08, alike=0.3), 0.0),
    }
    more: dict[str, tuple[Draw, float]] = {f"alike {a}": (_pairs(0.08, 0.08, alike=a), 0.0) for a in (0.5, 0.7)}
    yield Kind("time of rounds", "trimmed t", trimmed_t, ROUNDS, singles)
    yield Kind("ratio of rounds", "trimmed t", trimmed_t, ROUNDS, pairs)
    yield Kind("time of windows", "t of blocks", blocks_t, WINDOWS, singles)
    yield Kind("ratio of windows", "t of blocks", blocks_t, WINDOWS, pairs | more)
    yield Kind("mean of items", "Hall's t", skewed_t, ITEMS, _items())
    yield Kind("mean score", "added items, t", lambda x: scores_t(x, (0.0, 1.0)), SCORES, _scores())
    yield Kind("difference of scores", "added items, t", lambda x: scores_t(x, (-1.0, 1.0)), SCORES, _differences())
    rights: dict[str, tuple[Draw, float]] = {f"share {p}": (_right(p), p) for p in (0.02, 0.1, 0.5, 0.9)}
    yield Kind("share of right items", "binomial", _binomial, 1, rights)


def markdown(rows: Sequence[Covered], old: Sequence[Covered]) -> str:
    """The text of ``README.md``: first the lowest coverage of each kind of figure, then a table for each kind."""
    lines = ["# Coverage of every interval the project prints\n", _about(rows), least(rows)]
    for figure in dict.fromkeys(row.figure for row in rows):
        mine = [row for row in rows if row.figure == figure]
        counts = sorted({row.n for row in mine})
        head = f"| {mine[0].method}, n = | " + " | ".join(map(str, counts)) + " |"
        lines.append(f"## {figure[0].upper()}{figure[1:]}\n\n{head}\n|---|" + "--:|" * len(counts))
        for model in dict.fromkeys(row.model for row in mine):
            known = {row.n: row for row in mine if row.model == model}
            fields = [f"{known[n].coverage:.1%}" if n in known else "" for n in counts]
            lines.append(f"| {model} | " + " | ".join(fields) + " |")
        lines.append("")
    lines.append("## What stood here before\n\nThe percentile bootstrap of the median, on the shared machine:\n")
    lines.append("| level | n | coverage |\n|---|--:|--:|")
    lines += [f"| {row.method.rpartition(' ')[2]} | {row.n} | {row.coverage:.1%} |" for row in old]
    return "\n".join(lines) + "\n"


def write(folder: Path, rows: Sequence[Covered], old: Sequence[Covered]) -> None:
    """Writes ``README.md`` and ``coverage.json``."""
    text = json.dumps(msgspec.to_builtins({"intervals": rows, "bootstrap": old}), separators=(",", ":"))
    write_atomic(folder / "coverage.json", text.replace('{"figure"', '\n{"figure"').encode() + b"\n")
    write_atomic(folder / "README.md", markdown(rows, old).encode())


def _about(rows: Sequence[Covered]) -> str:
    trials = max(row.trials for row in rows)
    least = min(row.coverage for row in rows)
    models = (__doc__ or "").partition("Models of noise:\n\n")[2]
    return (
        f"Nominal level {LEVEL:.0%}; {trials} trials a field; the least of all is {least:.1%}. Where a count is"
        " missing, the samples can't carry an interval and the report prints a range. Made by"
        f" `d2obench doctor --coverage --output FOLDER`.\n\n{models}"
    )


def least(rows: Sequence[Covered]) -> str:
    """A table of the lowest coverage of each kind of figure, and where it occurs."""
    lines = ["| figure | method | interval from n | least coverage | where |\n|---|---|--:|--:|---|"]
    for figure in dict.fromkeys(row.figure for row in rows):
        mine = [row for row in rows if row.figure == figure]
        worst = min(mine, key=lambda row: row.coverage)
        first = min(row.n for row in mine)
        where = f"{worst.model}, n = {worst.n}"
        lines.append(f"| {figure} | {worst.method} | {first} | {worst.coverage:.1%} | {where} |")
    return "\n".join(lines) + "\n"


def _row(kind: Kind, model: str, n: int, lo: Floats, hi: Floats, truth: float) -> Covered:
    held = (lo <= truth + 1e-12) & (truth - 1e-12 <= hi)
    width = float(np.median(hi - lo))
    return Covered(kind.figure, kind.name, model, n, len(lo), round(float(held.mean()), 4), round(width, 4))


# Noise of times and ratios on the log scale, where 0.03 is about 3 %.


def _normal(rng: np.random.Generator, trials: int, n: int) -> Floats:
    return rng.normal(0, 0.03, (trials, n))


def _heavy(rng: np.random.Generator, trials: int, n: int) -> Floats:
    return 0.03 * rng.standard_t(3, (trials, n))


def _spikes(share: float) -> Draw:
    return lambda rng, trials, n: _normal(rng, trials, n) + _slower(rng, (trials, n), share)


def _drift(rng: np.random.Generator, trials: int, n: int) -> Floats:
    level = _follows(rng, trials, n, 0.8, 0.04)
    return _spikes(0.08)(rng, trials, n) + level - np.median(level, axis=1, keepdims=True)


def _trend(rng: np.random.Generator, trials: int, n: int) -> Floats:
    return _spikes(0.08)(rng, trials, n) + np.linspace(0, 0.3, n)


def _pairs(base: float, head: float, *, level: float = 0.04, trend: float = 0.0, alike: float = 0.0) -> Draw:
    """Logs of the ratios of pairs in ABBA order: the base comes first in even pairs, the head in odd ones.

    Args:
        base, head: share of the samples of each side that are spikes.
        level: standard deviation of the level of the machine.
        trend: rise of the level over all pairs.
        alike: autocorrelation of the ratio from pair to pair.
    """

    def draw(rng: np.random.Generator, trials: int, n: int) -> Floats:
        slots = rng.normal(0, 0.03, (trials, 2 * n)) + np.linspace(0, trend, 2 * n)
        if level:
            slots = slots + _follows(rng, trials, 2 * n, 0.9, level)
        odd = np.arange(n) % 2 == 1
        first, second = slots[:, 0::2], slots[:, 1::2]
        below = np.where(odd, second, first) + _slower(rng, (trials, n), base)
        above = np.where(odd, first, second) + _slower(rng, (trials, n), head)
        return above - below + (_follows(rng, trials, n, alike, 0.03) if alike else 0.0)

    return draw


def _slower(rng: np.random.Generator, shape: tuple[int, int], share: float) -> Floats:
    size = np.log1p(np.exp(rng.normal(math.log(0.3), 0.7, shape)))
    return np.where(rng.random(shape) < share, size, 0.0)


def _follows(rng: np.random.Generator, trials: int, n: int, by: float, spread: float) -> Floats:
    """A stationary process of standard deviation ``spread`` and autocorrelation ``by`` from sample to sample."""
    level = rng.normal(size=(trials, n))
    for i in range(1, n):
        level[:, i] = by * level[:, i - 1] + math.sqrt(1 - by * by) * level[:, i]
    return np.asarray(spread * level)


def _median_of(draw: Draw) -> float:
    return float(np.median(draw(np.random.default_rng(7), 400, 2000)))


# Noise of quality.


def _items() -> dict[str, tuple[Draw, float]]:
    def lognormal(sigma: float) -> tuple[Draw, float]:
        return (lambda rng, trials, n: rng.lognormal(0, sigma, (trials, n))), math.exp(sigma * sigma / 2)

    def gamma(shape: float) -> tuple[Draw, float]:
        return (lambda rng, trials, n: rng.gamma(shape, 1, (trials, n))), shape

    def difference(rng: np.random.Generator, trials: int, n: int) -> Floats:
        return 0.3 * rng.lognormal(0, 0.6, (trials, n)) - 0.2 * rng.lognormal(0, 0.6, (trials, n))

    return {
        "normal": (_normal, 0.0),
        "heavy tails": (_heavy, 0.0),
        "lognormal 0.5": lognormal(0.5),
        "lognormal 0.7": lognormal(0.7),
        "lognormal 1": lognormal(1.0),
        "gamma 2": gamma(2.0),
        "exponential": gamma(1.0),
        "difference of lognormals": (difference, 0.1 * math.exp(0.18)),
    }


def _scores() -> dict[str, tuple[Draw, float]]:
    def some(share: float, low: float) -> tuple[Draw, float]:
        def draw(rng: np.random.Generator, trials: int, n: int) -> Floats:
            return np.where(rng.random((trials, n)) < share, rng.uniform(low, 1, (trials, n)), 0.0)

        return draw, share * (1 + low) / 2

    def beta(a: float, b: float) -> tuple[Draw, float]:
        return (lambda rng, trials, n: rng.beta(a, b, (trials, n))), a / (a + b)

    return {
        "one in 10 scores": some(0.1, 0.3),
        "three in 10 score": some(0.3, 0.3),
        "six in 10 score": some(0.6, 0.0),
        "19 in 20 score": some(0.95, 0.5),
        "beta(0.5, 0.5)": beta(0.5, 0.5),
        "beta(0.3, 1.2)": beta(0.3, 1.2),
    }


def _differences() -> dict[str, tuple[Draw, float]]:
    def flips(lost: float, won: float) -> tuple[Draw, float]:
        def draw(rng: np.random.Generator, trials: int, n: int) -> Floats:
            u = rng.random((trials, n))
            return np.where(u < lost, -1.0, np.where(u < lost + won, 1.0, 0.0))

        return draw, won - lost

    def moves(share: float, low: float) -> tuple[Draw, float]:
        def draw(rng: np.random.Generator, trials: int, n: int) -> Floats:
            return np.where(rng.random((trials, n)) < share, rng.uniform(low, 1, (trials, n)), 0.0)

        return draw, share * (1 + low) / 2

    return {
        "4 % lost, 4 % won": flips(0.04, 0.04),
        "10 % lost, 2 % won": flips(0.1, 0.02),
        "10 % lost": flips(0.1, 0.0),
        "30 % lost, 10 % won": flips(0.3, 0.1),
        "one in 10 moves": moves(0.1, -1.0),
        "four in 10 move one way": moves(0.4, 0.0),
    }


def _right(p: float) -> Draw:
    return lambda rng, trials, n: (rng.random((trials, n)) < p).astype(np.float64)


def _binomial(x: Floats) -> Bounds:
    n = x.shape[1]
    bounds = [proportion(hits, n) for hits in range(n + 1)]
    hits = x.sum(axis=1).astype(int)
    return np.array([one.lo for one in bounds])[hits], np.array([one.hi for one in bounds])[hits]


# Noise of decode steps, for their percentiles.


def _percentiles(trials: int, seed: int) -> list[Covered]:
    rows = []
    for model, draw in {
        "spikes": _steps(0, 0),
        "steps alike 0.8": _steps(0.8, 0),
        "rounds differ": _steps(0, 0.03),
    }.items():
        many = draw(np.random.default_rng(7), 400, 40, 63).reshape(-1)
        for q in (0.95, 0.99):
            truth = float(np.quantile(many, q))
            for rounds, steps in STEPS:
                rng = np.random.default_rng([seed, rounds, steps, *model.encode()])
                lo, hi = quantile_bounds(draw(rng, trials, rounds, steps).reshape(trials, -1), q)
                there = ~np.isnan(lo)
                if there.mean() >= 0.1:
                    kind = Kind(f"p{100 * q:.0f} of steps", "Woodruff", quantile_bounds, 0, {})  # type: ignore[arg-type]
                    rows.append(_row(kind, model, rounds * steps, lo[there], hi[there], truth))
    return rows


def _steps(alike: float, apart: float) -> Callable[[np.random.Generator, int, int, int], Floats]:
    """Steps with spikes; ``alike`` is the autocorrelation of neighbours, ``apart`` the deviation between rounds."""

    def draw(rng: np.random.Generator, trials: int, rounds: int, steps: int) -> Floats:
        count = trials * rounds
        x = _normal(rng, count, steps) + np.where(
            rng.random((count, steps)) < 0.08, rng.uniform(0.1, 0.5, (count, steps)), 0.0
        )
        x = x + rng.normal(0, apart, (count, 1)) + (_follows(rng, count, steps, alike, 0.04) if alike else 0.0)
        return np.asarray(x.reshape(trials, rounds, steps))

    return draw

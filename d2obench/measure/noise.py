"""How noisy this machine is: the same decode loop is timed twice, interleaved, as if it were two versions (A/A).

Any difference between the two arms is noise. From their paired log-ratios follows the smallest true change that the
gate's rule (the lower 98 % bound of the median log-ratio is above its limit) would detect four times out of five.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from d2obench.measure.clock import clock_for
from d2obench.stats.intervals import trimmed_t

LEVEL, POWER = 0.98, 0.8
ROUNDS = (8, 16, 32)
_TRIALS = 1000


class Noise(NamedTuple):
    """The result of an A/A run.

    Args:
        pairs: the median step of arm A and of arm B in each round, in seconds.
        single: the standard deviation of the logarithms of one arm's rounds.
        paired: the standard deviation of the log-ratios B ÷ A.
        offset: the median ratio B ÷ A less 1; it is noise alone.
        detectable: number of rounds → the smallest relative change that is detected with probability POWER.
    """

    pairs: list[tuple[float, float]]
    single: float
    paired: float
    offset: float
    detectable: dict[int, float]


class DecodeLoop:
    """Stands in for a model's decode step: weights and a cache that are read once a step, and small operators.

    It is far larger than the caches of a processor: about 100 MB on a CPU and 800 MB on a GPU.
    """

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        large = device.type == "cuda"
        width, layers, self._heads, batch, held = (2048, 6, 16, 8, 1024) if large else (512, 4, 8, 4, 1024)
        kind = torch.bfloat16 if large else torch.float32
        rng = torch.Generator(device).manual_seed(seed)

        def weights(*shape: int) -> torch.Tensor:
            drawn: torch.Tensor = torch.randn(*shape, generator=rng, device=device, dtype=kind)
            return drawn.div_(shape[0] ** 0.5)

        matrices = ((width, 3 * width), (width, 3 * width), (3 * width, width))
        self._layers = [tuple(weights(*shape) for shape in matrices) for _ in range(layers)]
        cache = (batch, self._heads, held, width // self._heads)
        self._cache = [(weights(*cache), weights(*cache)) for _ in range(layers)]
        self._state = weights(batch, width)

    @torch.inference_mode()
    def step(self) -> None:
        """One step; its result feeds the next."""
        x = self._state
        for (mix, up, down), (keys, values) in zip(self._layers, self._cache, strict=True):
            query = (functional.rms_norm(x, x.shape[-1:]) @ mix).chunk(3, -1)[0].view(x.shape[0], self._heads, 1, -1)
            x = x + functional.scaled_dot_product_attention(query, keys, values).flatten(1)
            x = x + functional.silu(functional.rms_norm(x, x.shape[-1:]) @ up) @ down
        self._state = functional.rms_norm(x, x.shape[-1:])


def measure_noise(
    device: torch.device, seconds: float = 60.0, steps: int = 8, progress: Callable[[float], None] | None = None
) -> Noise:
    """Runs A/A for about ``seconds``, at least eight rounds of ``steps`` steps an arm.

    Args:
        device: where the loops run.
        seconds: how long to measure.
        steps: steps of a sample, whose median is recorded.
        progress: called with the share that is done.
    """
    arms = (DecodeLoop(device, 0), DecodeLoop(device, 1))
    clock = clock_for(device)

    def sample(arm: DecodeLoop) -> float:
        clock.start()
        stamps = [clock.stamp()]
        for _ in range(steps):
            arm.step()
            stamps.append(clock.stamp())
        return float(np.median(np.diff(clock.read(stamps))))

    for arm in arms:
        sample(arm)
    pairs: list[tuple[float, float]] = []
    begin = time.monotonic()
    while len(pairs) < ROUNDS[0] or time.monotonic() - begin < seconds:
        if len(pairs) % 2:
            b, a = sample(arms[1]), sample(arms[0])
        else:
            a, b = sample(arms[0]), sample(arms[1])
        pairs.append((a, b))
        if progress:
            progress(min(1.0, (time.monotonic() - begin) / max(seconds, 1e-9)))
    return noise_of(pairs)


def noise_of(pairs: Sequence[tuple[float, float]], seed: int = 0) -> Noise:
    """The figures of an A/A run of two or more rounds; the same ``seed`` gives the same figures."""
    logs = np.log(np.asarray(pairs, dtype=np.float64))
    ratios = logs[:, 1] - logs[:, 0]
    return Noise(
        list(pairs),
        single=float(logs.std(axis=0, ddof=1).mean()),
        paired=float(ratios.std(ddof=1)),
        offset=float(np.expm1(np.median(ratios))),
        detectable={n: _detectable(ratios, n, seed) for n in ROUNDS},
    )


def _detectable(ratios: np.ndarray, rounds: int, seed: int) -> float:
    """The smallest relative change whose lower bound is above 0 with probability POWER."""
    # 1. Draw many runs of ``rounds`` log-ratios from the measured noise, centred on no change.
    rng = np.random.default_rng(seed)
    noise = ratios - np.median(ratios)
    runs = noise[rng.integers(0, len(noise), (_TRIALS, rounds))]
    # 2. The lower bound of each run's median.
    lower, _ = trimmed_t(runs, LEVEL)
    # 3. A change shifts all bounds alike. It must lift the bound at the quantile 1 − POWER to 0.
    return float(np.expm1(-np.quantile(lower, 1 - POWER)))

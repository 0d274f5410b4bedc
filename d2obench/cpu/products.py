"""Loops over inputs with few rows: product with a weight matrix, root-mean-square norm, and rotary positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from d2obench.cpu import HEADER, Arguments, Floats, Real, Size
from d2obench.cpu.language import LOOP, arguments, dots, fail, floats, loop, next_item, record_of

OUTPUTS, ROWS = 3, 4
"""Weight rows and input rows per tile. Its twelve sums and their factors fill AVX2's registers."""
_tile, _single, _last = dots(OUTPUTS, ROWS), dots(OUTPUTS, 1), dots(1, 1)


class ProductArguments(Arguments):
    """``x`` ``[rows, inputs]``, ``weight`` ``[outputs, inputs]``, ``bias`` ``[outputs]`` or 0, ``out`` ``[rows,
    outputs]``; ``inputs`` is a multiple of LANES; a work item is ``share`` outputs."""

    _fields_ = (
        *HEADER, ("x", Floats), ("weight", Floats), ("bias", Floats), ("out", Floats), ("rows", Size),
        ("inputs", Size), ("outputs", Size), ("share", Size),
    )  # fmt: skip


class NormArguments(Arguments):
    """``x`` and ``out`` ``[rows, width]``, ``weight`` ``[width]``; a work item is ``share`` rows."""

    _fields_ = (
        *HEADER, ("x", Floats), ("weight", Floats), ("out", Floats), ("rows", Size), ("width", Size), ("share", Size),
        ("epsilon", Real),
    )  # fmt: skip


class RotateArguments(Arguments):
    """Queries ``[tokens, query_heads, width]``, keys ``[tokens, key_heads, width]``, cos and sin ``[lines, width]``
    (token t uses line t mod lines), and outputs of the same shapes; a work item is ``share`` tokens."""

    _fields_ = (
        *HEADER, ("queries", Floats), ("keys", Floats), ("cos", Floats), ("sin", Floats), ("out_queries", Floats),
        ("out_keys", Floats), ("tokens", Size), ("query_heads", Size), ("key_heads", Size), ("width", Size),
        ("lines", Size), ("share", Size),
    )  # fmt: skip


PRODUCT, NORM, ROTATE = record_of(ProductArguments), record_of(NormArguments), record_of(RotateArguments)


@njit(**LOOP)
def _product(given: Any) -> None:
    a = arguments(given, PRODUCT)
    x, weight, out, rows, inputs, outputs, share = a.x, a.weight, a.out, a.rows, a.inputs, a.outputs, a.share
    while True:
        item = next_item(given)
        if item < 0:
            return
        first, last = item * share, min(outputs, item * share + share)
        o = first
        while o < last:
            row, at = weight + 4 * o * inputs, out + 4 * o
            r = 0
            if o + OUTPUTS <= last:
                ahead = row + 4 * OUTPUTS * inputs
                while r + ROWS <= rows:
                    _tile(row, x + 4 * r * inputs, at + 4 * r * outputs, ahead, inputs, inputs, inputs, outputs)
                    r += ROWS
                while r < rows:
                    _single(row, x + 4 * r * inputs, at + 4 * r * outputs, ahead, inputs, inputs, inputs, outputs)
                    r += 1
                o += OUTPUTS
            else:
                while r < rows:
                    _last(row, x + 4 * r * inputs, at + 4 * r * outputs, row, inputs, inputs, inputs, outputs)
                    r += 1
                o += 1
        if a.bias:
            added = floats(a.bias, outputs)
            for r in range(rows):
                found = floats(out + 4 * r * outputs, outputs)
                for o in range(first, last):
                    found[o] += added[o]


@njit(**LOOP)
def _norm(given: Any) -> None:
    a = arguments(given, NORM)
    rows, width, share, epsilon = a.rows, a.width, a.share, a.epsilon
    scale = floats(a.weight, width)
    while True:
        item = next_item(given)
        if item < 0:
            return
        for r in range(item * share, min(rows, item * share + share)):
            row, found = floats(a.x + 4 * r * width, width), floats(a.out + 4 * r * width, width)
            total = np.float32(0)
            for i in range(width):
                total += row[i] * row[i]
            factor = np.float32(1 / math.sqrt(total / width + epsilon))
            for i in range(width):
                found[i] = scale[i] * (row[i] * factor)


@njit(**LOOP)
def _rotate(given: Any) -> None:
    a = arguments(given, ROTATE)
    query_heads, key_heads, width, share = a.query_heads, a.key_heads, a.width, a.share
    half = width // 2
    while True:
        item = next_item(given)
        if item < 0:
            return
        for t in range(item * share, min(a.tokens, item * share + share)):
            cos = floats(a.cos + 4 * (t % a.lines) * width, width)
            sin = floats(a.sin + 4 * (t % a.lines) * width, width)
            for h in range(query_heads + key_heads):
                if h < query_heads:
                    at, source, to = t * query_heads + h, a.queries, a.out_queries
                else:
                    at, source, to = t * key_heads + h - query_heads, a.keys, a.out_keys
                x, out = floats(source + 4 * at * width, width), floats(to + 4 * at * width, width)
                for i in range(half):
                    out[i] = x[i] * cos[i] - x[half + i] * sin[i]
                for i in range(half):
                    out[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i]


@loop(lambda a: 2 * a.rows * a.inputs * a.outputs)
def product(given: Any) -> None:
    """``out = x·Wᵀ + b``."""
    try:
        _product(given)
    except Exception:
        fail(given)


@loop(lambda a: 0)
def norm(given: Any) -> None:
    """``out = w·x ÷ √(mean x² + ε)``, row by row."""
    try:
        _norm(given)
    except Exception:
        fail(given)


@loop(lambda a: 0)
def rotate(given: Any) -> None:
    """Applies rotary positions to queries and keys: ``x·cos + (−x₂, x₁)·sin``."""
    try:
        _rotate(given)
    except Exception:
        fail(given)

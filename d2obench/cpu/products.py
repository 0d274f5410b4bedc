"""Loops over few rows: a product with a weight matrix, and the root-mean-square norm before it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from d2obench.cpu.language import dots, floats, loop, take, words_at

OUTPUTS, ROWS = 3, 4
"""Sides of a tile: of the weights, and of the input. Its twelve sums and their factors fill AVX2's registers."""
_tile, _single, _last = dots(OUTPUTS, ROWS), dots(OUTPUTS, 1), dots(1, 1)


@loop(lambda words: 2 * words[6] * words[7] * words[8])
def product(given: Any) -> None:
    """``out = x·Wᵀ + b``; a piece is a run of outputs.

    Words: x, W, b (0 for none), out, rows, inputs (a multiple of LANES), outputs, outputs of a piece.
    """
    words = words_at(given)
    x, weight, bias, out, rows, inputs, outputs, share = words[2:10]
    while True:
        piece = take(given)
        if piece < 0:
            return
        first, last = piece * share, min(outputs, piece * share + share)
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
        if bias:
            added = floats(bias, outputs)
            for r in range(rows):
                found = floats(out + 4 * r * outputs, outputs)
                for o in range(first, last):
                    found[o] += added[o]


@loop(lambda words: 0)
def norm(given: Any) -> None:
    """``out = w·x ÷ √(mean x² + ε)``, row by row; a piece is a run of rows.

    Words: x, w, out, rows, width, rows of a piece, the bits of ε.
    """
    words = words_at(given)
    x, weight, out, rows, width, share = words[2:8]
    scale = floats(weight, width)
    small = words[8:9].view(np.float64)[0]
    while True:
        piece = take(given)
        if piece < 0:
            return
        for r in range(piece * share, min(rows, piece * share + share)):
            row, found = floats(x + 4 * r * width, width), floats(out + 4 * r * width, width)
            total = np.float32(0)
            for i in range(width):
                total += row[i] * row[i]
            factor = np.float32(1 / math.sqrt(total / width + small))
            for i in range(width):
                found[i] = scale[i] * (row[i] * factor)


@loop(lambda words: 0)
def rotate(given: Any) -> None:
    """Rotary positions: ``x·cos + (−x₂, x₁)·sin`` of queries and keys; a piece is a run of tokens.

    Words: queries ``[T, Hq, d]``, keys ``[T, Hk, d]``, cos and sin ``[P, d]`` (token t has line t mod P), where the
    results go; T, Hq, Hk, d, P, tokens of a piece.
    """
    words = words_at(given)
    queries, keys, cosines, sines, out_queries, out_keys, tokens, query_heads, key_heads, width, lines, share = words[
        2:14
    ]
    half = width // 2
    while True:
        piece = take(given)
        if piece < 0:
            return
        for t in range(piece * share, min(tokens, piece * share + share)):
            cos = floats(cosines + 4 * (t % lines) * width, width)
            sin = floats(sines + 4 * (t % lines) * width, width)
            for h in range(query_heads + key_heads):
                if h < query_heads:
                    at, source, to = t * query_heads + h, queries, out_queries
                else:
                    at, source, to = t * key_heads + h - query_heads, keys, out_keys
                x, out = floats(source + 4 * at * width, width), floats(to + 4 * at * width, width)
                for i in range(half):
                    out[i] = x[i] * cos[i] - x[half + i] * sin[i]
                for i in range(half):
                    out[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i]

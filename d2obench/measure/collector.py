"""What lives on, out of the garbage collector's sight: a full collection inside a step would walk every object that
torch and transformers made. Python tells whether something is hidden only by counting it all, so it is noted here."""

from __future__ import annotations

import gc

_kept = False


def keep() -> None:
    """Hides what lives now until :func:`forget`: a worker's model."""
    global _kept
    gc.collect()
    gc.freeze()
    _kept = True


def forget() -> None:
    """Shows everything again."""
    global _kept
    gc.unfreeze()
    _kept = False


def hide() -> None:
    """Hides what lives now until :func:`show`: before a request is timed."""
    if not _kept:
        gc.freeze()


def show() -> None:
    """Ends :func:`hide`; what is kept stays hidden."""
    if not _kept:
        gc.unfreeze()

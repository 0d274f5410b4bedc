"""A decode step as a CUDA graph: one launch instead of a thousand.

Design. A step's operators are the same every time: slots don't move, lengths, positions and thresholds are tensors on
the device, and nothing waits for the host. So after a few steps that warm up kernels and their workspaces, the step is
captured once and then replayed: the token goes into a fixed buffer, the logits come out of another. Capturing runs the
Python code of a step without its kernels; what that code counts is set back, and a replay counts for itself. A process
that has warmed up a shape captures it before the first step (:meth:`Steps.prepare`, outside of what is timed), as a
server would when it starts.

What can't be captured goes step by step, and says so once (:func:`obstacle`). So does a step that a dispatch mode or
the profiler's ranges look into, and whatever fails in capturing.

``torch.compile`` is not used. A graph takes away the same launches from the host; what is left on the device are short
kernels, each of a microsecond or two whatever it does. Norms and rotary positions, sixteen of a layer's launches in
transformers' own code, are one each for norm and one for queries and keys together (``d2obench.models.kernels``,
``.rotary``); a compiler would fuse activations and residual sums, too, four more of a layer, for minutes of compilation
per shape and for arithmetic that differs from prefill's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2obench import ranges
from d2obench.cache.layer import PolicyLayer
from d2obench.cache.policy_cache import PolicyCache
from d2obench.decode.state import DecodeState
from d2obench.slots.quantised import QuantStore

if TYPE_CHECKING:
    from d2obench.cache.session import Session

WARM = 2
"""Steps before the first capture of a shape in a process."""
_warmed: set[tuple[Any, ...]] = set()


def obstacle(session: Session) -> str:
    """Why the decode step of a session, compressed by now, can't be replayed, in words; empty where it can."""
    cache, model = session.cache, session.loaded.model
    if not isinstance(cache, PolicyCache):
        return "the cache is a library's own"
    if cache.wrap is not None:
        return "this architecture's own code copies from the host in every step"
    if not all(isinstance(layer, PolicyLayer) for layer in cache.layers):
        return "sliding layers move their entries"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1 or (getattr(model, "tp_size", 1) or 1) > 1:
        return "the model is shared out over devices"
    state = cache.state
    if not isinstance(state, DecodeState):
        return "the model is shared out over devices"
    if isinstance(state.store, QuantStore):
        return "a quantised cache counts its groups on the host"
    if state.policy.interval > 1:
        return "steps differ where several tokens are evicted together"
    if state.grows and not state.backend.length_on_device:
        return "the length of a growing cache is known to the host only"
    return "" if session.loaded.device.type == "cuda" else "there is no CUDA device"


class Steps:
    """The decode steps of one prompt of a session, replayed where they can be. One session at a time; it is given
    anew at every call, so that nothing here keeps it alive."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why steps are not replayed; None while that isn't known."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._of: tuple[Any, Any] = (None, None)
        self._tokens = self._logits = torch.zeros(0)
        self._warm = 0

    @property
    def captured(self) -> bool:
        """Whether steps are replayed by a graph."""
        return self._graph is not None

    def step(self, session: Session, tokens: Tensor) -> Tensor:
        """One step for ``tokens`` ``[B]``; float32 logits ``[B, V]``, the caller's own."""
        if not self._can_replay(session):
            return session.run(tokens[:, None]).float()
        if not self._is_current(session) and not self._is_warm(session):
            return self._warm_up_step(session, tokens).float()
        if not self._is_current(session) and not self._capture(session):
            return session.run(tokens[:, None]).float()
        return self._replay(session, tokens)

    def prepare(self, session: Session) -> None:
        """Captures the step now if this process knows its shape, and decodes nothing."""
        if self._can_replay(session) and not self._is_current(session) and _shape(session) in _warmed:
            self._capture(session)

    def _can_replay(self, session: Session) -> bool:
        cache = session.cache
        if isinstance(cache, PolicyCache) and not cache.ready:
            return False  # a policy that defers compresses after its first step
        if self.reason is None:
            self.reason = obstacle(session)
        return not self.reason and not ranges.active() and not torch._C._len_torch_dispatch_stack()

    def _is_current(self, session: Session) -> bool:
        """Whether there is a graph, and it is of what the cache holds now."""
        cache = session.cache
        if cache.grows:
            cache.ensure_space()
        return self._graph is not None and self._of == (cache.state, cache.state.store)

    def _is_warm(self, session: Session) -> bool:
        """Whether the shape is warm; counts the step that is made if not."""
        if _shape(session) in _warmed:
            return True
        self._warm += 1
        if self._warm == WARM:
            _warmed.add(_shape(session))
        return False

    def _warm_up_step(self, session: Session, tokens: Tensor) -> Tensor:
        """A step on the stream that capturing will use, so that libraries set up their workspaces for it."""
        here, side = torch.cuda.current_stream(tokens.device), _stream_of(tokens.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            out = session.run(tokens[:, None])
        here.wait_stream(side)
        out.record_stream(here)
        return out

    def _capture(self, session: Session) -> bool:
        cache, state, device = session.cache, session.cache.state, session.loaded.device
        # 1. Capturing runs the step's Python code without its kernels: what that code counts is set back afterwards.
        counted = state.steps, state.added, cache.seen
        tokens = torch.zeros(state.store.rows // state.heads, 1, dtype=torch.long, device=device)
        # 2. The token goes into a buffer that a replay reads; the old graph goes first, with its memory.
        graph = torch.cuda.CUDAGraph()
        self._drop()
        # 3. The step itself, on the stream that the warm-up steps have set up.
        try:
            with torch.cuda.graph(graph, stream=_stream_of(device), capture_error_mode="thread_local"):
                logits = session.run(tokens)
        except Exception as problem:  # what a driver or a library may refuse in capturing: steps go one by one
            first = str(problem).strip().partition("\n")[0][:120]
            self.reason = f"capturing failed ({type(problem).__name__}: {first})"
            return False
        finally:
            state.steps, state.added, cache.seen = counted
        self._graph, self._tokens, self._logits, self._of = graph, tokens, logits, (state, state.store)
        return True

    def _replay(self, session: Session, tokens: Tensor) -> Tensor:
        assert self._graph is not None
        self._tokens.copy_(tokens[:, None])
        self._graph.replay()
        session.cache.state.count()
        session.cache.seen += 1
        return self._logits.to(torch.float32, copy=True)

    def _drop(self) -> None:
        self._graph, self._of = None, (None, None)
        self._tokens = self._logits = torch.zeros(0)


def _shape(session: Session) -> tuple[Any, ...]:
    """What the kernels of a step depend on."""
    state = session.cache.state
    return id(session.loaded.model), state.policy, state.store.rows, state.grows, state.decode_path


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream of warm-up and capturing; one a device, since libraries keep a workspace per stream."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]

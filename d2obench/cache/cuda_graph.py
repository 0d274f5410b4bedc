"""A decode step as a CUDA graph: one launch instead of a thousand.

Design. A step's operators are the same every time: slots do not move; lengths, positions and thresholds are tensors on
the device; and nothing waits for the host. So after a few steps that warm up kernels and their workspaces, the step is
captured once and then replayed: the token is copied to a fixed input buffer, and the logits are read from a fixed
output buffer. Capturing runs the Python code of a step without its kernels, so the counters that this code changes are
reset afterwards; a replay updates them itself. If a process has warmed up a shape before, it captures the shape before
the first step (:meth:`Steps.prepare`, not timed), as a server would when it starts.

No kernel can be loaded while a step is captured: Triton would keep a launcher that fails from then on. So a shape
counts as warm only if steps with the same kernels have run, which includes the variants into which Triton compiles a
kernel (``Backend.variants``), and the backend loads its own kernels once more right before the capture.

Steps that can't be captured run one by one, and :func:`obstacle` gives the reason. So do steps observed by a dispatch
mode or by the profiler's ranges, and steps whose capture fails. A failed capture can leave PyTorch's allocator in the
state of capturing, so it also says that the process should end (:func:`d2obench.compiler.end_process`); a worker then
repeats the cell in a new process, without graphs. Out of memory is not caught.

``torch.compile`` is not used. A graph removes the same launch overhead from the host; what remains on the device are
short kernels, each of a microsecond or two. Norms and rotary positions, which are sixteen of a layer's launches in
transformers' own code, are one launch per norm and one for queries and keys together (``d2obench.models.kernels``,
``.rotary``). A compiler would also fuse activations and residual sums, four more launches per layer, at the cost of
minutes of compilation per shape and of arithmetic that differs from prefill's.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from d2obench import compiler, ranges
from d2obench.cache.devices import on
from d2obench.cache.layer import PolicyLayer
from d2obench.cache.policy_cache import PolicyCache
from d2obench.decode.state import DecodeState
from d2obench.errors import in_a_line, is_device_fault, is_out_of_memory
from d2obench.models.base import waiting_rope
from d2obench.slots.quantised import QuantStore

if TYPE_CHECKING:
    from d2obench.cache.session import Session

WARM = 2
"""Number of steps before the first capture of a shape in a process."""
_warmed: WeakKeyDictionary[Any, set[Hashable]] = WeakKeyDictionary()
"""The shapes (:func:`_shape`) of which this process has run steps, by model."""


def obstacle(session: Session) -> str:
    """Why the decode step of a session (already compressed) can't be replayed; empty if it can."""
    cache, model = session.cache, session.loaded.model
    if reason := compiler.off("graph"):
        return reason
    if not isinstance(cache, PolicyCache):
        return "the cache is a library's own"
    if cache.wrap is not None:
        return "this architecture's own code copies from the host in every step"
    if kind := waiting_rope(model.config):
        return f"the host reads in every step how long the text is, for rotary angles of the kind {kind}"
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
    """The decode steps of one prompt of a session, replayed by a CUDA graph if possible. The session is passed to every
    call instead of stored, so that this object does not keep it alive."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why steps are not replayed; empty if they can be; None if this has not been determined yet."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._of: tuple[Any, Any] = (None, None)
        self._tokens = self._logits = torch.zeros(0)
        self._warm = 0

    @property
    def captured(self) -> bool:
        """Whether steps are replayed by a graph."""
        return self._graph is not None

    def step(self, session: Session, tokens: Tensor) -> Tensor:
        """Runs one step for ``tokens`` ``[B]``. Returns float32 logits ``[B, V]`` in a new tensor."""
        # 1. not replayable: run the operators
        if not self._can_replay(session):
            return session.run(tokens[:, None]).float()
        # 2. the first steps of a shape warm up its kernels
        if not self._is_current(session) and not self._is_warm(session):
            return self._warm_up_step(session, tokens).float()
        if not self._is_current(session) and not self._capture(session):
            return session.run(tokens[:, None]).float()
        return self._replay(session, tokens)

    def prepare(self, session: Session) -> None:
        """Captures the step now if this process has warmed up its shape before; decodes nothing."""
        if self._can_replay(session) and not self._is_current(session) and _shape(session) in _warm_shapes(session):
            self._capture(session)

    def _can_replay(self, session: Session) -> bool:
        cache = session.cache
        if isinstance(cache, PolicyCache) and not cache.ready:
            return False  # such a policy compresses the prompt after its first step
        if self.reason is None:
            self.reason = obstacle(session)
        return not self.reason and not ranges.active() and not torch._C._len_torch_dispatch_stack()

    def _is_current(self, session: Session) -> bool:
        """Whether there is a graph and it was captured from the cache's present state and storage."""
        cache = session.cache
        if cache.grows:
            cache.ensure_space()
        return self._graph is not None and self._of == (cache.state, cache.state.store)

    def _is_warm(self, session: Session) -> bool:
        """Whether the shape is warm; if not, counts the step that is about to run."""
        if _shape(session) in _warm_shapes(session):
            return True
        self._warm += 1
        if self._warm == WARM:
            _warm_shapes(session).add(_shape(session))
        return False

    def _warm_up_step(self, session: Session, tokens: Tensor) -> Tensor:
        """Runs a step on the stream that capturing will use, so that libraries set up their workspaces for it."""
        here, side = torch.cuda.current_stream(tokens.device), _stream_of(tokens.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            out = session.run(tokens[:, None])
        here.wait_stream(side)
        out.record_stream(here)
        return out

    def _capture(self, session: Session) -> bool:
        """Captures a step; False, with the reason in ``reason``, if that fails. Decodes nothing.

        Raises:
            RuntimeError: the device is out of memory, or broken.
        """
        cache, state, device = session.cache, session.cache.state, session.loaded.device
        if reason := state.backend.probe():
            self.reason = reason
            return False
        # 1. capturing runs the step's Python code without its kernels, so what that code counts is reset afterwards
        counted = state.steps, state.added, cache.seen
        tokens = torch.zeros(state.store.rows // state.heads, 1, dtype=torch.long, device=device)
        # 2. allocate the token's buffer, which every replay reads; free the old graph and its memory first
        graph = torch.cuda.CUDAGraph()
        self._drop()
        # 3. capture the step on the stream that the warm-up steps have used. In the mode "relaxed", libraries may
        #    allocate and load; other threads never disturb a capture
        here = torch.cuda.current_stream(device)
        try:
            with on(device), torch.cuda.graph(graph, stream=_stream_of(device), capture_error_mode="relaxed"):
                logits = session.run(tokens)
        except Exception as problem:  # drivers and libraries may refuse to be captured; steps then run one by one
            # 4. PyTorch leaves the stream of a capture that it can't end as the current one
            with on(device):
                torch.cuda.set_stream(here)
            self.reason = f"capturing failed ({in_a_line(problem)})"
            compiler.end_process(self.reason)
            if is_out_of_memory(problem) or is_device_fault(problem):
                raise
            return False
        finally:
            state.steps, state.added, cache.seen = counted
        self._graph, self._tokens, self._logits, self._of = graph, tokens, logits, (state, state.store)
        return True

    def _replay(self, session: Session, tokens: Tensor) -> Tensor:
        """Replays the graph for ``tokens`` ``[B]``, and updates the counters that the step's Python code would
        update."""
        assert self._graph is not None
        self._tokens.copy_(tokens[:, None])
        self._graph.replay()
        session.cache.state.count()
        session.cache.seen += 1
        return self._logits.to(torch.float32, copy=True)

    def _drop(self) -> None:
        self._graph, self._of = None, (None, None)
        self._tokens = self._logits = torch.zeros(0)


def _shape(session: Session) -> Hashable:
    """The properties of a session on which the kernels of a step of its model depend."""
    state = session.cache.state
    return state.policy, state.store.rows, state.grows, state.decode_path, state.backend.variants


def _warm_shapes(session: Session) -> set[Hashable]:
    return _warmed.setdefault(session.loaded.model, set())


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream for warm-up and capturing; one per device, because libraries keep a workspace per stream."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]

"""llama.cpp on the CPU, timed on the same prompts, through the ``xllamacpp`` wheel: another engine for comparison.

Its server runs in this process. All sequences of a batch are sent as one request, so that they are read and decoded
together, greedily and ignoring end-of-text tokens; their tokens are returned as a stream. A step waits for the next
token of every sequence. The engine runs ahead of the reader, so single steps may arrive in bursts; their sum is
correct.

Weights stay quantised as in the file; the figures are those of another program and another model precision.
"""

from __future__ import annotations

import queue
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2obench.cache.session import Footprint, Session
from d2obench.errors import ModelError, UsageError, WorkerError
from d2obench.models.base import LoadedModel, Progress
from d2obench.policies.yardsticks import LlamaCpp, Yardstick
from d2obench.suite.grammar import Budget

BITS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
"""Bits per stored number: blocks of 32 share one scale of 16 bits."""
PADDING = 256
"""llama.cpp rounds the context of a sequence up to a multiple of this."""
WAIT_S = 1800.0


@dataclass(frozen=True)
class GgufModel:
    """The file that llama.cpp opens, and what its session must know about the model."""

    path: Path
    vocab: int
    pieces: dict[str, int]
    """Token id by the token's text, because the interface returns texts only."""


def load(name: str, dtype: str, device: str, progress: Progress | None = None, placement: object = None) -> LoadedModel:
    """Finds a model's GGUF file and loads its tokenizer; llama.cpp itself reads the weights.

    Raises:
        ModelError: the model has no GGUF file, or a GPU was requested.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    from d2obench.models.base import dimensions_of
    from d2obench.models.embedded import fetch_gguf
    from d2obench.models.saved import Gguf, check_gguf, fingerprint, read_config, read_errors, silent

    place = torch.device(device)
    if place.type != "cpu":
        raise ModelError("llama.cpp is measured on the CPU", why=f"the cell asks for {device}", remedy="--device cpu")
    check_gguf(name)
    if name == "embedded":
        path = fetch_gguf(progress or (lambda what, done, total: None))
    else:
        source = Gguf(str(Path(name).expanduser()))
        source.check()
        path = source.path
    with silent(), read_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        dimensions = dimensions_of(read_config(path.parent, path.name), parameters=0)
        pieces = {tokenizer.convert_tokens_to_string([word]): token for word, token in tokenizer.get_vocab().items()}
        weights = sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
    return LoadedModel(
        name=name,
        model=GgufModel(path, dimensions.vocab, pieces),
        tokenizer=tokenizer,
        dtype=getattr(torch, dtype),
        device=place,
        context=dimensions.context,
        has_sense=True,
        digest=fingerprint([path]),
        weights_bytes=weights,
        layers=dimensions.layers,
        kv_heads=dimensions.kv_heads,
        head_dim=dimensions.head_dim,
        note="run by llama.cpp with the weights as the GGUF file has them",
    )


class LlamaCppSession(Session):
    """Runs one request; the server and its cache are created for each request, before timing starts."""

    def __init__(self, loaded: LoadedModel, asked: LlamaCpp, budget: Budget | str | None, **options: Any) -> None:
        super().__init__(loaded, None, budget, **options)
        if not isinstance(self.loaded.model, GgufModel):
            raise UsageError("llama.cpp runs as a cell of a suite only", remedy="use d2obench run")
        self.asked = asked
        self._ready: list[queue.SimpleQueue[int | BaseException]] = []
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._fed = 0

    @property
    def decode_path(self) -> str:
        return "llama.cpp's own kernels"

    @staticmethod
    def ready(asked: Yardstick) -> None:
        """Raises a UsageError where xllamacpp is missing."""
        asked.installed()

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Reads the prompts; returns ``[B, V]``, 1 at the next token and 0 elsewhere."""
        self._lengths = [len(prompt) for prompt in prompts]
        longest = max(self._lengths, default=0)
        if not prompts or min(self._lengths) == 0:
            raise UsageError("an empty prompt can't be run", remedy="give at least one token")
        if longest + self.max_new > self.loaded.context:
            raise UsageError(
                f"{longest} prompt and {self.max_new} generated tokens are more than {self.loaded.name} can see",
                why=f"its context is {self.loaded.context} tokens",
                remedy="use a smaller shape",
            )
        self.cache = self._server(len(prompts), longest)
        self._ready = [queue.SimpleQueue() for _ in prompts]
        request = {
            "prompt": prompts,
            "n_predict": self.max_new + 1,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "timings_per_token": True,
        }
        self.mark("prefill")
        self._thread = threading.Thread(target=self._stream, args=(request,), name="llama.cpp", daemon=True)
        self._thread.start()
        return self._next()

    def compress(self) -> None:
        """Nothing to do."""
        self._check_begun("compress")
        self.mark("decode")

    def step(self, tokens: Tensor) -> Tensor:
        """Returns the tokens after the next one. The engine continues with its own greedy tokens; ``tokens`` is
        ignored."""
        self._check_begun("step")
        self._fed += 1
        return self._next()

    def prepare(self) -> None:
        """Nothing to do."""

    def skip_to(self, tokens: int) -> None:
        """Not supported."""
        raise ModelError("llama.cpp can't be moved on", remedy="use --decode full")

    def footprint(self) -> Footprint:
        """The allocated size of the cache, computed from its data types; it is filled up to the last decoded token."""
        self._check_begun("footprint")
        size = self._cells(max(self._lengths)) * len(self._lengths)
        numbers = 2 * self.loaded.layers * size * self.loaded.kv_heads * self.loaded.head_dim
        bytes_ = int(numbers * BITS[self.asked.cache] / 8)
        layers = range(self.loaded.layers)
        kept = [[float(length) for length in self._lengths] for _ in layers]
        held = [[float(length + self._fed) for length in self._lengths] for _ in layers]
        none = [0] * self.loaded.layers
        return Footprint(bytes_, bytes_, 0, self._lengths, None, kept, held, 1.0, none, none)

    def snapshot(self, decode_only: bool = False) -> Any:
        """Not supported: this engine is timed only."""
        raise ModelError("llama.cpp can't be forked", remedy="use --task speed")

    def close(self) -> None:
        """Ends the request and stops the server."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(WAIT_S)
        self._thread = None
        super().close()

    def _cells(self, longest: int) -> int:
        """Number of tokens allocated per sequence."""
        return -(-(longest + self.max_new + 1) // PADDING) * PADDING

    def _server(self, batch: int, longest: int) -> Any:
        import xllamacpp

        kinds = {"f16": "GGML_TYPE_F16", "q8_0": "GGML_TYPE_Q8_0", "q4_0": "GGML_TYPE_Q4_0"}
        kind = getattr(xllamacpp.ggml_type, kinds[self.asked.cache])
        asked = xllamacpp.CommonParams()
        asked.model.path = str(self.loaded.model.path)
        asked.n_ctx, asked.n_parallel = self._cells(longest) * batch, batch
        asked.n_batch = max(asked.n_batch, batch * longest)  # all prompts in one pass
        asked.cache_type_k = asked.cache_type_v = kind
        asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = torch.get_num_threads()
        asked.n_gpu_layers = 0
        asked.fit_params = False
        asked.cache_ram_mib = 0
        asked.verbosity = 1
        asked.api_keys = [secrets.token_hex(16)]  # the server always listens on loopback; keep others out
        asked.ui = False
        try:
            return xllamacpp.Server(asked)
        except Exception as problem:
            raise ModelError(f"llama.cpp can't open {self.loaded.name}", why=str(problem)[:300]) from None

    def _stream(self, request: dict[str, Any]) -> None:
        """Runs the request and puts every token into the queue of its sequence."""

        come = [0] * len(self._ready)

        def take(chunk: Any) -> bool:
            if isinstance(chunk, dict):
                if "error" in chunk:
                    self._fail(WorkerError("llama.cpp failed", why=str(chunk["error"])[:300]))
                count = int((chunk.get("timings") or {}).get("predicted_n", 0))
                for choice in chunk.get("choices", ()):
                    at = choice["index"]
                    token = self.loaded.model.pieces.get(choice["text"], 0)
                    for _ in range(count - come[at]):  # a character made of several tokens arrives with its last token
                        self._ready[at].put(token)
                    come[at] = max(come[at], count)
            return self._stopped.is_set()

        try:
            self.cache.handle_completions(request, take)
        except Exception as problem:
            self._fail(WorkerError("llama.cpp failed", why=f"{type(problem).__name__}: {problem}"[:300]))
        self._fail(WorkerError("llama.cpp ended before all tokens came"))

    def _fail(self, problem: BaseException) -> None:
        for ready in self._ready:
            ready.put(problem)

    def _next(self) -> Tensor:
        """The next token of every sequence, as logits that are 1 at that token and 0 elsewhere."""
        tokens = []
        for ready in self._ready:
            token = ready.get(timeout=WAIT_S)
            if isinstance(token, BaseException):
                raise token
            tokens.append(token)
        logits = torch.zeros(len(tokens), self.loaded.model.vocab)
        return logits.scatter_(1, torch.tensor(tokens)[:, None], 1.0)

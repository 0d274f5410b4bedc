"""The worker process: answers one request at a time with an operation of ``d2obench.run.worker_model``.

``python -m d2obench.run.worker [PLACEMENT] REQUESTS ANSWERS`` with ``[models]`` of the suite as JSON and the numbers
of two inherited pipes; the protocol is ``d2obench.run.worker_client``. Requests are read by a thread of their own,
which ends the process the moment the parent is gone, even in the middle of a long operation.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback

import msgspec

from d2obench.errors import WorkerError
from d2obench.run.worker_client import UNKNOWN, describe
from d2obench.run.worker_machine import Args
from d2obench.run.worker_model import Worker
from d2obench.suite.definition import Placement

OPS = (
    "hello",
    "describe",
    "prepare",
    "environment",
    "refuse_busy",
    "bandwidth",
    "idle",
    "rates",
    "memory",
    "load",
    "warm_up",
    "measure",
    "count",
    "hold",
    "decode_in_turn",
    "let_go",
    "evaluate",
    "exit",
)


def main(worker: Worker | None = None) -> None:
    """Answers requests until told to exit or the parent is gone; ``worker`` does the work."""
    *placement, down, up = sys.argv[1:]
    if worker is None:
        worker = Worker(*(msgspec.json.decode(words, type=Placement) for words in placement))
        worker.alone = True
    requests = _listen(int(down))
    answers = os.fdopen(int(up), "wb")

    def send(message: Args) -> None:
        answers.write(msgspec.json.encode(message) + b"\n")
        answers.flush()

    while True:
        request = requests.get()
        number, op = request["id"], request["op"]

        def report(done: int, total: int, words: str = "", number: int = number) -> None:
            send({"id": number, "progress": [done, total, words]})

        try:
            if op not in OPS:
                raise WorkerError(f"{UNKNOWN} '{op}'")
            send({"id": number, "ok": getattr(worker, op)(request["args"], report)})
        except SystemExit:
            send({"id": number, "ok": {}})
            return
        except Exception as problem:
            traceback.print_exc()
            send({"id": number, "error": describe(problem)})
        worker.release()  # after the handler: the exception's frames hold the tensors that did not fit


def _listen(pipe: int) -> queue.SimpleQueue[Args]:
    found: queue.SimpleQueue[Args] = queue.SimpleQueue()

    def listen() -> None:
        with os.fdopen(pipe, "rb") as lines:
            for line in lines:
                found.put(msgspec.json.decode(line))
        os._exit(0)

    threading.Thread(target=listen, name="requests", daemon=True).start()
    return found


if __name__ == "__main__":
    main()

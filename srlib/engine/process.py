"""The engine on transformers in a process of its own, so that two models work at the same time.

Two threads of one process take turns at Python, and a small model's forward pass is mostly Python;
two processes do not wait for each other. What is asked goes over in messages, in order: whatever
is ordered while the last message is under way makes the next one, and so do the answers.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import weakref
from multiprocessing.connection import Connection, Pipe
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

import torch
from transformers import AutoTokenizer

from srlib import SrlibError
from srlib.engine import GREEDY, Counters, Request, Running, Sampling, Sequence, check
from srlib.params import ModelSpec

Order = tuple[Any, ...]  # a method, and what it is called with; names stand for sequences and requests


class ProcessEngine(Running):
    """A causal language model in another process; it works by itself.

    Args:
        spec: the model, loaded there.
        slots: how many sequences can be open at the same time.

    Raises:
        SrlibError: no such model or adapter, or one of its files is damaged.
    """

    def __init__(self, spec: ModelSpec, slots: int) -> None:
        check(spec)
        super().__init__(spec, slots)
        self._lock = Lock()  # what has been answered is noted whole before it is taken back, or not at all
        self._under_way: dict[int, tuple[Request, SimpleQueue[Request] | None]] = {}
        self._results: SimpleQueue[Any] = SimpleQueue()  # of `score` and `entropies`
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        pipe, theirs = Pipe()
        command = [sys.executable, "-m", "srlib.engine.process", str(theirs.fileno())]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        # Ends the process, once: when it is called, when the engine is garbage, or at exit.
        self.shutdown = weakref.finalize(self, _stop, self._process, pipe, self._orders)
        pipe.send((spec, slots, torch.get_num_threads()))
        try:
            self.context, self.eos = _result(pipe.recv())
        except SrlibError:
            self.shutdown()
            raise
        except EOFError:
            self.shutdown()
            raise SrlibError(f"The process of {spec.path} ended while it loaded; why stands above.") from None
        self.tokenizer = AutoTokenizer.from_pretrained(spec.adapter or spec.path)
        self._gone = ""
        Thread(target=_send, args=(self._orders, pipe), daemon=True).start()
        Thread(target=_receive, args=(weakref.ref(self), pipe), daemon=True).start()

    def open(self, ids: list[int], sampling: Sampling = GREEDY) -> Sequence:
        """Begin a sequence; nothing is computed yet.

        Raises:
            RuntimeError: all slots are taken.
        """
        sequence = super().open(ids, sampling)
        self._orders.put(("open", sequence.slot, list(ids), tuple(sampling)))
        return sequence

    def close(self, sequence: Sequence) -> None:
        """Give the slot back; what was asked for the sequence is forgotten."""
        with self._lock:
            for name, (request, _) in list(self._under_way.items()):
                if request.sequence is sequence:
                    del self._under_way[name]
        self._orders.put(("close", sequence.slot))
        self._open -= 1

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Take back all but the first `length` ids of a sequence."""
        del sequence.ids[length:]
        self._orders.put(("truncate", sequence.slot, length))

    def cancel(self, request: Request) -> None:
        """Take a request back: it is not answered, and the sequence's ids are as they were before it."""
        with self._lock:
            for name, (other, _) in list(self._under_way.items()):
                if other is request:
                    del self._under_way[name]
                    self._orders.put(("cancel", name))
        self.truncate(request.sequence, request.start)

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """As `TransformersEngine.score`.

        Raises:
            SrlibError: the model failed.
        """
        return self._call("score", sequences)

    def entropies(self, sequences: list[list[int]]) -> list[list[float]]:
        """As `TransformersEngine.entropies`.

        Raises:
            SrlibError: the model failed.
        """
        return self._call("entropies", sequences)

    def _call(self, method: str, *args: Any) -> Any:
        if self._gone:
            raise SrlibError(self._gone)
        self._orders.put((method, *args))
        return _result(self._results.get())

    def _submit(self, request: Request, answers: SimpleQueue[Request] | None) -> Request:
        request.start = len(request.sequence.ids)
        request.sequence.ids += request.feed
        name = next(self._names)
        with self._lock:
            self._under_way[name] = request, answers
            if self._gone:
                self._answer(name, self._gone)
                return request
        asked = (request.feed, request.max_new, request.stops, request.stop_texts, request.recent)
        asked = (*asked, request.max_entropy, request.ask, request.watch)
        self._orders.put(("submit", name, request.sequence.slot, asked))
        return request

    def _take(self, answers: list[tuple[Any, ...]], counters: dict[str, Any]) -> None:
        """What the process has done."""
        self.counters = Counters(**counters)
        with self._lock:
            for name, forwarded, error, written in answers:
                if name not in self._under_way:
                    continue  # taken back meanwhile
                request = self._under_way[name][0]
                request.sequence.forwarded = forwarded
                request.ids, request.logprobs, request.own, request.watched, request.stopped, request.unsure = written
                request.sequence.ids += request.ids
                self._answer(name, error)

    def _fail(self, reason: str) -> None:
        """The process is gone: whoever waits for it is told."""
        with self._lock:
            self._gone = reason
            for name in list(self._under_way):
                self._answer(name, reason)
        self._results.put(SrlibError(reason))

    def _answer(self, name: int, error: str | None) -> None:
        request, queue = self._under_way.pop(name)
        request.error = SrlibError(error) if error else None
        if queue is not None:
            queue.put(request)


def _result(answer: Any) -> Any:
    if isinstance(answer, SrlibError):
        raise answer
    return answer


def _send(orders: SimpleQueue[Order | None], pipe: Connection) -> None:
    """Send what is ordered; what has gathered meanwhile goes in one message. None ends it."""
    while True:
        message = [orders.get()]
        try:
            while True:
                message.append(orders.get_nowait())
        except Empty:
            pass
        if None in message:
            return
        try:
            pipe.send(message)
        except OSError:  # the process is gone: `_receive` has seen it, too
            return


def _receive(engine: weakref.ref[ProcessEngine], pipe: Connection) -> None:
    """Hand on what the process answers, until there is no process or no engine any more."""
    while True:
        try:
            kind, *content = pipe.recv()
        except (EOFError, OSError):
            kind, content = "gone", []
        model = engine()
        if model is None:
            return
        if kind == "gone":
            model._fail(f"The process of {model.spec.path} has ended (code {model._process.wait()}); load it again.")
            return
        if kind == "done":
            model._take(*content)
        else:
            model._results.put(*content)
        del model


def _stop(process: subprocess.Popen, pipe: Connection, orders: SimpleQueue[Order | None]) -> None:
    orders.put(None)
    process.terminate()
    process.wait()
    pipe.close()


def serve(pipe: Connection) -> None:
    """The other side: load the model and do what is ordered, until the pipe is closed."""
    from srlib.engine import transformers

    spec, slots, threads = pipe.recv()
    torch.set_num_threads(threads)
    try:
        engine = transformers.load(spec, slots)
    except SrlibError as error:
        pipe.send(error)
        return
    pipe.send((engine.context, engine.eos))
    sequences: dict[int, Sequence] = {}
    names: dict[Request, int] = {}  # of the requests under way
    while True:
        while pipe.poll(0 if engine.pending else None):
            for method, *args in pipe.recv():
                if method == "open":
                    name, ids, sampling = args
                    sequences[name] = engine.open(ids, Sampling(*sampling))
                elif method == "submit":
                    name, sequence, asked = args
                    names[engine.submit(Request(sequences[sequence], *asked))] = name
                elif method == "truncate":
                    engine.truncate(sequences[args[0]], args[1])
                elif method == "close":
                    sequence = sequences.pop(args[0])
                    engine.close(sequence)
                    names = {request: name for request, name in names.items() if request.sequence is not sequence}
                elif method == "cancel":
                    for request in [request for request, name in names.items() if name == args[0]]:
                        engine.cancel(request)
                        del names[request]
                else:
                    pipe.send(("result", _guarded(getattr(engine, method), *args)))
        done = _guarded(engine.step)
        if isinstance(done, SrlibError):  # such as a device out of memory: the traces end, and say why
            error, done = done, engine.pending
            engine.pending = []
            for request in done:
                request.error = error
        answers = []
        for request in done:
            written = (request.ids, request.logprobs, request.own, request.watched, request.stopped, request.unsure)
            error = request.error and str(request.error)
            answers.append((names.pop(request), request.sequence.forwarded, error, written))
        if answers:
            pipe.send(("done", answers, vars(engine.counters)))


def _guarded(work, *args: Any) -> Any:
    """What `work` gives, or the error it ends with."""
    try:
        return work(*args)
    except Exception as error:
        return SrlibError(f"{type(error).__name__} while a model was at work: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for who asks
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # nobody asks any more

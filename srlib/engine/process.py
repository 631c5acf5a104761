"""The engine on transformers in a process of its own, so that two models work at the same time.

Two threads of one process take turns at Python, and a small model's forward pass is mostly Python;
two processes do not wait for each other. What is ordered gathers until `flush` sends it as one
message, and so do the answers. No thread reads or sends beside a model at work: it would take
Python from it at every message.
"""

from __future__ import annotations

import pickle
import select
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe, wait
from threading import Thread
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from srlib import SrlibError
from srlib.engine.files import check
from srlib.engine.protocol import GREEDY, Counters, Measure, Request, Running, Sampling, Sequence
from srlib.params import ModelSpec

SHORT = select.PIPE_BUF - 4  # bytes of a message that goes over at once, with its length before it
Order = tuple[Any, ...]  # a method, and what it is called with; names stand for sequences and requests


class ProcessEngine(Running):
    """A causal language model in another process; it works by itself.

    Args:
        spec: the model, loaded there.
        slots: how many sequences can be open at the same time.

    Raises:
        SrlibError: no such model or adapter, or one of its files is damaged.
    """

    ready: Connection

    def __init__(self, spec: ModelSpec, slots: int) -> None:
        check(spec)
        super().__init__(spec, slots)
        self._orders: list[Order] = []
        self._under_way: dict[int, Request] = {}
        self._done: list[Request] = []  # not collected yet
        self._results: dict[int, Any] = {}  # of `score` and `doubts`
        self._gone = ""
        # Two pipes of one direction: to read from a socket wakes the other side as well.
        (self.ready, answers), (orders, self._pipe) = Pipe(duplex=False), Pipe(duplex=False)
        self._answers = select.poll()  # `Connection.poll` makes one at every call
        self._answers.register(self.ready, select.POLLIN)
        theirs = [orders.fileno(), answers.fileno()]
        command = [sys.executable, "-m", "srlib.engine.process", *map(str, theirs)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=theirs)
        orders.close()
        answers.close()
        # Ends the process, once: when it is called, when the engine is garbage, or at exit.
        self.shutdown = weakref.finalize(self, _stop, self._process)
        _send(self._pipe, (spec, slots, torch.get_num_threads()))
        try:
            self.context, self.eos = _result(_receive(self.ready))
        except SrlibError:
            self.shutdown()
            raise
        except EOFError:
            self.shutdown()
            raise SrlibError(f"The process of {spec.path} ended while it loaded; why stands above.") from None
        self.tokenizer = AutoTokenizer.from_pretrained(spec.top, **({} if spec.adapter else spec.pinned))

    def open(self, ids: list[int], sampling: Sampling = GREEDY) -> Sequence:
        """Begin a sequence; nothing is computed yet.

        Raises:
            RuntimeError: all slots are taken.
        """
        sequence = super().open(ids, sampling)
        self._orders.append(("open", sequence.slot, list(ids), tuple(sampling)))  # a class of its own pickles slowly
        return sequence

    def close(self, sequence: Sequence) -> None:
        """Give the slot back; what was asked for the sequence is forgotten."""
        self._forget(lambda request: request.sequence is sequence)
        self._orders.append(("close", sequence.slot))
        self._open -= 1

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Take back all but the first `length` ids of a sequence."""
        del sequence.ids[length:]
        self._orders.append(("truncate", sequence.slot, length))

    def submit(self, request: Request) -> Request:
        """Ask for work; it begins with `flush`."""
        request.start = len(request.sequence.ids)
        request.sequence.ids += request.feed
        name = next(self._names)
        self._under_way[name] = request
        r = request
        asked = (r.feed, r.max_new, r.stops, r.stop_texts, r.recent, r.doubt, r.banned, r.ask, r.watch, r.live)
        self._orders.append(("submit", name, request.sequence.slot, asked))
        return request

    def cancel(self, request: Request) -> None:
        """Take a request back: it is not answered, and the sequence's ids are as they were before it."""
        for name in self._forget(lambda other: other is request):
            self._orders.append(("cancel", name))
        assert request.start is not None  # it was submitted
        self.truncate(request.sequence, request.start)

    def _forget(self, chosen: Callable[[Request], bool]) -> list[int]:
        """Names of the requests under way that are `chosen`; they are not answered any more."""
        names = [name for name, request in self._under_way.items() if chosen(request)]
        for name in names:
            del self._under_way[name]
        self._done = [request for request in self._done if not chosen(request)]
        return names

    def flush(self) -> None:
        """Send what has been ordered."""
        if not self._orders:
            return
        orders, self._orders = self._orders, []
        with self._whole_messages():
            _send(self._pipe, orders)

    def collect(self) -> list[Request]:
        """The requests that are done and were not given before; waits for none."""
        while not self._gone and self._answers.poll(0):
            with self._whole_messages():
                kind, *content = _receive(self.ready)
                if kind == "done":
                    self._take(*content)
                elif kind == "wrote":
                    self._grow(*content)
                else:
                    self._results.update([content])
        if self._gone:
            for request in self._under_way.values():
                request.error = SrlibError(self._gone)
                self._done.append(request)
            self._under_way.clear()
        done, self._done = self._done, []
        return done

    @contextmanager
    def _whole_messages(self) -> Iterator[None]:
        """What is said between the processes is said whole; if not, this is the end of the other one."""
        try:
            yield
        except (EOFError, OSError):
            if not self._gone:
                self._gone = f"The process of {self.spec.path} has ended (code {self._process.wait()}); load it again."
        except BaseException:
            self.shutdown()
            self._gone = f"The process of {self.spec.path} was interrupted in the middle of a message; load it again."
            raise

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """As `TransformersEngine.score`.

        Raises:
            SrlibError: the model failed.
        """
        return self._call("score", sequences)

    def doubts(self, sequences: list[list[int]], measure: Measure = "entropy") -> list[list[float]]:
        """As `TransformersEngine.doubts`.

        Raises:
            SrlibError: the model failed.
        """
        return self._call("doubts", sequences, measure)

    def _call(self, method: str, *args: Any) -> Any:
        name = next(self._names)
        self._orders.append(("call", name, method, args))
        self.flush()
        while name not in self._results and not self._gone:
            wait([self.ready])
            self._done = self.collect()
        if self._gone:
            raise SrlibError(self._gone)
        return _result(self._results.pop(name))

    def _grow(self, written: list[tuple[int, list[int], list[float]]]) -> None:
        """What has been written of requests that are followed."""
        for name, ids, logprobs in written:
            if (request := self._under_way.get(name)) is not None:
                request.ids += ids
                request.logprobs += logprobs

    def _take(self, answers: list[tuple[Any, ...]], counters: dict[str, Any]) -> None:
        """What the process has done."""
        self.counters = Counters(**counters)
        for name, forwarded, error, written in answers:
            request = self._under_way.pop(name, None)
            if request is None:
                continue  # taken back meanwhile
            request.sequence.forwarded = forwarded
            request.ids, request.logprobs, request.own, request.watched, request.stopped, request.unsure = written
            request.sequence.ids += request.ids
            request.error = SrlibError(error) if error else None
            self._done.append(request)


def _result(answer: Any) -> Any:
    if isinstance(answer, SrlibError):
        raise answer
    return answer


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait()


def _send(pipe: Connection, message: Any) -> None:
    pipe.send_bytes(pickle.dumps(message))  # `Connection.send` makes a pickler of its own at every call


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())


class _Asked:
    """The pipes as the process sees them; it reads while it sends, so that the two sides never wait for each other."""

    def __init__(self, orders: Connection, answers: Connection) -> None:
        self._orders, self._answers = orders, answers
        self._early: deque[Any] = deque()  # read while an answer was sent
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(orders, select.POLLIN)
        self._writable.register(answers, select.POLLOUT)

    def next(self, wait_for_it: bool) -> Any:
        """The next message; None if there is none and it is not to be waited for."""
        if self._early:
            return self._early.popleft()
        return _receive(self._orders) if self._readable.poll(None if wait_for_it else 0) else None

    def answer(self, message: Any) -> None:
        data = pickle.dumps(message)
        if len(data) <= SHORT and self._writable.poll(0):  # there is room for it
            self._answers.send_bytes(data)
            return
        sender = Thread(target=self._answers.send_bytes, args=(data,), daemon=True)
        sender.start()
        while sender.is_alive():
            if self._readable.poll(0):
                self._early.append(_receive(self._orders))
            sender.join(0.001)


def serve(orders: Connection, answers: Connection) -> None:
    """The other side: load the model and do what is ordered, until nobody orders any more.

    Raises:
        EOFError: that is so.
    """
    from srlib.engine import transformers

    asked = _Asked(orders, answers)
    logging.disable_progress_bar()  # it would stand between the lines of who asked
    spec, slots, threads = asked.next(wait_for_it=True)
    torch.set_num_threads(threads)
    try:
        engine = transformers.load(spec, slots)
    except SrlibError as error:
        asked.answer(error)
        return
    asked.answer((engine.context, engine.eos))
    sequences: dict[int, Sequence] = {}
    names: dict[Request, int] = {}  # of the requests under way
    shown: dict[Request, int] = {}  # how many ids have been told of those that are followed
    while True:
        while (message := asked.next(wait_for_it=not engine.pending)) is not None:
            for method, *args in message:
                if method == "open":
                    name, ids, sampling = args
                    sequences[name] = engine.open(ids, Sampling(*sampling))
                elif method == "submit":
                    name, sequence, wanted = args
                    names[engine.submit(Request(sequences[sequence], *wanted))] = name
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
                    name, method, args = args
                    asked.answer(("result", name, _guarded(getattr(engine, method), *args)))
        told = []
        for request in engine.step():
            shown.pop(request, None)
            written = (request.ids, request.logprobs, request.own, request.watched, request.stopped, request.unsure)
            wrong = request.error and str(request.error)
            told.append((names.pop(request), request.sequence.forwarded, wrong, written))
        if told:
            asked.answer(("done", told, vars(engine.counters)))
        grown = [r for r in engine.pending if r.live and len(r.ids) > shown.get(r, 0)]
        if grown:
            asked.answer(
                ("wrote", [(names[r], r.ids[shown.get(r, 0) :], r.logprobs[shown.get(r, 0) :]) for r in grown])
            )
            shown.update((r, len(r.ids)) for r in grown)


def _guarded(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` gives, or the error it ends with."""
    try:
        return work(*args)
    except Exception as error:
        return SrlibError(f"{type(error).__name__} while a model was at work: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for who asks
    try:
        orders, answers = map(int, sys.argv[1:])
        serve(Connection(orders, writable=False), Connection(answers, readable=False))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # nobody asks any more

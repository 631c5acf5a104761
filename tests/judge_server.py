"""A local server that speaks the OpenAI protocol and answers as a judge would, or misbehaves as servers do."""

import json
import random
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "time-out", "cut", "malformed", "not json", "empty", "no fences", "foreign")
PASSING = FAULTS[:4]  # the client asks again by itself


def tokens(text: str) -> int:
    """As the server counts them: words, numbers by digit, single signs."""
    return len(re.findall(r"[A-Za-z]+|\d|[^\sA-Za-z\d]", text))


class JudgeServer:
    """What it was asked and what it answered.

    Args:
        choose: from a trace to the passages that a good answer quotes.
        fault: from a trace and the number of its request, from 0, to one of `FAULTS`, or None for a good answer.
        count: from a text to its tokens.
    """

    def __init__(self, choose, fault=lambda trace, n: None, count=tokens) -> None:
        self.choose, self.fault, self.count = choose, fault, count
        self.asked: Counter[str] = Counter()  # by trace
        self.faults: Counter[str] = Counter()
        self.good: Counter[str] = Counter()
        self.temperatures: dict[str, list[float]] = {}
        self.prompt_tokens = self.completion_tokens = self.most_at_once = self.now = 0
        self.refuse = 0  # status that every request is answered with, once it is set
        self.lock = threading.Lock()

    @property
    def requests(self) -> int:
        return self.asked.total()

    def answer(self, handler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        trace = re.search(r"<solution>\n(.*)\n</solution>", prompt, re.DOTALL)[1]
        with self.lock:
            fault = self.fault(trace, self.asked[trace])
            self.asked[trace] += 1
            self.temperatures.setdefault(trace, []).append(body["temperature"])
            self.faults[fault] += fault is not None
        if self.refuse:
            return self.send(handler, self.refuse, {"error": {"message": "no", "code": None}})
        text = "".join(f"```\n{passage}\n```\n" for passage in self.choose(trace))
        match fault:
            case "429" | "500":
                return self.send(handler, int(fault), {"error": {"message": "busy"}}, {"retry-after-ms": "1"})
            case "time-out":
                self.release.wait(20)  # longer than any client here waits
                return None
            case "malformed":
                return self.send(handler, 200, {"id": "x", "choices": []})
            case "not json":
                return self.send(handler, 200, None)
            case "empty":
                text = ""
            case "no fences":
                text = "The third step is hard."
            case "foreign":
                text = "```\nLet us compute the determinant of the Vandermonde matrix by induction on its rows.\n```\n"
        usage = {"prompt_tokens": self.count(prompt), "completion_tokens": self.count(text)}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
        if fault != "cut":
            with self.lock:
                self.prompt_tokens += usage["prompt_tokens"]
                self.completion_tokens += usage["completion_tokens"]
                self.good[trace] += fault is None
        usage["total_tokens"] = sum(usage.values())
        self.send(handler, 200, whole | {"usage": usage}, cut=fault == "cut")

    @staticmethod
    def send(handler, status: int, body, headers=None, cut: bool = False) -> None:
        data = b"<html>" if body is None else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            handler.close_connection = True

    @contextmanager
    def serve(self):
        """Its address, while it is up."""
        self.release = threading.Event()
        ours = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                with ours.lock:
                    ours.now += 1
                    ours.most_at_once = max(ours.most_at_once, ours.now)
                try:
                    ours.answer(self)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with ours.lock:
                        ours.now -= 1

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

        server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            self.release.set()
            server.shutdown()
            server.server_close()


def at_random(rate: float, seed: int, kinds=FAULTS):
    """Faults at a rate, the same for the same trace and number of its request."""

    def fault(trace: str, n: int) -> str | None:
        rng = random.Random(f"{seed} {n} {trace}")
        return rng.choice(kinds) if rng.random() < rate else None

    return fault


def hard_steps(trace: str) -> list[str]:
    """The products of an arithmetic trace, as a judge that knows would quote them."""
    return re.findall(r"\d+\*\d+=\d+", trace) or [trace.partition(";")[0]]

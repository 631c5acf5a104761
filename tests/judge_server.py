"""A local server that speaks the OpenAI protocol and answers as a judge would, or misbehaves as servers do."""

import json
import random
import re
import socket
import struct
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
        fault: from a trace and the number of its request, from 0, to one of `FAULTS`, "reset", "down", or None for a
            good answer; a status and the body that goes with it; or a mapping of the choice that is answered.
        count: from a text to its tokens.
    """

    def __init__(self, choose, fault=lambda trace, n: None, count=tokens) -> None:
        self.choose, self.fault, self.count = choose, fault, count
        self.asked: Counter[str] = Counter()  # by trace
        self.faults: Counter[str] = Counter()
        self.good: Counter[str] = Counter()
        self.bodies: dict[str, list[dict]] = {}
        self.headers: list = []  # of each request
        self.batches = Batches(self)
        self.prompt_tokens = self.completion_tokens = self.most_at_once = self.now = 0
        self.refuse = 0  # status that every request is answered with, once it is set
        self.lock = threading.RLock()

    @property
    def requests(self) -> int:
        return self.asked.total()

    def answer(self, handler) -> None:
        sent = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        with self.lock:
            self.headers.append(handler.headers)
        if "/chat/" not in handler.path:
            return self.send(handler, *self.batches.answer(handler.path, sent))
        body = json.loads(sent)
        said = self.answer_to(body)
        if said == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            for each in (handler.rfile, handler.wfile, handler.connection):
                each.close()
        elif said == "down":
            handler.close_connection = True
            handler.server.shutdown()
            handler.server.server_close()
        elif said == "time-out":
            self.release.wait(20)  # longer than any client here waits
        else:
            self.send(handler, *said)

    def answer_to(self, body):
        """What a request is answered with: status, body, headers, and whether it is cut; or the name of a fault."""
        prompt = body["messages"][-1]["content"]
        trace = re.search(r"<solution>\n(.*)\n</solution>", prompt, re.DOTALL)[1]
        with self.lock:
            fault = self.fault(trace, self.asked[trace])
            self.asked[trace] += 1
            self.bodies.setdefault(trace, []).append(body)
            if fault is not None:
                self.faults[str(fault)] += 1
        if self.refuse:
            return self.refuse, {"error": {"message": "no", "code": None}}
        text = "".join(f"```\n{passage}\n```\n" for passage in self.choose(trace))
        match fault:
            case "429" | "500":
                return int(fault), {"error": {"message": "busy"}}, {"retry-after-ms": "1"}
            case "time-out" | "reset" | "down":
                return fault
            case (int() as status, answer):
                return status, answer
            case "malformed":
                return 200, {"id": "x", "choices": []}
            case "not json":
                return 200, None
            case "empty":
                text = ""
            case "no fences":
                text = "The third step is hard."
            case "foreign":
                text = "```\nLet us compute the determinant of the Vandermonde matrix by induction on its rows.\n```\n"
        usage = {"prompt_tokens": self.count(prompt), "completion_tokens": self.count(text)}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        if isinstance(fault, dict):
            choice |= fault
            usage["completion_tokens"] = self.count(str(choice["message"]))
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
        if fault != "cut":
            with self.lock:
                self.prompt_tokens += usage["prompt_tokens"]
                self.completion_tokens += usage["completion_tokens"]
                self.good[trace] += fault is None
        usage["total_tokens"] = sum(usage.values())
        return 200, whole | {"usage": usage}, None, fault == "cut"

    @staticmethod
    def send(handler, status: int, body, headers=None, cut: bool = False) -> None:
        data = b"<html>" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
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
    def serve(self, port=0):
        """Its address, while it is up."""
        self.release = threading.Event()
        ours = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else every answer takes 40 ms

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

            do_GET = do_POST

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

        server = Server(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            self.release.set()
            server.shutdown()
            server.server_close()


class Batches:
    """The server's files and batches; a batch is done after `looks` looks at it."""

    def __init__(self, server: JudgeServer) -> None:
        self.server, self.looks = server, 2
        self.files: dict[str, bytes] = {}
        self.made: list[dict] = []
        self.status = "completed"  # in which the next ones end
        self.spare: set[str] = set()  # traces that a batch ends without

    def answer(self, path: str, sent: bytes):
        *_, kind, name = path.partition("?")[0].rstrip("/").split("/")
        if name == "files":
            lines = re.findall(rb'^{"custom_id".*$', sent, re.MULTILINE)
            return 200, {"id": self._kept(b"\n".join(lines)), "object": "file"}
        if name == "content":
            return 200, self.files[kind]
        if name == "batches" and not sent:
            return 200, {"object": "list", "data": self.made}
        if name == "batches":
            file = json.loads(sent)["input_file_id"]
            self.made.append(
                {"id": f"batch-{len(self.made)}", "input_file_id": file, "status": "in_progress", "seen": 0}
            )
            return 200, self.made[-1]
        batch = next(each for each in self.made if each["id"] == name)
        batch["seen"] += 1
        if batch["seen"] == self.looks:
            batch |= {"status": self.status, **self._done(batch["input_file_id"])}
        return 200, batch

    def _done(self, file: str) -> dict:
        if self.status == "failed":
            return {"errors": {"data": [{"code": "model_not_found", "message": "no such model in batches"}]}}
        good, bad = [], []
        for line in map(json.loads, self.files[file].splitlines()):
            if any(trace in line["body"]["messages"][-1]["content"] for trace in self.spare):
                continue
            status, body, *_ = self.server.answer_to(line["body"])
            answer = {"custom_id": line["custom_id"], "response": {"status_code": status, "body": body}, "error": None}
            (good if status == 200 else bad).append(json.dumps(answer).encode())
        names = ("output_file_id", good), ("error_file_id", bad)
        return {name: self._kept(b"\n".join(lines)) for name, lines in names if lines}

    def _kept(self, data: bytes) -> str:
        self.files[name := f"file-{len(self.files)}"] = data
        return name


def at_random(rate: float, seed: int, kinds=FAULTS):
    """Faults at a rate, the same for the same trace and number of its request."""

    def fault(trace: str, n: int) -> str | None:
        rng = random.Random(f"{seed} {n} {trace}")
        return rng.choice(kinds) if rng.random() < rate else None

    return fault


def hard_steps(trace: str) -> list[str]:
    """The products of an arithmetic trace, as a judge that knows would quote them."""
    return re.findall(r"\d+\*\d+=\d+", trace) or [trace.partition(";")[0]]

"""Kernels that are forked off a process which has imported the libraries already.

A notebook begins with seconds of imports, more than the work of most of them takes in a test. What runs is the kernel of
every other session: Jupyter starts this file in its place (see `kernels` in conftest.py), and this file has a server
fork one, hands on signals, and ends with it. Of srlib itself the server has imported nothing. Where the environment is
not the server's in what libraries read at their import, the kernel is begun from nothing, as ever.
"""

import contextlib
import json
import os
import signal
import socket
import sys

# What is imported in the server. Not matplotlib: a kernel decides where figures go before that is.
MODULES = """torch transformers.models.qwen2.modeling_qwen2 transformers.trainer trl.trainer.sft_trainer
    trl.trainer.grpo_trainer peft datasets accelerate pandas scipy.stats scipy.optimize
    ipykernel.kernelapp ipykernel.ipkernel""".split()
READ = ("ACCELERATE", "CUDA", "HF_", "MKL", "OMP", "PYTHON", "PYTORCH", "TOKENIZERS", "TORCH", "TRANSFORMERS", "TRL")
PARENT = "JPY_PARENT_PID"  # a kernel ends where its parent is another; this file looks to that


def environment() -> dict[str, str]:
    """What of the environment libraries read when they are imported."""
    return {name: value for name, value in os.environ.items() if name.startswith(READ)}


def serve(address: str) -> None:
    """Fork a kernel for each who asks, until the process that started this one is gone."""
    import gc
    from importlib import import_module

    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)  # who asks by now waits for the imports
        import srlib  # noqa: F401  (it sets the environment)

        mine = environment()
        for name in MODULES:
            import_module(name)
        for name in list(sys.modules):
            if name.partition(".")[0] == "srlib" or name in ("tqdm.auto", "tqdm.autonotebook"):
                del sys.modules[name]  # bars look which kind of session they are in when they are imported
        gc.collect()
        gc.freeze()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what is forked
        server.settimeout(1)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                asks, _ = server.accept()
                if os.fork() == 0:
                    server.close()
                    become(asks, mine)
                asks.close()


def become(asks: socket.socket, mine: dict[str, str]) -> None:
    """In a forked process: be the kernel that is asked for."""
    import runpy
    import threading

    os.setsid()
    asks.settimeout(None)
    request, files, _, _ = socket.recv_fds(asks, 2**20, 3)
    told = json.loads(request)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    if told["read"] != mine:
        asks.sendall(b"0")
        os._exit(0)
    asks.sendall(b"1")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(told["environment"])
    os.chdir(told["folder"])
    sys.argv[:] = ["ipykernel_launcher.py", *told["arguments"]]
    sys.path[0] = told["folder"]

    def obey() -> None:
        """Pass on signals; without the one who sends them, or at the last of all, be killed with all that was begun."""
        while number := asks.recv(1):
            os.killpg(0, number[0])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=obey, daemon=True).start()
    code = 1
    try:
        runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def ask(address: str, arguments: list[str]) -> None:
    """Have a kernel forked, and be its double; where none is, be the kernel."""
    there = {name: value for name, value in os.environ.items() if name != PARENT}
    told = {"read": environment(), "environment": there, "folder": os.getcwd(), "arguments": arguments}
    server = socket.socket(socket.AF_UNIX)
    answer = b"0"
    with contextlib.suppress(OSError):
        server.connect(address)
        socket.send_fds(server, [json.dumps(told).encode()], [0, 1, 2])
        answer = server.recv(1)
    if answer != b"1":
        os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *arguments])

    def send(number: int, frame: object) -> None:
        with contextlib.suppress(OSError):
            server.sendall(bytes([number]))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, send)
    parent = os.getppid()
    server.settimeout(1)
    while os.getppid() == parent:
        try:
            server.recv(1)  # nothing, once the kernel is gone
        except TimeoutError:
            continue
        except OSError:
            pass
        break
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "serve" else ask(sys.argv[2], sys.argv[3:])

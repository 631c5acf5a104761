"""Make a virtual environment and install into it: `python .ci/install.py .venv --editable .[dev]`.

Behind `--alone` stand packages of which only the package itself is wanted, nothing that it depends on.

By uv, which pip fetches first; it takes a small part of pip's time. Where uv cannot be had, by pip.
uv reads none of pip's settings, so they are handed on: a CPU build of torch that pip would find
is found by uv, too.
"""

import ast
import os
import subprocess
import sys

UV = "uv>=0.9,<1"
# pip's setting: uv's variable, and what stands between the values of a list.
SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", None),
    "extra-index-url": ("UV_INDEX", " "),
    "no-index": ("UV_NO_INDEX", None),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", None),
    "timeout": ("UV_HTTP_TIMEOUT", None),
}
# From the last to the first, as pip reads them.
SECTIONS = ("global", "install", ":env:")


def handed_on(config: str) -> dict[str, str]:
    """What `pip config list` prints, as uv's variables."""
    found: dict[str, str] = {}
    lines = [line.partition("=") for line in config.splitlines() if "=" in line]
    for section in SECTIONS:
        for key, _, value in lines:
            name = key.removeprefix(f"{section}.").replace("default-timeout", "timeout")
            if key.startswith(f"{section}.") and name in SETTINGS:
                variable, between = SETTINGS[name]
                text = ast.literal_eval(value)
                found[variable] = between.join(text.split()) if between else text
    if "UV_INDEX" in found:  # pip looks at all indexes, and takes the newest release
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return found


def main(folder: str, requirements: list[str], alone: list[str]) -> int:
    """Returns the exit status."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = os.path.join(folder, "bin", "python")
    pip = [python, "-m", "pip"]
    wanted = [["install", "-qq", *requirements]]
    if alone:
        wanted.append(["install", "-qq", "--no-deps", *alone])
    if subprocess.run([*pip, "install", "-qq", UV]).returncode:
        print("uv cannot be had here; pip installs, and takes longer", flush=True)
        return max(subprocess.run([*pip, *install]).returncode for install in wanted)
    config = subprocess.run([*pip, "config", "list"], check=True, capture_output=True, text=True).stdout
    environment = {**handed_on(config), **os.environ}
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):  # else Python keeps what it compiles, at the first import
        environment["UV_COMPILE_BYTECODE"] = "1"
    uv = [python, "-m", "uv", "pip"]
    return max(subprocess.run([*uv, *install, "--python", python], env=environment).returncode for install in wanted)


if __name__ == "__main__":
    given, _, alone = " ".join(sys.argv[2:]).partition(" --alone ")
    sys.exit(main(sys.argv[1], given.split(), alone.split()))

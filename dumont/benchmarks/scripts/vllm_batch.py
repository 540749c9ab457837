"""Answers from vLLM in this process, whose engine is stepped directly, without a server or a socket.

    python vllm_batch.py MODEL_DIRECTORY MAX_STREAMS MAX_TOKENS ENGINE_ARGUMENTS

``MAX_TOKENS``: of a prompt and its answer together. ``ENGINE_ARGUMENTS``: further ones as a JSON object.
Reads a wave as one line of JSON from standard input (``prompts`` as token ids, ``answer_tokens``), and writes
one line with the times when tokens came.
"""

import contextlib
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# flashinfer is not part of vLLM and compiles at its first use.
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import torch
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind


def engine(model: str, streams: int, tokens: int, given: dict[str, Any]) -> Any:
    settings: dict[str, Any] = {
        "model": model,
        "max_num_seqs": streams,
        "max_model_len": tokens,
        "generation_config": "vllm",
        "disable_log_stats": True,
    }
    if torch.cuda.is_available():
        settings["attention_config"] = {"backend": "FLASH_ATTN"}
    else:
        # As much as a node without a GPU has room for.
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
    return LLMEngine.from_engine_args(EngineArgs(**settings | given))


def answer(served: Any, prompts: list[list[int]], count: int) -> list[dict[str, Any]]:
    settings = SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    streams: list[dict[str, Any]] = []
    by_name: dict[str, dict[str, Any]] = {}
    for number, prompt in enumerate(prompts):
        streams.append({"sent": time.monotonic(), "arrivals": []})
        name = str(number)
        # Newer versions rename the request.
        own = served.add_request(name, {"prompt_token_ids": prompt}, settings)
        by_name |= {name: streams[-1], own or name: streams[-1]}
    while served.has_unfinished_requests():
        outputs = served.step()
        now = time.monotonic()
        for output in outputs:
            if new := len(output.outputs[0].token_ids):
                by_name[output.request_id]["arrivals"].append((now, new))
    return streams


def main() -> None:
    model, streams, tokens, given = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    # vLLM logs to standard output, which is for the answers here.
    with contextlib.redirect_stdout(sys.stderr):
        os.dup2(2, 1)
        served = engine(model, int(streams), int(tokens), json.loads(given))
        out.write("{}\n")
        out.flush()
        for line in sys.stdin:
            wave = json.loads(line)
            told = {"streams": answer(served, wave["prompts"], wave["answer_tokens"])}
            out.write(json.dumps(told) + "\n")
            out.flush()


if __name__ == "__main__":
    main()

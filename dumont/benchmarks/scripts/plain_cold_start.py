"""A plain script that asks a model a question, as anyone would write it: the baseline of benchmark and demo.

    python plain_cold_start.py MODEL_DIRECTORY PROMPT MAX_NEW_TOKENS

Prints one JSON object: ``seconds`` from the start of this process to the first token, ``phases`` that they
consist of, ``tokens`` and ``answer``.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


def seconds_since_process_start() -> float:
    start_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


IMPORTED = seconds_since_process_start()


class FirstToken(BaseStreamer):
    """Notes when the first new token comes; transformers passes the prompt first."""

    def __init__(self) -> None:
        self.calls = 0
        self.seconds = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.seconds = seconds_since_process_start()

    def end(self) -> None:
        pass


def main() -> None:
    directory, prompt, max_new_tokens = sys.argv[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    model.to(device)
    loaded = seconds_since_process_start()
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    first_token = FirstToken()
    output = model.generate(
        **inputs, max_new_tokens=int(max_new_tokens), do_sample=False, streamer=first_token
    )
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    seconds = first_token.seconds
    phases = {"imports": IMPORTED, "load": loaded - IMPORTED, "first_token": seconds - loaded}
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    sys.stdout.write(
        json.dumps({"seconds": seconds, "phases": phases, "tokens": tokens, "answer": answer}) + "\n"
    )


if __name__ == "__main__":
    main()

"""Answers as anyone gets them from transformers: ``generate`` over one static batch.

    python static_batch.py MODEL_DIRECTORY

Reads a wave as one line of JSON from standard input (``prompts`` as token ids, ``answer_tokens``), and writes
one line with the times when tokens came: each stream gets one at every step.
"""

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


class Times(BaseStreamer):
    """Notes each step; transformers passes the prompts first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.monotonic())

    def end(self) -> None:
        pass


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
    model.to(device)
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        wave = json.loads(line)
        count = wave["answer_tokens"]
        times = Times()
        sent = time.monotonic()
        prompts = torch.tensor(wave["prompts"], device=device)
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            streamer=times,
        )
        stream = {"sent": sent, "arrivals": [(at, 1) for at in times.times[1:]]}
        sys.stdout.write(json.dumps({"streams": [stream] * len(wave["prompts"])}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

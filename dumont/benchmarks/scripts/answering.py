"""A plain process that holds a model and answers one prompt at a time: what the stock pipeline checkpoints.

    python answering.py MODEL_DIRECTORY EXCHANGE_DIRECTORY MAX_NEW_TOKENS

It speaks through files, because a pipe or socket would tie it to a process that the checkpoint does not hold.
Each file appears whole, by rename: ``ready`` once the model has answered a first time; then for a ``prompt``,
which it removes, ``first_token`` and at the end ``tokens``, a JSON list.
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

POLL_SECONDS = 0.001


class FirstToken(BaseStreamer):
    """Reports when the first new token has come; transformers passes the prompt first."""

    def __init__(self, exchange: Path) -> None:
        self.exchange = exchange
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            publish(self.exchange / "first_token", "")

    def end(self) -> None:
        pass


def publish(path: Path, text: str) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_text(text)
    scratch.replace(path)


def main() -> None:
    directory, exchange, max_new_tokens = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    model.to(device)

    def answer(prompt: str) -> None:
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        streamer = FirstToken(exchange)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        publish(exchange / "tokens", json.dumps(output[0, inputs["input_ids"].shape[1] :].tolist()))

    answer("Hello")
    # CRIU refuses a file that has grown since the dump, such as a log.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    publish(exchange / "ready", "")
    prompt = exchange / "prompt"
    while True:
        if prompt.exists():
            text = prompt.read_text()
            prompt.unlink()
            answer(text)
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()

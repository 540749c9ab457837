"""After an edit of a model's files the next start is cold and says why; from then on it is fast again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import dumont
from tests.e2e.stack import Stack

pytestmark = pytest.mark.node


def test_an_edited_chat_template_is_used_from_the_next_start_on(
    criu: Path, grpcurl: Path, instruct_model: Path, free_port: Callable[[], int], tmp_path: Path
) -> None:
    # Given a deployment whose model has been captured and restored; its weights take no room here
    model = tmp_path / "model"
    shutil.copytree(instruct_model, model, copy_function=os.link)
    messages = [{"role": "user", "content": "Hello"}]
    with (
        Stack(tmp_path / "state", free_port(), free_port(), grpcurl) as stack,
        dumont.Client(stack.endpoint) as client,
    ):
        deployment = client.deploy(str(model), name="qa", start_mode="checkpoint")

        def answer() -> dumont.Generation:
            given = deployment.generate(messages=messages, max_new_tokens=2)
            client.instances.stop(given.start.instance)
            return given

        first = answer()
        assert answer().start.tier == "local"

        # When its chat template is edited
        template = model / "chat_template.jinja"
        text = template.read_text()
        template.unlink()
        template.write_text("{{ 'One, two, three. ' * 8 }}" + text)
        edited = answer()

        # Then the next start is cold, says why, and uses what is there now
        assert edited.start.tier == "cold"
        assert any("MODEL_CHANGED" in reason and template.name in reason for reason in edited.start.reasons)
        assert edited.usage.prompt_tokens > first.usage.prompt_tokens + 8

        # And the one after that comes from a snapshot of it
        again = answer()
        assert again.start.tier == "local"
        assert again.usage.prompt_tokens == edited.usage.prompt_tokens

"""The lean import gives the class itself, leaves nothing behind, and falls back when it cannot be lean.

Each in a fresh interpreter, because an import happens once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

LLAMA = "'transformers.models.llama.modeling_llama', 'LlamaForCausalLM'"


def in_fresh_interpreter(script: str) -> dict[str, Any]:
    """Run ``script``, which fills a dict called ``seen``."""
    whole = f"import json, sys\nseen = {{}}\n{script}\nprint(json.dumps(seen))"
    done = subprocess.run(
        [sys.executable, "-c", whole], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_a_class_comes_without_the_compiler_and_the_rest_when_it_is_asked_for() -> None:
    seen = in_fresh_interpreter(f"""
from model_host import lean
found = lean.import_class({LLAMA})
heavy = ("sympy", "torch._dynamo", "torch.distributed.tensor")
seen["heavy"] = [name for name in heavy if name in sys.modules]
import torch, torch._dynamo, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
seen["same"] = found is LlamaForCausalLM
seen["distributed"] = torch.distributed.is_available()
seen["compiler"] = hasattr(torch._dynamo, "optimize")
seen["version"] = transformers.__version__.split(".")[0].isdigit()
""")

    assert seen == {"heavy": [], "same": True, "distributed": True, "compiler": True, "version": True}


def test_a_library_that_wants_more_is_imported_the_plain_way() -> None:
    seen = in_fresh_interpreter(f"""
from model_host import lean
lean.SHADOWED[lean.COMPILER].clear()
found = lean.import_class({LLAMA})
config = found.config_class(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
seen["parameters"] = sum(parameter.numel() for parameter in found(config).parameters()) > 0
seen["compiler"] = "torch._dynamo" in sys.modules
""")

    assert seen == {"parameters": True, "compiler": True}


def test_a_class_that_does_not_exist_is_told_so() -> None:
    seen = in_fresh_interpreter("""
from model_host import lean
try:
    lean.import_class('transformers.models.llama.modeling_llama', 'LunarForCausalLM')
except (ImportError, AttributeError) as error:
    seen["error"] = str(error)
""")

    assert "LunarForCausalLM" in seen["error"]

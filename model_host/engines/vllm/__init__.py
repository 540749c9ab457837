"""Text generation and embeddings with vLLM, in this process and on its computing thread.

vLLM is imported when a model is loaded, not before: only an interpreter of its own has it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from model_host.engine import Phases, Settings
from model_host.engines.vllm import surroundings, versions
from model_host.model_files import ModelFiles

if TYPE_CHECKING:
    from model_host.engines.vllm.engine import Embedder, Generator


def load(files: ModelFiles, settings: Settings, phases: Phases) -> Generator | Embedder:
    """Load a model with vLLM, to generate or to embed as its architecture calls for.

    Raises:
        FailedPrecondition: MODEL_INVALID, MODEL_UNSUPPORTED, ENGINE_MISSING, ENGINE_TOO_OLD or
            DEVICE_MISSING.
        InvalidArgument: INVALID_DEVICE, or OPTION_REFUSED: vLLM does not take an option.
        ResourceExhausted: ENGINE_MEMORY, there is no room for the weights or for the KV cache.
    """
    # Before anything of vLLM is imported: most of it is read only once.
    surroundings.prepare(settings)
    with phases.measure("import_vllm"):
        versions.installed()
        importlib.import_module("vllm.v1.engine.llm_engine")
        from model_host.engines.vllm import engine
    return engine.load(files, settings, phases)

"""Which engine runs a model. Imports an engine only when it is chosen."""

from __future__ import annotations

from typing import Final

from dumont import models
from dumont.errors import InvalidArgument
from model_host.engine import Engine, Phases, Settings
from model_host.model_files import ModelFiles

NAMES: Final = ("causal_lm", "embedding", "vllm")


def choose(name: str, files: ModelFiles) -> str:
    """The engine for a model: the one named, or by default the one its architecture calls for.

    Raises:
        InvalidArgument: UNKNOWN_ENGINE.
        FailedPrecondition: MODEL_UNSUPPORTED, no engine runs this model.
    """
    if name and name not in NAMES:
        raise InvalidArgument(
            "UNKNOWN_ENGINE", f"engine must be one of {', '.join(NAMES)}; got {name[:80]!r}", field="engine"
        )
    return models.engine_of(str(files.folder), files.config, files.names, name)


def load(name: str, files: ModelFiles, settings: Settings, phases: Phases) -> Engine:
    """Import the engine called ``name`` and let it load the model.

    Raises:
        FailedPrecondition: MODEL_INVALID, MODEL_UNSUPPORTED or DEVICE_MISSING.
        InvalidArgument: INVALID_DEVICE.
        DumontError: reasons of the engine.
    """
    if name == "vllm":
        from model_host.engines import vllm

        return vllm.load(files, settings, phases)
    with phases.measure("import_torch"):
        import torch  # noqa: F401  (measured apart: it is the largest part of a cold start)
    if name == "embedding":
        from model_host.engines import embedding

        return embedding.load(files, settings, phases)
    from model_host.engines import causal_lm

    return causal_lm.load(files, settings, phases)

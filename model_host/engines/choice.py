"""Which engine runs a model. Imports an engine only when it is chosen."""

from __future__ import annotations

from typing import Final

from dumont.errors import FailedPrecondition, InvalidArgument
from model_host.engine import Engine, Phases, Settings
from model_host.model_files import ModelFiles

NAMES: Final = ("causal_lm", "embedding")
GENERATING: Final = ("ForCausalLM", "LMHeadModel")


def choose(name: str, files: ModelFiles) -> str:
    """The engine for a model: the one named, or by default the one its architecture calls for.

    Raises:
        InvalidArgument: UNKNOWN_ENGINE.
        FailedPrecondition: MODEL_UNSUPPORTED, no engine runs this architecture.
    """
    if name in NAMES:
        return name
    if name:
        raise InvalidArgument(
            "UNKNOWN_ENGINE", f"engine must be one of {', '.join(NAMES)}; got {name[:80]!r}", field="engine"
        )
    if files.architecture.endswith(GENERATING):
        return "causal_lm"
    if files.architecture.endswith("Model"):
        return "embedding"
    raise FailedPrecondition(
        "MODEL_UNSUPPORTED",
        f"No engine runs the architecture {files.architecture or '(none named)'} of {files.folder}.",
        field="model",
        metadata={"architecture": files.architecture},
    )


def load(name: str, files: ModelFiles, settings: Settings, phases: Phases) -> Engine:
    """Import the engine called ``name`` and let it load the model.

    Raises:
        FailedPrecondition: MODEL_INVALID, MODEL_UNSUPPORTED or DEVICE_MISSING.
        InvalidArgument: INVALID_DEVICE.
    """
    with phases.measure("import_torch"):
        import torch  # noqa: F401  (measured apart: it is the largest part of a cold start)
    if name == "embedding":
        from model_host.engines import embedding

        return embedding.load(files, settings, phases)
    from model_host.engines import causal_lm

    return causal_lm.load(files, settings, phases)

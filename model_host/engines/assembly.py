"""Build a transformers model around mapped weights, without a copy of them and without initialising any."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from dumont import models
from dumont.errors import DumontError, FailedPrecondition, InvalidArgument
from model_host import lean
from model_host.delivery import extents
from model_host.engine import Phases, Settings, WeightsPlace
from model_host.model_files import ModelFiles, invalid
from model_host.weights import Weights, map_shards

log = logging.getLogger(__name__)


# What configurations call the number of positions.
POSITIONS: Final = ("max_position_embeddings", "max_target_positions", "max_seq_len", "n_positions")


class NotAssembled(Exception):
    """This model needs more than its files mapped; transformers' own loader must do it."""


def choose_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one, else the CPU.

    Raises:
        InvalidArgument: INVALID_DEVICE.
        FailedPrecondition: DEVICE_MISSING.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    ordinal = "0" if name in ("auto", "cuda") else name.removeprefix("cuda:")
    if not ordinal.isdigit():
        raise InvalidArgument(
            "INVALID_DEVICE", f"device must be auto, cpu or cuda:N; got {name[:80]!r}", field="device"
        )
    count = torch.cuda.device_count()
    if int(ordinal) >= count:
        raise FailedPrecondition(
            "DEVICE_MISSING", f"{name} was asked for; this process sees {count} GPUs.", field="device"
        )
    return torch.device("cuda", int(ordinal))


def build(
    files: ModelFiles,
    settings: Settings,
    phases: Phases,
    architecture: str = "",
    dispensable: tuple[str, ...] = (),
) -> tuple[Any, Weights]:
    """The model on its device, ready for inference, and its weights.

    Args:
        architecture: the class to build; by default the one that the files name.
        dispensable: beginnings of the names of weights that the files need not have; they are then zero.

    Raises:
        FailedPrecondition: MODEL_INVALID, MODEL_UNSUPPORTED or DEVICE_MISSING.
        InvalidArgument: INVALID_DEVICE.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    if device.type == "cuda":
        # It compiles kernels when a shape is new, in the middle of an answer, and keeps its compiler loaded.
        torch.backends.cuda.enable_cudnn_sdp(False)
    with phases.measure("import_model"):
        model_class = _model_class(files, architecture or files.architecture)
    with phases.measure("load_weights"):
        tensors = map_shards(files.shards)
        names: dict[str, str] = {}
        try:
            model, names = _assemble(model_class, files, tensors, dispensable)
        except DumontError:
            raise
        except Exception as error:
            # As text: a log record that held the error would keep the files mapped.
            log.warning("%s is loaded by transformers' own loader: %s", files.folder, str(error))
            model, names = _load_plainly(model_class, files, dispensable), {}
        model.eval().requires_grad_(False)
        if settings.weights is WeightsPlace.INCLUDED:
            names = {}
            if device.type == "cpu":  # what moves to a GPU is copied anyway
                _own(model)
        weights = _weigh(model, names, tensors, files, device)
        if device.type == "cuda":
            if settings.loader is not None:
                weights.order(settings.loader, settings.gpu)
            weights.attach()
            model.to(device)  # what is not mapped: buffers
    return model, weights


def positions(model: Any) -> int | None:
    """How many tokens the model has positions for; None if there is no such limit."""
    config = model.config.get_text_config()
    known = [getattr(config, name, None) for name in POSITIONS]
    found = [count for count in known if isinstance(count, int) and count > 0]
    for name, module in model.named_modules():
        # As in RoBERTa, whose positions begin after that of the padding.
        if not isinstance(module, nn.Embedding) or not name.endswith("position_embeddings"):
            continue
        if module.padding_idx is not None:
            found.append(module.num_embeddings - module.padding_idx - 1)
    return min(found, default=None)


def _model_class(files: ModelFiles, name: str) -> Any:
    kind = str(files.config.get("model_type", "")).replace("-", "_")
    try:
        for package in (kind, kind.rpartition("_")[0]):  # gemma3_text is in gemma3
            if package.isidentifier() and _modeling_file(package).exists():
                return lean.import_class(f"transformers.models.{package}.modeling_{package}", name)
        return getattr(importlib.import_module("transformers"), name)
    except (ImportError, AttributeError) as error:
        why = f"this transformers has no {name or '(no architecture named)'}"
        if files.config.get("auto_map"):
            why += "; its code is in its own repository, and no model's code is run here"
        raise models.unsupported(
            str(files.folder), why, "Deploy a model whose architecture transformers has.", name
        ) from error


def _modeling_file(package: str) -> Path:
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "models" / package / f"modeling_{package}.py"


def _assemble(
    model_class: Any, files: ModelFiles, tensors: dict[str, torch.Tensor], dispensable: tuple[str, ...]
) -> tuple[Any, dict[str, str]]:
    """The model around the mapped tensors, and the name of each parameter's tensor."""
    from transformers.initialization import no_init_weights

    if "quantization_config" in files.config:
        raise NotAssembled("quantised weights are converted while loading")
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) != 1:
        raise NotAssembled(f"its files hold {len(dtypes)} floating point types")
    config = model_class.config_class.from_dict(files.config)
    with no_init_weights(), _parameters_on_meta():
        model = model_class._from_config(config, dtype=dtypes.pop())
    names = _match(model, tensors)
    sources = {parameter: tensors[name] for parameter, name in names.items()}
    try:
        missing, _ = model.load_state_dict(sources, strict=False, assign=True)
    except RuntimeError as error:
        raise invalid(files.shards[0], f"does not fit config.json ({error})") from error
    model.tie_weights(missing_keys=set(missing))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and name.startswith(dispensable):
            module, _, short = name.rpartition(".")
            zero = nn.Parameter(torch.zeros_like(parameter, device="cpu"), requires_grad=False)
            setattr(model.get_submodule(module), short, zero)
    hollow = [name for name, value in chain(model.named_parameters(), model.named_buffers()) if value.is_meta]
    if hollow:
        raise NotAssembled(f"its files do not hold {', '.join(hollow[:5])}")
    return model, names


def _match(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """The names of the tensors that the model has a place for, by its own names for them.

    A checkpoint saved with a head, or without, has one prefix more or less than the model.
    """
    prefix = f"{model.base_model_prefix}."
    known = model.state_dict().keys()
    matched = {}
    for name in tensors:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in known:
                matched[candidate] = name
                break
    return matched


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory, but real buffers: those are computed."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _load_plainly(model_class: Any, files: ModelFiles, dispensable: tuple[str, ...]) -> Any:
    try:
        model, report = model_class.from_pretrained(
            files.folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise invalid(
            files.folder / "config.json",
            f"describes a model that transformers cannot load ({error})",
            "Fetch the model again if its files may be damaged; otherwise deploy another model.",
        ) from error
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith(dispensable)):
        raise _lacking(model, files, missing)
    return model


def _lacking(model: Any, files: ModelFiles, missing: list[str]) -> FailedPrecondition:
    """The error for weights that no file holds."""
    head = model.get_output_embeddings()
    if head is not None and all(_holds(model, name, head) for name in missing):
        return invalid(
            files.shards[0],
            f"has no {missing[0]}, and config.json does not tie the output layer to the embeddings",
            'If the model was trained with them tied, add "tie_word_embeddings": true to config.json; '
            "otherwise fetch a complete copy of the model.",
        )
    return invalid(files.shards[0], f"lacks the weights {', '.join(missing[:5])}")


def _holds(model: Any, name: str, module: nn.Module) -> bool:
    return any(model.get_parameter(name) is parameter for parameter in module.parameters())


def _own(model: Any) -> None:
    """Give the model memory of its own in place of mapped files, which then nothing maps any more."""
    for value in chain(model.parameters(), model.buffers()):  # tied ones once
        value.data = value.data.clone()


def _weigh(
    model: Any,
    names: dict[str, str],
    tensors: dict[str, torch.Tensor],
    files: ModelFiles,
    device: torch.device,
) -> Weights:
    parameters = dict(model.named_parameters())  # tied ones once, under their first name
    known = {parameter: name for parameter, name in names.items() if parameter in parameters}
    lie = extents(files.shards)
    return Weights(
        parameters,
        {parameter: tensors[name] for parameter, name in known.items()},
        device,
        {parameter: lie[name] for parameter, name in known.items()},
    )

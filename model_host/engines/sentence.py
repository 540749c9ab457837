"""What a model directory says about sentence embeddings: how texts are prepared, and how the vectors of their
tokens become one vector.

A directory describes that as a chain of modules in ``modules.json``, which sentence-transformers wrote:
Transformer, Pooling, and after it Dense, LayerNorm, Normalize. A chain is followed as a whole or refused.

Source: sentence-transformers 6.2, ``base/modules`` and ``sentence_transformer/modules``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dumont import model_directory, models
from dumont.errors import FailedPrecondition
from model_host.model_files import Json, ModelFiles, invalid

# Where the settings of a Transformer module may be.
SETTINGS: Final = (
    "sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json",
    "sentence_camembert_config.json", "sentence_albert_config.json", "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)  # fmt: skip
PROMPTS: Final = "config_sentence_transformers.json"

# Settings that change what is computed in ways that are not followed here, and the values with which they do
# not.
NOT_FOLLOWED: Final[dict[str, tuple[Any, ...]]] = {
    "transformer_task": (None, "feature-extraction"),
    "module_output_name": (None, "token_embeddings"),
    "processing_kwargs": (None, {}),
    "query_expansion": (None, {}),
    "query_length": (None,),
    "document_length": (None,),
}
# Arguments with which sentence-transformers loads the model, its tokenizer and its configuration, and those
# that change no vector of a text that is computed alone.
ARGUMENTS: Final = (
    "model_args", "model_kwargs", "tokenizer_args", "tokenizer_kwargs", "processor_kwargs", "config_args",
    "config_kwargs",
)  # fmt: skip
HARMLESS_ARGUMENTS: Final = frozenset(
    {"add_pooling_layer", "attn_implementation", "padding_side", "trust_remote_code", "use_fast"}
)
# What is taken of the model for a text; other kinds of input are not served.
TEXT_OUTPUT: Final = {"method": "forward", "method_output_name": "last_hidden_state"}

# What an older Pooling says with a boolean for each mode, in sentence-transformers' order.
FORMER_MODES: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# Encoders whose model would also want something to decode.
ENCODER_HALVES: Final = {
    "t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel", "switch_transformers": "SwitchTransformersEncoderModel",
}  # fmt: skip


# Vectors of tokens, shape (texts, tokens, size), and which of them count, shape (texts, tokens); gives one
# vector for each text.
Pool = Callable[[Tensor, Tensor], Tensor]


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states)), mask.int().argmax(1)]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states)), mask.shape[1] - 1 - mask.flip(1).int().argmax(1)]


def _most(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)


def _weighted(states: Tensor, weights: Tensor) -> Tensor:
    weight = weights.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def _mean_by_root(states: Tensor, mask: Tensor) -> Tensor:
    return _weighted(states, mask) * mask.sum(1, keepdim=True).to(states.dtype).sqrt()


def _position_weighted(states: Tensor, mask: Tensor) -> Tensor:
    return _weighted(states, mask * torch.arange(1, mask.shape[1] + 1, device=mask.device))


MODES: Final[dict[str, Pool]] = {
    "cls": _first,
    "max": _most,
    "mean": _weighted,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _position_weighted,
    "lasttoken": _last,
}


@dataclass(frozen=True)
class Recipe:
    """How a model's texts become vectors.

    Attributes:
        modes: of pooling; their vectors are joined in this order.
        after: what happens to the vector then, on the CPU, in order.
        prompt: comes before each text.
        prompt_counts: whether the tokens of the prompt are pooled.
        longest: tokens that a text may have, if the directory says so.
        lower: whether texts are put in lower case.
    """

    modes: tuple[str, ...] = ("mean",)
    after: tuple[nn.Module, ...] = ()
    prompt: str = ""
    prompt_counts: bool = True
    longest: int | None = None
    lower: bool = False

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """One vector for each text, before what comes ``after``.

        Args:
            states: of tokens, shape (texts, tokens, size).
            mask: 1 for tokens that are pooled, shape (texts, tokens).
        """
        return torch.cat([MODES[mode](states, mask) for mode in self.modes], dim=-1)

    def finish(self, vectors: Tensor) -> Tensor:
        """What comes after pooling; on the CPU, in single precision."""
        for module in self.after:
            vectors = module(vectors)
        return vectors


class Normalize(nn.Module):
    """Scales vectors to length one."""

    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=-1)


class Truncate(nn.Module):
    """Keeps the first values of vectors; ``size``: how many."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors[..., : self.size]


class Dense(nn.Module):
    """A linear layer and its activation; with ``residual``, the input is added to what they give."""

    def __init__(self, linear: nn.Linear, activation: nn.Module, residual: nn.Module | None) -> None:
        super().__init__()
        self.linear = linear
        self.activation = activation
        self.residual = residual

    def forward(self, vectors: Tensor) -> Tensor:
        found: Tensor = self.activation(self.linear(vectors))
        return found if self.residual is None else found + self.residual(vectors)


def architecture(files: ModelFiles) -> str:
    """The class that computes the vectors of tokens: the model without a head, or its encoder alone."""
    kind = str(files.config.get("model_type", ""))
    if kind in ENCODER_HALVES:
        return ENCODER_HALVES[kind]
    if files.architecture.endswith("Model") and not files.architecture.endswith("LMHeadModel"):
        return files.architecture
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    known = MODEL_MAPPING_NAMES.get(kind, files.architecture)
    return known if isinstance(known, str) else str(known[0])


def read(files: ModelFiles) -> Recipe:
    """The recipe of a model directory; without ``modules.json`` the mean of all tokens.

    Raises:
        FailedPrecondition: MODEL_UNSUPPORTED, it is not followed here; MODEL_INVALID, a file is damaged.
    """
    if models.MODULES not in files.names:
        return Recipe()
    modules = files.json(models.MODULES, kind=list)
    kinds = [_kind(files, module) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        found = ", ".join(kinds) or "no modules"
        raise _not_followed(files, f"{models.MODULES} has {found}; it must begin with Transformer, Pooling")
    if modules[0].get("path"):
        raise _not_followed(files, f"its Transformer is in a directory of its own, {modules[0]['path']}")
    settings = _settings(files)
    modes, prompt_counts = _modes(files, _config(files, modules[1]))
    config = files.json(PROMPTS) if PROMPTS in files.names else {}
    after = [READERS[kind](files, module) for kind, module in zip(kinds[2:], modules[2:], strict=True)]
    if config.get("truncate_dim") is not None:
        after.append(_truncate(files, config["truncate_dim"]))
    return Recipe(
        modes=modes,
        after=tuple(after),
        prompt=_prompt(files, config),
        prompt_counts=prompt_counts,
        longest=_longest(settings),
        lower=settings.get("do_lower_case") is True,
    )


def _kind(files: ModelFiles, module: Any) -> str:
    name = str(module.get("type", "")) if isinstance(module, dict) else ""
    package, _, kind = name.rpartition(".")
    if not package.startswith("sentence_transformers"):
        raise _not_followed(files, f"{models.MODULES} names {name[:120] or 'a module without a type'}")
    if kind not in ("Transformer", "Pooling", *READERS):
        raise _not_followed(files, f"{models.MODULES} names the module {kind[:40]}")
    return kind


def _config(files: ModelFiles, module: Json, *, needed: bool = True) -> Json:
    name = f"{module.get('path', '')}/config.json"
    if name in files.names:
        found: Json = files.json(name)
        return found
    if needed:
        raise invalid(files.folder / name, "is missing")
    return {}


def _settings(files: ModelFiles) -> Json:
    settings: Json = next((files.json(name) for name in SETTINGS if name in files.names), {})
    for name, harmless in NOT_FOLLOWED.items():
        if settings.get(name) not in harmless:
            raise _not_followed(files, f"its Transformer has {name} {str(settings[name])[:80]!r}")
    for name in ARGUMENTS:
        if followed := set(settings.get(name) or {}) - HARMLESS_ARGUMENTS:
            raise _not_followed(files, f"its Transformer has {min(followed)[:40]} in {name}")
    outputs = settings.get("modality_config")
    if outputs is not None and outputs.get("text") != TEXT_OUTPUT:
        found = str(outputs.get("text"))[:120]
        raise _not_followed(files, f"its Transformer has a modality_config with {found} for text")
    return settings


def _longest(settings: Json) -> int | None:
    longest = settings.get("max_seq_length")
    return longest if isinstance(longest, int) and longest > 0 else None


def _modes(files: ModelFiles, config: Json) -> tuple[tuple[str, ...], bool]:
    given = config.get("pooling_mode")
    if given is None:
        given = [mode for key, mode in FORMER_MODES.items() if config.get(key)] or ["mean"]
    modes = (given,) if isinstance(given, str) else tuple(map(str, given))
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise _not_followed(files, f"its Pooling has the mode {unknown[0][:40]!r}")
    return modes, config.get("include_prompt", True) is not False


def _truncate(files: ModelFiles, size: Any) -> nn.Module:
    if not isinstance(size, int) or size < 1:
        raise invalid(files.folder / PROMPTS, f"has truncate_dim {str(size)[:40]}, which is no size")
    return Truncate(size)


def _prompt(files: ModelFiles, config: Json) -> str:
    """The prompt that the model's own library puts before a text when the caller names none."""
    kind = config.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise _not_followed(files, f"it is a {str(kind)[:40]}, which gives no single vector for a text")
    name = config.get("default_prompt_name")
    prompts = config.get("prompts") or {}
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise _not_followed(files, f"its default_prompt_name is {str(name)[:40]!r}, which prompts lacks")
    return str(prompts[name])


def _normalize(files: ModelFiles, module: Json) -> nn.Module:
    _must_be_of_the_sentence(files, _config(files, module, needed=False), "Normalize")
    return Normalize()


def _dropout(files: ModelFiles, module: Json) -> nn.Module:
    return nn.Identity()  # it only acts in training


def _layer_norm(files: ModelFiles, module: Json) -> nn.Module:
    file, tensors = _tensors(files, module)
    weight = _take(file, tensors, "norm.weight")
    norm: nn.Module = _filled(
        file, nn.LayerNorm(len(weight)), {"weight": weight, "bias": _take(file, tensors, "norm.bias")}
    )
    return norm


def _dense(files: ModelFiles, module: Json) -> nn.Module:
    config = _config(files, module)
    _must_be_of_the_sentence(files, config, "Dense")
    file, tensors = _tensors(files, module)
    weight = _take(file, tensors, "linear.weight")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias="linear.bias" in tensors)
    bias = {"bias": tensors["linear.bias"]} if "linear.bias" in tensors else {}
    residual: nn.Module | None = None
    if config.get("use_residual"):
        residual = nn.Identity()
        if weight.shape[0] != weight.shape[1]:
            residual = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            residual = _filled(file, residual, {"weight": _take(file, tensors, "residual.weight")})
    return Dense(_filled(file, linear, {"weight": weight, **bias}), _activation(files, config), residual)


READERS: Final[dict[str, Callable[[ModelFiles, Json], nn.Module]]] = {
    "Dense": _dense,
    "Dropout": _dropout,
    "LayerNorm": _layer_norm,
    "Normalize": _normalize,
}


def _must_be_of_the_sentence(files: ModelFiles, config: Json, kind: str) -> None:
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise _not_followed(files, f"its {kind} has {name} {str(config[name])[:40]!r}")


def _activation(files: ModelFiles, config: Json) -> nn.Module:
    """The activation of a Dense module, which names a class of torch's."""
    if "activation_function" not in config:
        return nn.Tanh()
    name = str(config["activation_function"])
    found = getattr(nn, name.rpartition(".")[2], None)
    if not name.startswith("torch.nn.") or not isinstance(found, type) or not issubclass(found, nn.Module):
        raise _not_followed(files, f"its Dense has the activation {name[:80]}")
    try:
        activation: nn.Module = found()
    except TypeError:
        raise _not_followed(files, f"its Dense has the activation {name[:80]}") from None
    return activation


def _tensors(files: ModelFiles, module: Json) -> tuple[Path, dict[str, Tensor]]:
    """The weights of a module, in memory of their own."""
    path = str(module.get("path", ""))
    name = f"{path}/{models.WEIGHTS}"
    file = files.folder / name
    if name not in files.names:
        if any(f"{path}/" in known and known.endswith(".bin") for known in files.names):
            raise models.unsupported(
                str(files.folder),
                f"the weights of its module {path} are pickled by PyTorch, which may run code when read",
                "Save the model again: SentenceTransformer(DIRECTORY).save(DIRECTORY).",
            )
        raise invalid(file, "is missing")
    try:
        model_directory.check_weights(file)
        return file, {key: value.float().clone() for key, value in load_file(file).items()}
    except Exception as error:
        raise invalid(file, f"is truncated or corrupt ({error})") from error


def _take(file: Path, tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise invalid(file, f"lacks the weights {name}")
    return tensors[name]


def _filled(file: Path, module: nn.Module, tensors: dict[str, Tensor]) -> Any:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise invalid(file, f"does not fit ({error})") from error
    return module.eval().requires_grad_(False)


def _not_followed(files: ModelFiles, why: str) -> FailedPrecondition:
    return models.unsupported(
        str(files.folder),
        f"{why}, and its vectors would be others than sentence-transformers'",
        "Deploy a model whose modules are Transformer, Pooling, and then Dense, LayerNorm or Normalize.",
        files.architecture,
    )

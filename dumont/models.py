"""Which engine runs a model, and whether one does.

One decision for snapshotd, which takes it when a model is deployed, and for the model host, which loads the
model. It needs the model's configuration and the names of its files, and reads no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from typing import Any, Final

from dumont.engines import CAUSAL_LM, EMBEDDING
from dumont.errors import FailedPrecondition

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
# What a sentence embedding model is made of.
MODULES: Final = "modules.json"

# Ends of the names of architectures that generate text from text, and whole names beside them.
GENERATING: Final = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "BertGenerationDecoder")

# Architectures that generate text and are not served, and why. docs/models.md has the comparison of every
# architecture with transformers from which this follows; a test repeats it.
NO_CACHE: Final = "its answers come out otherwise with the cache that each request has for itself"
OWN_POSITIONS: Final = (
    "transformers' generate() gives its tokens other positions than the model was trained with"
)
NOT_ONLY_TEXT: Final = "it takes or makes sound or pictures with its text"
DRAFTS: Final = "it only drafts tokens for another model"
NOT_TRIED: Final = "nobody has compared its answers here with transformers' yet"
REFUSED: Final = {
    **dict.fromkeys(
        (
            "BambaForCausalLM", "BltForCausalLM", "CpmAntForCausalLM", "MiniMaxForCausalLM",
            "OpenAIGPTLMHeadModel", "ProphetNetForCausalLM", "RecurrentGemmaForCausalLM",
            "ReformerModelWithLMHead", "RwkvForCausalLM", "XLMWithLMHeadModel", "XLNetLMHeadModel",
        ),
        NO_CACHE,
    ),
    **dict.fromkeys(
        (
            "CamembertForCausalLM", "Data2VecTextForCausalLM", "RobertaForCausalLM",
            "RobertaPreLayerNormForCausalLM", "XLMRobertaForCausalLM", "XLMRobertaXLForCausalLM",
            "XmodForCausalLM",
        ),
        OWN_POSITIONS,
    ),
    **dict.fromkeys(
        (
            "FuyuForCausalLM", "MoshiForCausalLM", "MusicgenForCausalLM", "MusicgenMelodyForCausalLM",
            "WhisperForCausalLM",
        ),
        NOT_ONLY_TEXT,
    ),
    **dict.fromkeys(("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"), DRAFTS),
    **dict.fromkeys(("Dots3NoteForCausalLM", "xLSTMForCausalLM"), NOT_TRIED),
}  # fmt: skip
UNTRIED: Final = frozenset(name for name, why in REFUSED.items() if why in (NOT_ONLY_TEXT, DRAFTS, NOT_TRIED))

# Encoders of text, by model_type. sentence-transformers takes the mean of their token vectors where no
# modules.json says otherwise, and so do we.
ENCODERS: Final = frozenset(
    {
        "albert", "bert", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2",
        "distilbert", "electra", "ernie", "eurobert", "gte", "jina_embeddings_v3",
        "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "mpnet", "nomic_bert",
        "nystromformer", "rembert", "roberta", "roberta-prelayernorm", "roformer", "squeezebert",
        "xlm-roberta", "xlm-roberta-xl",
    }
)  # fmt: skip

# Other things that a model may do, by the end of its architecture's name.
OTHER_TASKS: Final = {
    "ForSequenceClassification": "it scores or classifies texts, as rerankers do",
    "ForTokenClassification": "it labels the tokens of a text",
    "ForQuestionAnswering": "it marks answers in a text",
    "ForMultipleChoice": "it chooses among texts",
    "ForNextSentencePrediction": "it scores pairs of texts",
    "ForConditionalGeneration": "it has an encoder for its input, or takes pictures or sound",
    "ForSpeechSeq2Seq": "it takes sound",
    "ForCTC": "it takes sound",
    "ForImageClassification": "it takes pictures",
    "ForVision2Seq": "it takes pictures",
    "ForImageTextToText": "it takes pictures",
}
GENERATING_OR_EMBEDDING: Final = "Deploy a model that generates text or embeds it."

# Formats of weights other than safetensors: patterns of file names, what they are, and what to do.
SAVE_AGAIN: Final = (
    "load it with transformers where you trust it and save it again with save_pretrained(DIRECTORY), which "
    "writes safetensors"
)
FORMATS: Final = (
    (
        ("*.gguf",),
        "GGUF, the format of llama.cpp",
        "deploy the repository from which the GGUF files were made; it has safetensors",
    ),
    (
        ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin"),
        "pickled by PyTorch, which may run code when it is read",
        SAVE_AGAIN,
    ),
    (("tf_model*.h5",), "TensorFlow's", SAVE_AGAIN + " (from_tf=True)"),
    (("flax_model*.msgpack",), "Flax's", SAVE_AGAIN + " (from_flax=True)"),
    (("*.onnx", "*.onnx_data"), "ONNX", "deploy the repository from which they were exported"),
)
# Pickled as well, but no weights.
NO_WEIGHTS: Final = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"})
ADAPTER: Final = "adapter_config.json"

# Files from which the tokenizers library makes a tokenizer without others.
TOKENIZER: Final = "tokenizer.json"
CONVERTIBLE: Final = (("vocab.json", "merges.txt"), ("vocab.txt",))
SENTENCEPIECE: Final = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.spm")
TIKTOKEN: Final = ("tekken.json", "tiktoken.model", "*.tiktoken")


def engine_of(name: str, config: Mapping[str, Any], files: Collection[str], asked: str = "") -> str:
    """The engine that runs a model.

    Args:
        name: the model's, for messages.
        config: its config.json.
        files: paths of its files, relative to its directory.
        asked: the engine that the caller names, which must be one that there is; by default the one that the
            architecture calls for.

    Raises:
        FailedPrecondition: MODEL_UNSUPPORTED; the message says why, and what to do.
    """
    if asked not in ("", CAUSAL_LM, EMBEDDING):
        return asked
    architecture = architecture_of(config)
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "a method not named") if isinstance(quantised, dict) else ""
        raise unsupported(
            name,
            f"its weights are quantised ({method}), and are computed here only as they are",
            "Deploy the model from which it was quantised.",
            architecture,
        )
    _check_tokenizer(name, files, architecture)
    generates = architecture.endswith(GENERATING)
    if asked == EMBEDDING or (not asked and MODULES in files and not _scores(architecture, files)):
        return EMBEDDING
    if generates and architecture in REFUSED:
        raise unsupported(
            name,
            f"no engine runs {architecture} right: {REFUSED[architecture]}",
            GENERATING_OR_EMBEDDING,
            architecture,
        )
    if generates:
        return CAUSAL_LM
    if not asked and _encodes(architecture) and config.get("model_type") in ENCODERS:
        return EMBEDDING
    raise unsupported(name, *_why_not(config, architecture, asked), architecture)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first of a configuration's ``architectures``; empty where there is none."""
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def weight_files(name: str, files: Collection[str], index: Callable[[], Any]) -> list[str]:
    """The names of the safetensors files with a model's weights.

    As transformers chooses them: the single file goes before an index.

    Args:
        name: the model's, for messages.
        files: paths of its files, relative to its directory.
        index: reads the index, if it is needed.

    Raises:
        FailedPrecondition: MODEL_UNSUPPORTED, its weights are in another format; or what ``index`` raises.
        ValueError: the index has no map of weights, or leads out of the directory.
    """
    if WEIGHTS in files:
        return [WEIGHTS]
    if INDEX in files:
        content = index()
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        for file in names:
            if not file or "/" in file or file in (".", ".."):
                raise ValueError(f"names a file outside the model directory: {file[:120]!r}")
        return names
    if ADAPTER in files:
        raise unsupported(
            name,
            "it is an adapter, such as LoRA, without the model that it adapts",
            "Merge it into that model (peft: merge_and_unload, then save_pretrained) and deploy the result.",
        )
    for patterns, what, advice in FORMATS:
        if (
            found := {file for file in files if any(fnmatch(file, pattern) for pattern in patterns)}
            - NO_WEIGHTS
        ):
            raise unsupported(
                name,
                f"it has no safetensors files; its weights are {what} ({min(found)})",
                f"To serve it, {advice}.",
            )
    if found := {file for file in files if fnmatch(file, "*.safetensors") and "/" not in file}:
        raise unsupported(
            name,
            f"it has {min(found)}, but neither {WEIGHTS} nor {INDEX}, which say how transformers reads it",
            "Deploy the repository in transformers' format.",
        )
    return [WEIGHTS]


def unsupported(name: str, why: str, advice: str, architecture: str = "") -> FailedPrecondition:
    """The error for a model that nothing here serves.

    Args:
        why: continues "… cannot be served: ".
        advice: whole sentences.
    """
    return FailedPrecondition(
        "MODEL_UNSUPPORTED",
        f"the model {name[:120]!r} cannot be served: {why}. {advice}",
        field="model",
        metadata={"model": name[:120], **({"architecture": architecture} if architecture else {})},
    )


def _scores(architecture: str, files: Collection[str]) -> bool:
    """Whether a model with ``MODULES`` is a cross-encoder: those have no module that pools."""
    return architecture.endswith("ForSequenceClassification") and not any("Pooling" in file for file in files)


def _encodes(architecture: str) -> bool:
    return architecture.endswith(("Model", "ForMaskedLM", "ForPreTraining"))


def _why_not(config: Mapping[str, Any], architecture: str, asked: str) -> tuple[str, str]:
    """Why no engine runs a model, and what to do."""
    if not architecture:
        return (
            "config.json names no architectures",
            'Add those that the weights were saved with, such as "architectures": ["LlamaForCausalLM"].',
        )
    if asked == CAUSAL_LM:
        return (
            f"{architecture} has no head with which to generate text",
            "Leave engine out, or deploy a model whose architecture ends in ForCausalLM.",
        )
    for end, task in OTHER_TASKS.items():
        if architecture.endswith(end):
            return f"no engine runs {architecture}: {task}", GENERATING_OR_EMBEDDING
    if _encodes(architecture):
        kind = config.get("model_type") or architecture
        return (
            f"{architecture} has no head with which to generate text, and no {MODULES} says how the vectors "
            f"of {str(kind)[:40]} become one",
            f"Deploy a repository with {MODULES}, or name engine embedding to take their mean.",
        )
    return f"no engine runs {architecture[:80]}", GENERATING_OR_EMBEDDING


def _check_tokenizer(name: str, files: Collection[str], architecture: str) -> None:
    known = {file for file in files if "/" not in file}
    if has_tokenizer(files):
        return
    for patterns, whose, library in (
        (SENTENCEPIECE, "SentencePiece's", "sentencepiece"),
        (TIKTOKEN, "tiktoken's", "tiktoken"),
    ):
        if found := [file for file in known if any(fnmatch(file, pattern) for pattern in patterns)]:
            raise unsupported(
                name,
                f"its tokenizer is only in {whose} format ({min(found)})",
                f"Make a tokenizer.json of it where {library} is installed: "
                "AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY).",
                architecture,
            )


def has_tokenizer(files: Collection[str], *, of_any_format: bool = False) -> bool:
    """Whether ``files``, paths relative to a model's directory, hold a tokenizer.

    Args:
        of_any_format: also those that are not read without further libraries, which vLLM brings.
    """
    if of_any_format and any(fnmatch(file, form) for file in files for form in (*SENTENCEPIECE, *TIKTOKEN)):
        return True
    return TOKENIZER in files or any(set(files).issuperset(needed) for needed in CONVERTIBLE)

"""Text to tokens and back, on the ``tokenizers`` library alone: a start need not wait for more."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from dumont import limits, models
from dumont.errors import FailedPrecondition, InvalidArgument
from model_host.engine import Message
from model_host.model_files import ModelFiles, invalid

SPECIAL_TOKENS: Final = "special_tokens_map.json"

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from model_host.engines.sandbox import Sandbox


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """The model's tokenizer, neither padding nor truncating.

    Raises:
        FailedPrecondition: MODEL_INVALID.
    """
    # Its thread pool would be one more thing to freeze, and a prompt at a time gains nothing from it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    if not models.has_tokenizer(files.names, of_any_format=True):
        # Of nothing transformers makes a tokenizer that knows no words.
        raise invalid(files.tokenizer, "is missing")

    data = files.read_tokenizer()
    try:
        tokenizer = Tokenizer.from_buffer(data) if data is not None else _convert(files)
        if data is not None and _is_rebuilt(files, tokenizer):
            tokenizer = _convert(files)
    except Exception as error:
        raise invalid(files.tokenizer, f"cannot be loaded ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def lower_case(tokenizer: Tokenizer) -> None:
    """Let a tokenizer put its texts in lower case first."""
    from tokenizers import normalizers

    known = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *known])


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> int:
    """How many tokens a prompt puts before a text, with special ones before it."""
    if not prompt:
        return 0
    tokens = tokenizer.encode(prompt).ids
    return len(tokens) - (tokens[-1] in special_tokens(tokenizer))


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The tokens that are not part of any text, and how they are written."""
    return {
        number: token.content
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }


def _is_rebuilt(files: ModelFiles, tokenizer: Tokenizer) -> bool:
    """Whether transformers makes another tokenizer of these files than tokenizer.json describes.

    It does where tokenizer_config.json says something else, or names a special token that the other file
    lacks. Llama's class has defaults of its own: a space before a text, but not before each of its pieces.
    """
    settings = files.tokenizer_config
    normalizers, splitters = _parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)
    if str(settings.get("tokenizer_class", "")).startswith("LlamaTokenizer"):
        first = "always" if settings.get("legacy") else "first"
        spaces = "never" if settings.get("add_prefix_space") is False else first
        if not any(part["type"] == "Metaspace" and part["prepend_scheme"] == spaces for part in splitters):
            return True
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if not _special_tokens_named(files) <= known:
        return True
    described: list[tuple[str, Any]] = []
    bert = next((part for part in normalizers if part["type"] == "BertNormalizer"), None)
    if bert:
        described += [
            ("do_lower_case", bert["lowercase"]),
            ("strip_accents", bert["strip_accents"]),
            ("tokenize_chinese_chars", bert["handle_chinese_chars"]),
        ]
    else:
        described.append(("do_lower_case", any(part["type"] == "Lowercase" for part in normalizers)))
    for part in splitters:
        if part["type"] == "ByteLevel":
            described.append(("add_prefix_space", part["add_prefix_space"]))
        if part["type"] == "Metaspace":
            described.append(("add_prefix_space", part["prepend_scheme"] != "never"))
    return any(settings.get(name) not in (None, value) for name, value in described)


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normalizer or a pre-tokenizer as tokenizer.json describes it, those in a sequence one by one."""
    if component is None:
        return []
    described = json.loads(component.__getstate__())
    parts: list[dict[str, Any]] = (
        described.get("normalizers") or described.get("pretokenizers") or [described]
    )
    return parts


def _special_tokens_named(files: ModelFiles) -> set[str]:
    """The special tokens that files beside tokenizer.json name."""
    settings = named_tokens(files)
    tokens = [token for name, token in settings.items() if name.endswith("_token")]
    tokens += settings.get("additional_special_tokens") or []
    tokens += (settings.get("added_tokens_decoder") or {}).values()
    contents = {token.get("content") if isinstance(token, dict) else token for token in tokens}
    return {content for content in contents if isinstance(content, str)}


def named_tokens(files: ModelFiles) -> dict[str, Any]:
    """What tokenizer_config.json says, and special_tokens_map.json, where older models name tokens."""
    named = files.json(SPECIAL_TOKENS) if SPECIAL_TOKENS in files.names else {}
    return {**named, **files.tokenizer_config}


def _convert(files: ModelFiles) -> Tokenizer:
    """As transformers makes it, also from older formats."""
    from transformers import AutoTokenizer

    backend: Tokenizer = AutoTokenizer.from_pretrained(files.folder, local_files_only=True).backend_tokenizer
    return backend


def encode_inputs(
    tokenizer: Tokenizer, inputs: Sequence[str], context_length: int, values: int, prompt: str = ""
) -> list[list[int]]:
    """The tokens of texts to be embedded.

    Args:
        context_length: the most tokens that one may have.
        values: of each vector; 0 if that is not known.
        prompt: comes before each text.

    Raises:
        InvalidArgument: reasons of ``limits.check_embed`` and ``check_answer``, PROMPT_TOO_LONG.
    """
    limits.check_embed(inputs)
    limits.check_answer(len(inputs), values)
    tokens = [encoding.ids for encoding in tokenizer.encode_batch([prompt + text for text in inputs])]
    longest = max(range(len(tokens)), key=lambda index: len(tokens[index]))
    if len(tokens[longest]) > context_length:
        raise InvalidArgument(
            "PROMPT_TOO_LONG",
            f"inputs[{longest}] has {len(tokens[longest])} tokens; this model takes {context_length}.",
            field="inputs",
            metadata={"tokens": str(len(tokens[longest])), "context_length": str(context_length)},
        )
    return tokens


class ChatTemplate:
    """Renders a conversation as the prompt that the model was trained on.

    Args:
        files: a model that may have no template; ``render`` then refuses.
    """

    def __init__(self, files: ModelFiles) -> None:
        self._template = files.chat_template
        self._special: dict[str, Any] = {
            name: token if isinstance(token, str) else token.get("content", "")
            for name, token in named_tokens(files).items()
            if name.endswith("_token") and isinstance(token, str | dict)
        }

    def __bool__(self) -> bool:
        return self._template is not None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, ending where the model's answer begins.

        Raises:
            FailedPrecondition: NO_CHAT_TEMPLATE; or CHAT_TEMPLATE_LIMIT, it takes too much time or room.
            InvalidArgument: INVALID_MESSAGES, the template refuses this conversation.
        """
        if self._template is None:
            raise FailedPrecondition(
                "NO_CHAT_TEMPLATE",
                "This model has no chat template; send a prompt instead.",
                field="messages",
            )
        # Imported here, so that a start does not wait for it.
        from model_host.engines.sandbox import LimitReached

        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            # transformers defines all of these, and templates ask whether some are none.
            given = {
                "messages": conversation,
                "tools": None,
                "documents": None,
                "add_generation_prompt": True,
            }
            return self._sandbox.render({**given, **self._special})
        except LimitReached as error:
            raise FailedPrecondition(
                "CHAT_TEMPLATE_LIMIT",
                f"The model's chat template was stopped: {error}. Send a prompt, or mend the template.",
                field="messages",
            ) from error
        except Exception as error:
            # A template is a program: whatever it raises, it is about these messages.
            raise InvalidArgument(
                "INVALID_MESSAGES",
                f"The model's chat template refuses these messages: {error}",
                field="messages",
            ) from error

    @cached_property
    def _sandbox(self) -> Sandbox:
        from model_host.engines.sandbox import Sandbox

        return Sandbox(self._template or "")

"""What a model's ``generation_config.json`` asks for: honoured, or the model is refused.

transformers' ``generate()`` follows these settings, so that without one of them an answer is another.
Settings that cannot change which tokens are chosen are not looked at, nor are those that every request has
for itself: its length, its temperature, and whether it draws.

Source: transformers' ``GenerationMixin._get_logits_processor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dumont import limits, models
from dumont.errors import FailedPrecondition, InvalidArgument

FILE: Final = "generation_config.json"

# Defaults of the request's fields of the same names.
REQUEST_FIELDS: Final = ("top_k", "top_p", "min_p", "repetition_penalty")

# What is not computed here, and the values with which it has no effect.
NOT_COMPUTED: Final[dict[str, tuple[Any, ...]]] = {
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "diversity_penalty": (None, 0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "epsilon_cutoff": (None, 0, 1),
    "eta_cutoff": (None, 0, 1),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "sequence_bias": (None, [], {}),
    "token_healing": (None, False),
    "top_h": (None,),
    "typical_p": (None, 1),
    "watermarking_config": (None,),
}
# How many tokens may be banned: a GPU keeps so many beside those of a request.
MOST_BANNED: Final = 768


@dataclass(frozen=True)
class Defaults:
    """What holds for every answer of a model.

    Attributes:
        fields: of requests that leave them out.
        banned: tokens that are never chosen.
        min_new_tokens: before that many no token ends an answer.
        min_length: before that many of prompt and answer together no token ends it.
        stop: strings that end an answer.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    banned: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    min_length: int = 0
    stop: tuple[str, ...] = ()

    def least(self, prompt: int) -> int:
        """Tokens that the answer to a prompt of ``prompt`` tokens must have."""
        return max(self.min_new_tokens, self.min_length - prompt, 0)


def read(name: str, config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> Defaults:
    """What a model's configuration asks for.

    Args:
        name: the model's, for messages.
        config: its config.json, in which older models have such settings. They hold without the other file.
        generation: its generation_config.json; None: there is none.

    Raises:
        FailedPrecondition: MODEL_UNSUPPORTED; a setting is not computed here, or makes no sense.
    """
    file, settings = ("config.json", config) if generation is None else (FILE, generation)

    def refusal(setting: str, why: str, advice: str) -> FailedPrecondition:
        value = str(settings[setting])[:80]
        return models.unsupported(name, f"{setting} of its {file} is {value}, and {why}", advice)

    for setting, harmless in NOT_COMPUTED.items():
        if settings.get(setting) not in harmless:
            raise refusal(
                setting,
                "answers are not computed so here",
                f"Remove it from {file} if its answers may do without it.",
            )
    fields = {known: settings[known] for known in REQUEST_FIELDS if settings.get(known) is not None}
    for allowed in limits.RANGES:
        if allowed.field in fields:
            try:
                allowed.check(fields[allowed.field])
            except (InvalidArgument, TypeError) as error:
                raise refusal(allowed.field, f"makes no sense ({error})", f"Correct it in {file}.") from None
    try:
        banned = _banned(settings)
        defaults = Defaults(
            fields,
            banned,
            int(settings.get("min_new_tokens") or 0),
            int(settings.get("min_length") or 0),
            _stop(settings.get("stop_strings")),
        )
    except (TypeError, ValueError) as error:
        raise models.unsupported(name, f"its {file} makes no sense: {error}", f"Correct {file}.") from None
    if len(banned) > MOST_BANNED:
        raise models.unsupported(
            name,
            f"its {file} bans {len(banned)} tokens; {MOST_BANNED} may be banned",
            f"Ban fewer in {file}.",
        )
    return defaults


def _banned(settings: Mapping[str, Any]) -> frozenset[int]:
    words = settings.get("bad_words_ids") or []
    if several := [word for word in words if len(word) != 1]:
        raise ValueError(
            f"bad_words_ids has words of several tokens ({several[0]}), which are not computed here"
        )
    ends = settings.get("eos_token_id")
    own = ends if isinstance(ends, list) else [ends]
    # A bad word that is the end mark does not count, as in transformers.
    bad = {int(word[0]) for word in words} - set(own)
    return frozenset(bad | {int(token) for token in settings.get("suppress_tokens") or []})


def _stop(strings: Any) -> tuple[str, ...]:
    if strings is None:
        return ()
    found = (strings,) if isinstance(strings, str) else tuple(strings)
    if not all(isinstance(text, str) and text for text in found):
        raise ValueError("stop_strings must be texts")
    return found

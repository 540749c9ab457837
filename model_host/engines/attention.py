"""How a transformers model computes tokens of many sequences in one pass.

The tokens of a pass lie one after the other in a batch of one. Everything in such a model treats each token
by itself, except attention. There a layer hands its keys and values to the cache (``update``), which stores
them with those of their sequence. Then it calls transformers' attention interface, behind which ours looks at
the keys and values of each row's own sequence.

Source: transformers' ``AttentionInterface``; a name without a mask function gets no mask from the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME: Final = "dumont"
# What an attention layer may ask for without changing what is computed here.
HARMLESS: Final = frozenset(
    {
        "position_ids", "use_cache", "output_attentions", "output_router_logits", "cache_position",
        "is_causal",
    }
)  # fmt: skip
# The kinds of layers whose attention tells ``attend`` which tokens it looks at.
KINDS: Final = frozenset({"full_attention", "sliding_attention"})
# How FlashAttention's window says that it has no limit.
NO_LIMIT: Final = -1


class NotBatchable(Exception):
    """This model's attention is not what is computed here."""


@dataclass(frozen=True)
class LayerShape:
    """Heads and values per head of a layer's keys and values."""

    heads: int
    key: int
    value: int

    @property
    def width(self) -> int:
        """Values for one token."""
        return self.heads * (self.key + self.value)


@dataclass(frozen=True)
class Segment:
    """Rows of a pass that belong to one sequence.

    Attributes:
        first, last: its first row, and the row after its last.
        start: where the sequence's keys and values begin in the cache.
        length: tokens that the last row looks at, itself included.
    """

    first: int
    last: int
    start: int
    length: int


@dataclass(frozen=True)
class PagedRows:
    """The same, as tensors on a GPU; each row is treated as a sequence of its own.

    Attributes:
        firsts: the row that each begins with, int32 (rows + 1,).
        starts: where the keys and values that it looks at begin, int32 (rows + 1,); the last is not read.
        lengths: how many they are, int32 (rows,).
        longest: the most that any row could ever look at.
    """

    firsts: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int


@dataclass
class Pass:
    """What the attention of the pass under way needs to know.

    Attributes:
        slots: where each row's keys and values go, int64 (rows,).
    """

    slots: Tensor
    segments: Sequence[Segment] = ()
    rows: PagedRows | None = None
    layer: int = 0


@dataclass
class KeysAndValues:
    """Keys and values of all layers for the tokens of a cache; those of one token lie together.

    Args:
        memory: shape (tokens, width of all layers).
    """

    memory: Tensor
    shapes: Sequence[LayerShape]
    keys: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.keys, self.values = [], []
        at = 0
        for shape in self.shapes:
            for into, size in ((self.keys, shape.key), (self.values, shape.value)):
                part = self.memory[:, at : at + shape.heads * size]
                into.append(part.view(part.shape[0], shape.heads, size))
                at += shape.heads * size

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Put each row's keys and values, shape (heads, rows, size), where its slot is."""
        self.keys[layer].index_copy_(0, slots, keys.transpose(0, 1))
        self.values[layer].index_copy_(0, slots, values.transpose(0, 1))

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the keys and values of ``count`` tokens."""
        self.memory[target : target + count] = self.memory[source : source + count]


# One model computes in a process, on one thread.
_current: list[tuple[Pass, KeysAndValues]] = []


@contextmanager
def computing(what: Pass, cache: KeysAndValues) -> Iterator[Any]:
    """Inside, the model computes ``what``; gives the object to pass as ``past_key_values``."""
    _current.append((what, cache))
    try:
        yield _cache_object(what, cache)
    finally:
        _current.pop()


def _cache_object(what: Pass, cache: KeysAndValues) -> Any:
    from transformers.cache_utils import Cache

    class Writer(Cache):
        """Takes keys and values from the layers; what it gives back is not looked at."""

        def __init__(self) -> None:
            super().__init__(layers=[])

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            what.layer = layer_idx
            cache.write(layer_idx, key_states[0], value_states[0], what.slots)
            return key_states, value_states

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0

    return Writer()


def install(model: Any) -> None:
    """Let the model's layers attend through ``attend``.

    Raises:
        NotBatchable: they have no interface for it.
    """
    from transformers.modeling_utils import AttentionInterface

    if not getattr(model, "_supports_attention_backend", False):
        raise NotBatchable("its attention cannot be replaced")
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - KINDS
    if kinds:
        # Which tokens they look at is in the mask that the model makes, and here it makes none.
        raise NotBatchable(f"it has layers of the kind {', '.join(sorted(map(str, kinds)))}")
    AttentionInterface.register(NAME, attend)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config._attn_implementation = NAME


def uninstall(model: Any) -> None:
    """Let the model attend as transformers does."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config._attn_implementation = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each row over its own sequence, for transformers' attention interface.

    Args:
        query: shape (1, heads, rows, size).
        key, value: this pass's own, shape (1, heads of keys, rows, size).
        sliding_window: how many tokens a row looks at, itself included; None: all.

    Returns:
        Shape (1, rows, heads, size).

    Raises:
        NotBatchable: the layer asks for something that is not computed here.
    """
    if attention_mask is not None:
        raise NotBatchable("it masks its attention itself")
    if unknown := [name for name, given in options.items() if given is not None and name not in HARMLESS]:
        raise NotBatchable(f"its attention takes {', '.join(unknown)}")
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise NotBatchable("it looks ahead")
    what, cache = _current[-1]
    keys, values = cache.keys[what.layer], cache.values[what.layer]
    if what.rows is not None:
        return _flash(query, keys, values, what.rows, scaling, sliding_window), None
    return _by_segments(query, keys, values, what.segments, scaling, sliding_window), None


def _by_segments(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Sequence[Segment],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    heads, size = query.shape[1], values.shape[-1]
    result = query.new_empty(1, query.shape[2], heads, size)
    for segment in segments:
        count = segment.last - segment.first
        begin = 0 if window is None else max(segment.length - count - window + 1, 0)
        length = segment.length - begin
        seen = slice(segment.start + begin, segment.start + segment.length)
        square = count == length and (window is None or window >= length)
        mask = None if count == 1 or square else _mask(count, length, window, query.device)
        result[0, segment.first : segment.last] = scaled_dot_product_attention(
            query[:, :, segment.first : segment.last],
            keys[seen].transpose(0, 1).unsqueeze(0),
            values[seen].transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=square and count > 1,
            scale=scaling,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return result


def _mask(rows: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Which of ``length`` tokens each of the last ``rows`` looks at; shape (rows, length)."""
    behind = torch.arange(length - rows, length, device=device).unsqueeze(1) - torch.arange(
        length, device=device
    )
    seen = behind >= 0
    return seen if window is None else seen & (behind < window)


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, rows: PagedRows, scaling: float | None, window: int | None
) -> Tensor:
    """FlashAttention from torch. ``starts`` need not be in order: ``lengths`` says how many count."""
    found: Tensor = torch.ops.aten._flash_attention_forward(
        query[0].transpose(0, 1),
        keys,
        values,
        rows.firsts,
        rows.starts,
        1,
        rows.longest,
        0.0,
        True,
        False,
        scale=scaling,
        window_size_left=NO_LIMIT if window is None else window - 1,
        window_size_right=NO_LIMIT if window is None else 0,
        seqused_k=rows.lengths,
    )[0]
    return found.unsqueeze(0)

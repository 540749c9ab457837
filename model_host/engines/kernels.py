"""The kernels of our own, and the process that compiles them: ``python -m model_host.engines.kernels ORDER``.

Triton compiles them ahead of time, in a process that ends: the model host loads the machine code alone. A
compiler in it would be a few hundred MB that every snapshot carries. ``ORDER`` is the arguments of
``compile_for`` as JSON. The process writes one line of JSON for each kernel:
``{"name": …, "entry": …, "threads": …, "shared": bytes, "code": base64}``.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any, Final

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Rows of the state: int32 each, those of floating point bit for bit.
TOKEN, POSITION, SLOT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
START, LENGTH, FLAGS = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
TEMPERATURE, TOP_P, TOP_K, MIN_P = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)
REPETITION, PRESENCE, FREQUENCY = tl.constexpr(10), tl.constexpr(11), tl.constexpr(12)
SEED_LOW, SEED_HIGH, PLACE, BIASES = tl.constexpr(13), tl.constexpr(14), tl.constexpr(15), tl.constexpr(16)

SAMPLED, PENALISED, ADJUSTED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
IN_PROMPT = tl.constexpr(0x4000)
# Natural logarithm of the weight, relative to the likeliest token's, below which a token is never drawn.
DEEPEST = tl.constexpr(40.0)
# Halvings of that: thresholds are found to 0.1 %.
BISECTIONS = tl.constexpr(16)


@triton.jit
def _float(state, width, row, which):  # type: ignore[no-untyped-def]
    return tl.load(state + which * width + row).to(tl.float32, bitcast=True)


@triton.jit
def sample(  # type: ignore[no-untyped-def]
    logits, state, width, work, counts, bias_tokens, bias_values, tokens, logprobs, vocabulary,
    MOST_BIASES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose a token for one row, and make the row's state that of the next token.

    Penalties and biases, then temperature, top-k, top-p, min-p; then the largest sum of logit and Gumbel
    noise, which is a draw. Thresholds are found by bisection, so nothing is sorted.
    """
    row = tl.program_id(0)
    flags = tl.load(state + FLAGS * width + row)
    if (flags & SAMPLED) != 0:
        logits += row.to(tl.int64) * vocabulary
        work += row.to(tl.int64) * vocabulary
        place = tl.load(state + PLACE * width + row).to(tl.int64)
        counts += place * vocabulary
        lanes = tl.arange(0, BLOCK)
        temperature = _float(state, width, row, TEMPERATURE)
        repetition = _float(state, width, row, REPETITION)
        presence = _float(state, width, row, PRESENCE)
        frequency = _float(state, width, row, FREQUENCY)

        # The likeliest token and the sum of all weights, of the logits as they are.
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        where = tl.zeros((BLOCK,), tl.int32)
        total = tl.zeros((BLOCK,), tl.float32)
        broken = tl.zeros((BLOCK,), tl.int32)
        for at in range(0, vocabulary, BLOCK):
            inside = at + lanes < vocabulary
            raw = tl.load(logits + at + lanes, mask=inside, other=float("-inf")).to(tl.float32)
            broken = broken | (raw != raw).to(tl.int32)
            larger = tl.maximum(best, raw)
            base = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * tl.exp(best - base) + tl.exp(raw - base)
            where = tl.where(raw > best, at + lanes, where)
            best = larger
            if (flags & ADJUSTED) != 0:
                value = raw
                if (flags & PENALISED) != 0:
                    count = tl.load(counts + at + lanes, mask=inside, other=0).to(tl.int32)
                    value = tl.where(
                        count != 0, tl.where(value > 0, value / repetition, value * repetition), value
                    )
                    given = count & (IN_PROMPT - 1)
                    value -= presence * (given > 0).to(tl.float32) + frequency * given.to(tl.float32)
                tl.store(work + at + lanes, value, mask=inside)
        top = tl.max(best, 0)
        base = tl.where(best == float("-inf"), 0.0, best)
        normaliser = tl.log(tl.sum(total * tl.exp(base - top), 0)) + top
        token = tl.min(tl.where(best == top, where, 0x7FFFFFFF), 0)
        wrong = (tl.max(broken, 0) != 0) | (top == float("inf")) | (top == float("-inf"))

        if (flags & ADJUSTED) != 0:
            tl.debug_barrier()
            few = tl.load(state + BIASES * width + row)
            numbers = tl.arange(0, MOST_BIASES)
            which = tl.load(bias_tokens + place * MOST_BIASES + numbers, mask=numbers < few, other=0)
            added = tl.load(bias_values + place * MOST_BIASES + numbers, mask=numbers < few, other=0.0)
            known = tl.load(work + which, mask=numbers < few, other=0.0)
            tl.debug_barrier()
            tl.store(work + which, known + added, mask=numbers < few)
            tl.debug_barrier()

            largest = tl.full((BLOCK,), float("-inf"), tl.float32)
            where = tl.zeros((BLOCK,), tl.int32)
            for at in range(0, vocabulary, BLOCK):
                value = tl.load(work + at + lanes, mask=at + lanes < vocabulary, other=float("-inf"))
                where = tl.where(value > largest, at + lanes, where)
                largest = tl.maximum(largest, value)
            peak = tl.max(largest, 0)
            token = tl.min(tl.where(largest == peak, where, 0x7FFFFFFF), 0)

            if temperature > 0:
                scale = 1.0 / tl.maximum(temperature, 1e-6)
                threshold = -DEEPEST
                top_k = tl.load(state + TOP_K * width + row)
                if top_k > 0:
                    low, high = -DEEPEST, 0.0
                    for _ in range(BISECTIONS):
                        middle = (low + high) * 0.5
                        above = tl.zeros((BLOCK,), tl.int32)
                        for at in range(0, vocabulary, BLOCK):
                            inside = at + lanes < vocabulary
                            value = tl.load(work + at + lanes, mask=inside, other=float("-inf"))
                            above += ((value - peak) * scale >= middle).to(tl.int32)
                        enough = tl.sum(above, 0) >= top_k
                        low = tl.where(enough, middle, low)
                        high = tl.where(enough, high, middle)
                    threshold = low
                top_p = _float(state, width, row, TOP_P)
                if top_p < 1.0:
                    whole = tl.zeros((BLOCK,), tl.float32)
                    for at in range(0, vocabulary, BLOCK):
                        value = tl.load(work + at + lanes, mask=at + lanes < vocabulary, other=float("-inf"))
                        depth = (value - peak) * scale
                        whole += tl.where(depth >= threshold, tl.exp(depth), 0.0)
                    wanted = tl.sum(whole, 0) * top_p
                    low, high = threshold, 0.0
                    for _ in range(BISECTIONS):
                        middle = (low + high) * 0.5
                        weight = tl.zeros((BLOCK,), tl.float32)
                        for at in range(0, vocabulary, BLOCK):
                            inside = at + lanes < vocabulary
                            value = tl.load(work + at + lanes, mask=inside, other=float("-inf"))
                            depth = (value - peak) * scale
                            weight += tl.where(depth >= middle, tl.exp(depth), 0.0)
                        enough = tl.sum(weight, 0) >= wanted
                        low = tl.where(enough, middle, low)
                        high = tl.where(enough, high, middle)
                    threshold = low
                min_p = _float(state, width, row, MIN_P)
                if min_p > 0:
                    threshold = tl.maximum(threshold, tl.log(min_p))

                low_seed = tl.load(state + SEED_LOW * width + row).to(tl.uint32, bitcast=True).to(tl.uint64)
                high_seed = tl.load(state + SEED_HIGH * width + row).to(tl.uint32, bitcast=True).to(tl.uint64)
                position = tl.load(state + POSITION * width + row).to(tl.uint64)
                seed = (low_seed | (high_seed << 32)) + position * 0x9E3779B97F4A7C15
                largest = tl.full((BLOCK,), float("-inf"), tl.float32)
                where = tl.zeros((BLOCK,), tl.int32)
                for at in range(0, vocabulary, BLOCK):
                    value = tl.load(work + at + lanes, mask=at + lanes < vocabulary, other=float("-inf"))
                    depth = (value - peak) * scale
                    chance = tl.rand(seed, at + lanes)
                    noise = -tl.log(-tl.log(tl.maximum(chance, 1e-30)))
                    score = tl.where(depth >= threshold, depth + noise, float("-inf"))
                    where = tl.where(score > largest, at + lanes, where)
                    largest = tl.maximum(largest, score)
                token = tl.min(tl.where(largest == tl.max(largest, 0), where, 0x7FFFFFFF), 0)

        token = tl.where(wrong, 0, token)
        tl.store(logprobs + row, tl.load(logits + token).to(tl.float32) - normaliser)
        tl.store(tokens + row, tl.where(wrong, -1, token))
        if (flags & PENALISED) != 0:
            tl.store(counts + token, (tl.load(counts + token).to(tl.int32) + 1).to(tl.int16))
        tl.store(state + TOKEN * width + row, token)
        for which in tl.static_range(1, 5):
            if which != 3:  # where the sequence begins stays
                tl.store(state + which * width + row, tl.load(state + which * width + row) + 1)


@triton.jit
def store_kv(  # type: ignore[no-untyped-def]
    key, value, keys, values, state, width, key_row, key_head, value_row, value_head, cache_row,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, HEADS_: tl.constexpr, KEY_: tl.constexpr,
    VALUE_: tl.constexpr,
):  # fmt: skip
    """Put one row's keys and values where the row's slot is.

    Strides are in values; ``X_`` is the power of 2 that ``X`` fits.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(state + SLOT * width + row).to(tl.int64)
    heads = tl.arange(0, HEADS_)[:, None]
    sizes = tl.arange(0, KEY_)[None, :]
    inside = (heads < HEADS) & (sizes < KEY)
    found = tl.load(key + row * key_row + heads * key_head + sizes, mask=inside)
    tl.store(keys + slot * cache_row + heads * KEY + sizes, found, mask=inside)
    sizes = tl.arange(0, VALUE_)[None, :]
    inside = (heads < HEADS) & (sizes < VALUE)
    found = tl.load(value + row * value_row + heads * value_head + sizes, mask=inside)
    tl.store(values + slot * cache_row + heads * VALUE + sizes, found, mask=inside)


@triton.jit
def rotate(  # type: ignore[no-untyped-def]
    query, key, cosine, sine, query_row, query_head, key_row, key_head, angle_row, heads, key_heads,
    HALF: tl.constexpr, HALF_: tl.constexpr, HEADS_: tl.constexpr,
):  # fmt: skip
    """Rotate one row's queries and keys in place.

    Source: Su et al., RoFormer, 2021; the halves of a head are paired, as in Llama.
    """
    row = tl.program_id(0).to(tl.int64)
    sizes = tl.arange(0, HALF_)[None, :]
    numbers = tl.arange(0, HEADS_)[:, None]
    angle = row * angle_row + sizes
    first_cosine = tl.load(cosine + angle, mask=sizes < HALF, other=0.0).to(tl.float32)
    first_sine = tl.load(sine + angle, mask=sizes < HALF, other=0.0).to(tl.float32)
    second_cosine = tl.load(cosine + angle + HALF, mask=sizes < HALF, other=0.0).to(tl.float32)
    second_sine = tl.load(sine + angle + HALF, mask=sizes < HALF, other=0.0).to(tl.float32)
    if tl.program_id(1) == 0:
        at = query + row * query_row + numbers * query_head + sizes
        inside = (numbers < heads) & (sizes < HALF)
    else:
        at = key + row * key_row + numbers * key_head + sizes
        inside = (numbers < key_heads) & (sizes < HALF)
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + HALF, mask=inside, other=0.0)
    kind = first.dtype
    # Rounded where torch rounds: each product, then the sum.
    turned = (first * first_cosine).to(kind).to(tl.float32) + (-second * first_sine).to(kind).to(tl.float32)
    tl.store(at, turned.to(kind), mask=inside)
    turned = (second * second_cosine).to(kind).to(tl.float32) + (first * second_sine).to(kind).to(tl.float32)
    tl.store(at + HALF, turned.to(kind), mask=inside)


@triton.jit
def gate(gates, ups, result, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """SiLU of one half of a layer's inner values times the other half."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(gates + at, mask=at < size, other=0.0)
    kind = first.dtype
    wide = first.to(tl.float32)
    # Rounded where torch rounds: the activation, then the product.
    active = (wide / (1.0 + tl.exp(-wide))).to(kind).to(tl.float32)
    second = tl.load(ups + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(result + at, (active * second).to(kind), mask=at < size)


MOST_BIASES: Final = 2048
GATE_BLOCK: Final = 1024


def compile_for(
    capability: int, dtype: str, shapes: list[list[int]], rotary: list[int]
) -> list[dict[str, Any]]:
    """Machine code for GPUs of a compute capability.

    Args:
        capability: 90 for 9.0.
        dtype: of logits, keys and values, as Triton names it.
        shapes: heads, key size and value size of the caches that layers have.
        rotary: heads, half of a head's size; empty: no kernel for it.
    """
    p = f"*{dtype}"
    made = [
        _compile(
            capability, sample, "sample", 16,
            {
                "logits": p, "state": "*i32", "width": "i32", "work": "*fp32", "counts": "*i16",
                "bias_tokens": "*i32", "bias_values": "*fp32", "tokens": "*i32", "logprobs": "*fp32",
                "vocabulary": "i32", "MOST_BIASES": "constexpr", "BLOCK": "constexpr",
            },
            {"MOST_BIASES": MOST_BIASES, "BLOCK": 4096},
        )
    ]  # fmt: skip
    made.append(
        _compile(
            capability, gate, "gate", 4,
            {"gates": p, "ups": p, "result": p, "size": "i32", "BLOCK": "constexpr"},
            {"BLOCK": GATE_BLOCK},
        )
    )  # fmt: skip
    for heads, key, value in shapes:
        made.append(
            _compile(
                capability, store_kv, f"store_kv_{heads}_{key}_{value}", 4,
                {
                    "key": p, "value": p, "keys": p, "values": p, "state": "*i32", "width": "i32",
                    **dict.fromkeys(("key_row", "key_head", "value_row", "value_head", "cache_row"), "i32"),
                    **dict.fromkeys(("HEADS", "KEY", "VALUE", "HEADS_", "KEY_", "VALUE_"), "constexpr"),
                },
                {
                    "HEADS": heads, "KEY": key, "VALUE": value,
                    "HEADS_": _power(heads), "KEY_": _power(key), "VALUE_": _power(value),
                },
            )
        )  # fmt: skip
    if rotary:
        heads, half = rotary
        made.append(
            _compile(
                capability, rotate, "rotate", 4,
                {
                    "query": p, "key": p, "cosine": p, "sine": p,
                    **dict.fromkeys(("query_row", "query_head", "key_row", "key_head"), "i32"),
                    **dict.fromkeys(("angle_row", "heads", "key_heads"), "i32"),
                    **dict.fromkeys(("HALF", "HALF_", "HEADS_"), "constexpr"),
                },
                {"HALF": half, "HALF_": _power(half), "HEADS_": _power(heads)},
            )
        )  # fmt: skip
    return made


def _compile(
    capability: int,
    function: Any,
    name: str,
    warps: int,
    signature: dict[str, str],
    constants: dict[str, int],
) -> dict[str, Any]:
    source = ASTSource(function, signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return {
        "name": name,
        "entry": made.metadata.name,
        "threads": warps * 32,
        "shared": made.metadata.shared,
        "code": base64.b64encode(made.asm["cubin"]).decode(),
    }


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


if __name__ == "__main__":
    for kernel in compile_for(**json.loads(sys.argv[1])):
        sys.stdout.write(json.dumps(kernel) + "\n")

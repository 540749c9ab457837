"""Options of an engine: what is in the table is checked, everything else is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from dumont import engines
from dumont.errors import DumontError, FailedPrecondition, InvalidArgument


def refusal(options: dict[str, Any], engine: str = "vllm", version: str = "") -> DumontError:
    with pytest.raises(DumontError) as failure:
        engines.check_options(engine, options, version)
    return failure.value


def test_options_come_back_as_the_engine_takes_them() -> None:
    given = {
        "max_model_len": 4096.0,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
        "quantization": "fp8",
        "cudagraph_capture_sizes": [1.0, 8.0],
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 4.0},
        "lora_modules": {"mine": "/adapters/mine"},
    }

    checked = engines.check_options("vllm", given)

    assert checked == given
    assert isinstance(checked["max_model_len"], int)
    assert all(isinstance(size, int) for size in checked["cudagraph_capture_sizes"])
    assert isinstance(checked["speculative_config"]["num_speculative_tokens"], int)


def test_an_unknown_option_is_refused_with_those_that_may_be_meant() -> None:
    error = refusal({"max_model_length": 4096})
    assert (error.reason, error.field) == ("UNKNOWN_OPTION", "engine_options.max_model_length")
    assert "did you mean max_model_len?" in error.message
    assert "did you mean max_num_seqs" in refusal({"max-num-seq": 1}).message
    assert "there are async_scheduling, " in refusal({"colour": 1}).message
    assert refusal({"speculative_config": {"modle": "x"}}).field == "engine_options.speculative_config.modle"


@pytest.mark.parametrize("option", sorted(engines.VLLM_REFUSED))
def test_an_argument_that_must_not_be_set_is_refused_with_the_reason(option: str) -> None:
    error = refusal({option: 1})
    assert (error.reason, error.field) == ("OPTION_REFUSED", f"engine_options.{option}")
    assert engines.VLLM_REFUSED[option] in error.message


def test_no_option_is_both_allowed_and_refused() -> None:
    assert not engines.VLLM_OPTIONS.keys() & engines.VLLM_REFUSED.keys()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_model_len", 0),
        ("max_logprobs", 0),
        ("max_model_len", 1.5),
        ("max_model_len", "4096"),
        ("max_model_len", True),
        ("max_model_len", None),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.01),
        ("gpu_memory_utilization", float("nan")),
        ("enforce_eager", 1),
        ("enforce_eager", "true"),
        ("dtype", "int3"),
        ("dtype", ["auto"]),
        ("dtype", ""),
        ("cudagraph_capture_sizes", []),
        ("cudagraph_capture_sizes", [0]),
        ("cudagraph_capture_sizes", [1] * 257),
        ("cudagraph_capture_sizes", 8),
        ("compilation_config", 3),
        ("compilation_config", {"mode": 4}),
        ("speculative_config", {"model": "x\n"}),
        ("lora_modules", {}),
        ("lora_modules", {"a": "/a", "b": "/b"}),
        ("lora_modules", {"a": "relative"}),
        ("lora_modules", "/a"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range_is_refused(option: str, value: Any) -> None:
    error = refusal({option: value})
    assert error.reason == "INVALID_OPTION"
    assert (error.field or "").startswith(f"engine_options.{option}")


def test_options_that_are_no_object_are_refused() -> None:
    wrong: list[Any] = [[], "max_model_len=1", 1]
    for options in wrong:
        with pytest.raises(InvalidArgument) as failure:
            engines.check_options("vllm", options)
        assert (failure.value.reason, failure.value.field) == ("INVALID_OPTION", "engine_options")


def test_a_choice_that_is_nearly_right_is_named() -> None:
    assert "did you mean bfloat16" in refusal({"dtype": "bflot16"}).message


def test_the_built_in_engine_takes_the_size_of_its_cache_and_nothing_of_vllms() -> None:
    assert engines.check_options("causal_lm", {"kv_cache_memory_bytes": 2.0**30}) == {
        "kv_cache_memory_bytes": 2**30
    }
    error = refusal({"max_model_len": 4096}, "causal_lm")
    assert (error.reason, error.field) == ("UNKNOWN_OPTION", "engine_options.max_model_len")
    assert refusal({"kv_cache_memory_bytes": 1000}, "causal_lm").reason == "INVALID_OPTION"


@pytest.mark.parametrize("engine", ["embedding", ""])
def test_another_engine_takes_no_options(engine: str) -> None:
    error = refusal({"max_model_len": 4096}, engine)
    assert (error.reason, error.field) == ("ENGINE_WITHOUT_OPTIONS", "engine_options")
    assert engines.check_options(engine, {}) == {}


def test_an_option_is_refused_where_the_version_of_the_engine_lacks_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = {
        "new": engines.Option("boolean", "", since=(0, 30)),
        "old": engines.Option("boolean", "", before=(0, 30)),
    }
    monkeypatch.setitem(engines._OPTIONS, "vllm", (table, {}))

    assert engines.check_options("vllm", {"new": True}, "0.30.0") == {"new": True}
    assert engines.check_options("vllm", {"old": True}, "0.29.9") == {"old": True}
    assert engines.check_options("vllm", {"new": True, "old": True}) == {"new": True, "old": True}
    for option, version, needed in (("new", "0.29.1+cu129", "0.30 or newer"), ("old", "0.30", "older")):
        error = refusal({option: True}, version=version)
        assert isinstance(error, FailedPrecondition)
        assert (error.reason, error.field) == ("OPTION_UNSUPPORTED", f"engine_options.{option}")
        assert needed in error.message
        assert version in error.message


def test_an_engine_that_does_not_exist_is_refused_with_those_that_do() -> None:
    for known in ("", *engines.ENGINES):
        engines.check_engine(known)
    with pytest.raises(InvalidArgument, match="did you mean vllm") as failure:
        engines.check_engine("vlm")
    assert (failure.value.reason, failure.value.field) == ("UNKNOWN_ENGINE", "engine")


def test_every_node_runs_the_engines_that_need_no_installation() -> None:
    assert engines.runs("causal_lm", {})
    assert not engines.runs("vllm", {})
    assert engines.runs("vllm", {"vllm": "0.32.0"})


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0.32.0", (0, 32, 0)), ("0.26.0rc1+cu129", (0, 26, 0)), ("1.2.dev3", (1, 2)), ("", ()), ("dev", ())],
)
def test_a_version_is_compared_by_the_numbers_that_it_begins_with(
    text: str, numbers: tuple[int, ...]
) -> None:
    assert engines.parse_version(text) == numbers

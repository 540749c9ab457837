"""A chat template, a program by whoever made the model, renders conversations and can do nothing else."""

# ruff: noqa: E501  (templates)

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dumont.errors import FailedPrecondition, InvalidArgument
from model_host.engine import Message
from model_host.engines.sandbox import ALTOGETHER, LEAST_CHARACTERS, LimitReached, Sandbox
from model_host.engines.tokens import ChatTemplate
from model_host.model_files import ModelFiles

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How much is 2 < 3?"},
    {"role": "assistant", "content": "A <b>lot</b>."},
    {"role": "user", "content": "Why?"},
]
# What the templates of well-known models are written with.
TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "namespace": "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.found = true %}{% endif %}{% set ns.n = ns.n + loop.index %}{% endfor %}{{ ns.found }}{{ ns.n }}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content | trim }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "macro": "{% macro turn(m, end='|') %}[{{ m.role | upper }}] {{ m.content }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "filters": "{{ messages | tojson(indent=2) }}{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[1].content | replace('2', '4') }}"
    "{{ messages[0].content | indent(4) }}{{ '%s-%03d' | format('a', 7) }}{{ [1, 2] | sum }}",
    "methods": "{{ messages[0].content.strip().split(' ') | join('~') }}{{ 'a{}b'.format(3) }}{{ 'x' ~ 1 ~ none }}"
    "{{ ', '.join(['a', 'b']) }}{{ messages[0].items() | list }}{{ 'abc'.replace('b', 'BB') }}{{ 'ab' * 3 }}",
    "comparisons": "{{ messages[0] == messages[1] }}{{ 'user' in messages | map(attribute='role') | list }}"
    "{{ 1 < 2 <= 2 }}{{ messages | length is gt 1000000 }}{{ nothing is defined }}{{ {'a': 1, (1, 2): 3}[(1, 2)] }}"
    "{{ messages[1].items() == messages[1].items() }}{{ messages[0].role is in ['system'] }}{{ 5 not in [1] }}",
    "tokens": "{{ bos_token }}{% for m in messages[1:] %}{{ m.content ~ eos_token }}{% endfor %}",
}

TOO_MUCH = {
    "one string": "{{ 'a' * 1500000000 }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "adding": "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x }}",
    "a filter": "{{ 'a' | center(1000000000) }}",
    "a method": "{{ 'a'.ljust(1000000000) }}",
    "tabs": "{{ '\t'.expandtabs(1000000000) }}",
    "replacing": "{% set s = 'a' * 100000 %}{{ s.replace('a', s) }}",
    "replacing by a filter": "{% set s = 'a' * 100000 %}{{ s | replace('a', s) }}",
    "joining": "{% set s = 'a' * 100000 %}{{ s.join([s] * 1000) }}",
    "joining by a filter": "{% set s = 'a' * 1000 %}{{ ([''] * 10000) | join(s) }}",
    "many filters": "{{ range(99999) | map('center', 99999) | join }}",
    "summing": "{% set s = [1] * 10000 %}{{ ([s] * 10000) | sum(start=[]) }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a width that is given": "{{ '%*d' % (1000000000, 1) }}",
    "many widths": "{{ ('%99999d' * 20000) % 1 }}",
    "a new width": "{{ '{:1000000000}'.format(1) }}",
    "a new width that is given": "{{ '{:{}}'.format(1, 200000) }}",
    "a number": "{{ 10 ** 10 ** 8 }}",
    "squaring": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x*ns.x %}{% endfor %}",
    "indenting": "{{ ('\n' * 100000) | indent(100000) }}",
    "indented JSON": "{{ ([1] * 10000) | tojson(indent=100000) }}",
    "escaping": "{{ ('<' * 200000) | e | e | e }}",
    "writing on and on": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "keeping on and on": "{% set x %}{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}{% endset %}",
}

# Two values, each written with few lists and 2^24 times as long when it is written out.
NESTED = (
    "{% set ns = namespace(x=[1], y=[1], t=(1,)) %}{% for i in range(24) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
)
# Python compares and hashes such values at one go, which nothing could interrupt.
COMPARED = {
    "equal": "{{ ns.x == ns.y }}",
    "less": "{{ ns.x < ns.y }}",
    "within": "{{ ns.x in [ns.y] }}",
    "a test": "{{ ns.x is eq ns.y }}",
    "a test in a filter": "{{ [1] | select('in', [ns.x]) | list }}",
    "items": "{{ {1: ns.x}.items() == {1: ns.y}.items() }}",
    "a key": "{{ {ns.t: 1} | length }}",
    "a key that is looked for": "{{ {1: 1}[ns.t] }}",
}

ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "filters": "{% for i in range(99999) %}{{ range(99999) | select('odd') | list | length }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_rendered_as_transformers_does(name: str) -> None:
    tokens: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}

    rendered = Sandbox(TEMPLATES[name]).render(
        {"messages": CONVERSATION, "add_generation_prompt": True, **tokens}
    )

    rendered_by_transformers: Any = render_jinja_template(
        conversations=[CONVERSATION], chat_template=TEMPLATES[name], add_generation_prompt=True, **tokens
    )
    assert rendered == rendered_by_transformers[0][0]


def test_a_template_may_ask_whether_there_are_tools() -> None:
    source = "{% if tools is not none %}{{ tools | length }}{% endif %}{{ documents is none }}"

    assert chat_template(source).render([Message("user", "Hello")]) == "True"


def test_special_tokens_may_be_named_in_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    )
    files = ModelFiles(
        tmp_path, {}, {}, {"eos_token": "<end>"}, (), "{{ bos_token }}{{ eos_token }}",
        frozenset({"special_tokens_map.json"}),
    )  # fmt: skip

    assert ChatTemplate(files).render([Message("user", "Hello")]) == "<s><end>"


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_template_that_makes_too_much_is_stopped_before_it_is_made(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(LimitReached):
            Sandbox(TOO_MUCH[name]).render({})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 2 * ALTOGETHER * LEAST_CHARACTERS


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_is_stopped(name: str) -> None:
    sandbox = Sandbox(ENDLESS[name], seconds=0.05)

    begin = time.thread_time()
    with pytest.raises(LimitReached, match=r"longer than 0\.05 s"):
        sandbox.render({})

    assert time.thread_time() - begin < 1


@pytest.mark.parametrize("name", COMPARED)
def test_a_template_compares_nothing_that_it_could_not_write_out(name: str) -> None:
    with pytest.raises(LimitReached, match="characters"):
        Sandbox(NESTED + COMPARED[name], seconds=60).render({})


def test_a_long_conversation_has_more_room() -> None:
    messages = [{"role": "user", "content": "x" * 100_000} for _ in range(20)]

    rendered = Sandbox(TEMPLATES["chatml"]).render({"messages": messages, "add_generation_prompt": False})

    assert len(rendered) > 2_000_000


def test_a_limit_is_told_with_its_reason() -> None:
    template = chat_template(TOO_MUCH["one string"])

    with pytest.raises(FailedPrecondition) as refused:
        template.render([Message("user", "Hello")])

    assert refused.value.reason == "CHAT_TEMPLATE_LIMIT"
    assert refused.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 + 'a' }}",
        "{{ messages[9].content }}",
        "{% if %}",
    ],
)
def test_whatever_a_template_raises_is_about_the_messages(source: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        chat_template(source).render([Message("user", "Hello")])

    assert refused.value.reason == "INVALID_MESSAGES"


def chat_template(source: str) -> ChatTemplate:
    return ChatTemplate(ModelFiles(Path("/models/m"), {}, {}, {}, (), source))

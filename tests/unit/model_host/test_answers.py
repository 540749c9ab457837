"""The text of an answer continues its prompt, whatever kind of tokenizer cut it, and ends where it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from model_host import model_files
from model_host.engine import Finish, FinishReason, Generation, Message
from model_host.engines.answers import Answering, Step
from model_host.engines.batch import TokenSequence
from model_host.engines.sampling import Chosen, Sampling
from model_host.engines.tokens import load_tokenizer, special_tokens
from tests.unit.model_host.tiny_models import Answer, answers

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁Hello", "▁con", "▁hand", "s", ",", "▁é", "\n"]
MARK = "<|end|>"


def sentencepiece() -> Tokenizer:
    """As Llama 2 has it: a space is ▁, also one before the first word, and unknown characters are bytes."""
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", *BYTES, *PIECES])}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True, ignore_merges=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5 and XLM-RoBERTa have it."""
    scores = [("<unk>", 0.0), *((piece, -1.0) for piece in PIECES), ("€", -1.0), ("o", -2.0)]
    tokenizer = Tokenizer(models.Unigram(scores, 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["ĠHello", "Ġcon", "Ġhand", "Hello"]
    vocabulary = {text: number for number, text in enumerate([*letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def wordpiece() -> Tokenizer:
    """As BERT has it."""
    tokenizer = Tokenizer(
        models.WordPiece({"[UNK]": 0, "hello": 1, "con": 2, "hand": 3, "##s": 4}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "sentencepiece": sentencepiece, "metaspace": metaspace, "byte-level": byte_level, "wordpiece": wordpiece,
}  # fmt: skip


@pytest.fixture(scope="module", params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made = KINDS[request.param]()
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken(MARK, special=True)])
    return made


def told(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], **fields: object) -> Answer:
    """What a caller is sent when the model says ``tokens`` one after the other."""
    sequence = TokenSequence(prompt, len(tokens), Sampling())
    request = Generation(**{"prompt": "some", **fields})  # type: ignore[arg-type]
    work = Answering(tokenizer, request, [sequence], special_tokens(tokenizer))
    steps = [Step(0, Chosen(token)) for token in tokens[:-1]]
    steps.append(Step(0, Chosen(tokens[-1]), FinishReason.LENGTH))
    answer = Answer()
    for step in steps:  # one at a time, as a stream has them
        [part] = answers(work, [step])
        answer.text += part.text
        answer.tokens += part.tokens
        if part.finish is not None:
            answer.finish = part.finish
            break
    return answer


def ids(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    found = [tokenizer.token_to_id(piece) for piece in pieces]
    assert None not in found
    return [number for number in found if number is not None]


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("sentencepiece", ["▁con", "▁hand"]),
        ("metaspace", ["▁con", "▁hand"]),
        ("byte-level", ["Ġcon", "Ġhand"]),
        ("wordpiece", ["con", "hand"]),
    ],
)
def test_prompt_and_answer_joined_have_their_space(kind: str, pieces: list[str]) -> None:
    tokenizer = KINDS[kind]()

    answer = told(tokenizer, tokenizer.encode("Hello").ids, ids(tokenizer, *pieces))

    assert "Hello" + answer.text == "Hello con hand"


def test_a_word_may_go_on_where_the_prompt_ends(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Hello hand").ids
    piece = next(p for p in ("s", "##s") if tokenizer.token_to_id(p) is not None)

    assert told(tokenizer, prompt, ids(tokenizer, piece)).text == "s"


def test_an_answer_to_a_conversation_begins_with_its_first_letter() -> None:
    # given a template that ends in text, after which a conversation's answer is nobody's continuation
    tokenizer = sentencepiece()
    sequence = TokenSequence(tokenizer.encode("Hello,").ids, 2, Sampling())
    work = Answering(tokenizer, Generation(messages=(Message("user", "Hello,"),)), [sequence], {})

    [answer] = answers(work, [Step(0, Chosen(t)) for t in ids(tokenizer, "▁con", "▁hand")])

    assert answer.text == "con hand"


@given(data=st.data())
def test_the_stream_is_what_the_tokenizer_says_of_all_tokens(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    # given any prompt, and any answer of whole characters that may have special tokens in it
    text = st.text(st.sampled_from("conhads, €é\U0001f600\n"), max_size=20)
    prompt = tokenizer.encode(data.draw(st.sampled_from(["", "<s>", MARK * 9])) + data.draw(text)).ids
    said = tokenizer.encode(data.draw(text)).ids
    said = said[: data.draw(st.integers(0, len(said)))]
    for place in data.draw(st.lists(st.integers(0, len(said)), max_size=3)):
        said.insert(place, *ids(tokenizer, MARK))
    whole = tokenizer.decode(prompt + said)
    assume(said and "\ufffd" not in whole)

    answer = told(tokenizer, prompt, said)

    # then both together are what the tokenizer makes of both
    assert tokenizer.decode(prompt) + answer.text == whole


@pytest.mark.parametrize("text", ["con€con", "é", "con\U0001f600hand", "\u4f60\u597d"])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_a_character_of_several_tokens_is_never_sent_in_parts(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    prompt = tokenizer.encode("Hello €").ids
    said = tokenizer.encode(text).ids

    answer = told(tokenizer, prompt, said)

    assert answer.text.strip() == text
    assert "\ufffd" not in answer.text


def test_a_stop_string_that_is_a_special_token_stops(tokenizer: Tokenizer) -> None:
    word = tokenizer.encode("hand").ids
    said = [*word, *ids(tokenizer, MARK), *word]

    answer = told(tokenizer, tokenizer.encode("Hello").ids, said, stop=(MARK,))

    assert answer.text.strip() == "hand"
    assert answer.finish is not None
    assert answer.finish == Finish(FinishReason.STOP, answer.finish.prompt_tokens, len(word) + 1)


def test_a_stop_string_may_hold_a_special_token_and_text(tokenizer: Tokenizer) -> None:
    word = tokenizer.encode("hand").ids
    said = [*word, *ids(tokenizer, MARK), *word, *ids(tokenizer, MARK), *word]
    space = told(tokenizer, word, word).text.removesuffix("hand")

    answer = told(tokenizer, tokenizer.encode("Hello").ids, said, stop=(f"{MARK}{space}hand{MARK}",))

    assert answer.text.strip() == "hand"
    assert answer.finish is not None
    assert answer.finish.reason is FinishReason.STOP


def test_a_special_token_that_is_no_stop_is_no_text(tokenizer: Tokenizer) -> None:
    word = tokenizer.encode("hand").ids
    said = [*word, *ids(tokenizer, MARK), *word]

    answer = told(tokenizer, tokenizer.encode("Hello").ids, said, stop=("nothing like it",))

    assert MARK not in answer.text
    assert answer.finish is not None
    assert answer.finish.output_tokens == len(said)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_of_llama_cuts_text_as_transformers_does(tmp_path: Path, legacy: bool) -> None:
    # given a special token in the middle, after which transformers puts a space only for older models
    tokenizer = sentencepiece()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").touch()
    right = AutoTokenizer.from_pretrained(tmp_path)

    ours = load_tokenizer(model_files.read(tmp_path))

    for text in ("Hello con", "Hello</s>con hand", "<s>hand</s><s>s", " Hello", ""):
        assert ours.encode(text).ids == right(text).input_ids
        assert ours.decode(ours.encode(text).ids) == right.decode(
            right(text).input_ids, skip_special_tokens=True
        )

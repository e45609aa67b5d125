"""OpenAI's own Python client against the real server: the base model and an adapter, streamed and not."""

from __future__ import annotations

import itertools

import openai
import pytest

from tests.clients import generate, request
from tests.conftest import TINY_BASE
from tests.inference.http.pair import ADAPTER, Pair

QUESTION = [{"role": "user", "content": "What is the name of the river?"}]
MODELS = [TINY_BASE, ADAPTER]


@pytest.mark.parametrize("model", MODELS)
def test_chat_whole_and_streamed_agree(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=12)
    pieces = list(
        client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=12, stream=True)
    )
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == choice.message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices[0].finish_reason] == ["length"]
    assert len({piece.id for piece in pieces}) == 1
    assert whole.model == pieces[0].model == model
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12


@pytest.mark.parametrize("model", MODELS)
def test_completions_whole_and_streamed_agree(client: openai.OpenAI, pair: Pair, model: str) -> None:
    whole = client.completions.create(model=model, prompt="The harbour", temperature=0, max_tokens=10)
    pieces = client.completions.create(model=model, prompt="The harbour", temperature=0, max_tokens=10, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    adapter = "" if model == TINY_BASE else model
    over_grpc = generate(pair.server.address, request("The harbour", adapter=adapter, max_tokens=10, ignore_eos=False))
    assert over_grpc.text == whole.choices[0].text


def test_an_adapter_answers_otherwise_than_the_base(client: openai.OpenAI) -> None:
    answers = [client.completions.create(model=model, prompt="The harbour", temperature=0) for model in MODELS]
    assert answers[0].choices[0].text != answers[1].choices[0].text
    assert answers[0].usage is not None
    assert answers[0].usage.completion_tokens == 16  # OpenAI's default for completions


def test_an_answer_says_what_it_was_bound_to(client: openai.OpenAI, pair: Pair) -> None:
    """One of several forms of the same reference; `multilora` is beside OpenAI's fields."""
    for reference in ("pirate", "pirate@1", "default/pirate:stable"):
        answer = client.completions.create(model=reference, prompt="x", max_tokens=1)
        assert answer.model == reference
        bound = answer.model_dump()["multilora"]
        assert (bound["adapter"], bound["version"], bound["digest"]) == (ADAPTER, 1, pair.digest)
        assert bound["tier"] in ("STORE", "DISK", "CPU", "GPU")
    base = client.completions.create(model=TINY_BASE, prompt="x", max_tokens=1)
    assert base.model_dump()["multilora"]["adapter"] is None


def test_models_lists_the_base_and_what_is_here(client: openai.OpenAI) -> None:
    client.completions.create(model=ADAPTER, prompt="x", max_tokens=1)
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert set(models) == {TINY_BASE, "pirate"}
    assert models[TINY_BASE]["parent"] is None
    assert models["pirate"]["parent"] == TINY_BASE
    assert models["pirate"]["versions"] == [1]


def test_prompts_as_text_ids_and_lists_of_one(client: openai.OpenAI) -> None:
    def text(prompt: object) -> str:
        return client.completions.create(model=TINY_BASE, prompt=prompt, temperature=0).choices[0].text

    assert text("A library") == text(["A library"])
    assert text([5, 6, 7]) == text([[5, 6, 7]])


def test_message_content_in_parts(client: openai.OpenAI) -> None:
    def answer(content: object) -> str | None:
        messages = [{"role": "user", "content": content, "name": None}]
        whole = client.chat.completions.create(model=TINY_BASE, messages=messages, temperature=0, max_tokens=8)
        return whole.choices[0].message.content

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert answer(parts) == answer("one\ntwo")


def test_an_answer_can_be_sent_back_as_a_turn(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=TINY_BASE, messages=QUESTION, max_tokens=4).choices[0].message
    again = client.chat.completions.create(model=TINY_BASE, messages=[*QUESTION, answer.model_dump()], max_tokens=4)
    assert again.choices[0].finish_reason == "length"


def test_equal_seeds_give_equal_answers_and_none_a_random_one(client: openai.OpenAI) -> None:
    def text(seed: int | None) -> str:
        return client.completions.create(model=TINY_BASE, prompt="x", seed=seed, max_tokens=24).choices[0].text

    assert text(7) == text(7)
    assert text(-7) == text(-7)
    assert text(7) != text(8)
    assert text(None) != text(None)


def test_temperature_defaults_to_one_as_openai_has_it(client: openai.OpenAI) -> None:
    def text(temperature: object) -> str:
        whole = client.completions.create(model=TINY_BASE, prompt="x", seed=3, max_tokens=24, temperature=temperature)
        return whole.choices[0].text

    assert text(openai.omit) == text(1.0) != text(0.0)


def test_stop_texts_end_an_answer(client: openai.OpenAI) -> None:
    greedy = {"model": TINY_BASE, "prompt": "The harbour", "temperature": 0, "max_tokens": 10}
    whole = client.completions.create(**greedy).choices[0].text
    stop = whole[3:5]
    stopped = client.completions.create(**greedy, stop=stop).choices[0]
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.model_dump()["stop_reason"] == stop
    kept = client.completions.create(**greedy, stop=[stop], extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == whole[: whole.index(stop) + len(stop)]


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=TINY_BASE, messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 5
    for position in content:
        assert position.logprob == position.top_logprobs[0].logprob <= 0  # greedy takes the likeliest
        assert len(position.top_logprobs) == 3
        assert position.bytes is None or bytes(position.bytes).decode() == position.token


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(client: openai.OpenAI, stream: bool) -> None:
    asked = {"model": TINY_BASE, "prompt": "x", "temperature": 0, "max_tokens": 5, "logprobs": 2}
    answers = list(client.completions.create(**asked, stream=True)) if stream else [client.completions.create(**asked)]
    found = [answer.choices[0].logprobs for answer in answers if answer.choices[0].logprobs is not None]
    tokens = [token for logprobs in found for token in logprobs.tokens or ()]
    offsets = [offset for logprobs in found for offset in logprobs.text_offset or ()]
    assert len(tokens) == 5
    assert offsets == [0, *itertools.accumulate(map(len, tokens))][:5]
    assert all(len(top) in (1, 2) for logprobs in found for top in logprobs.top_logprobs or ())


def test_vllm_extensions_are_taken(client: openai.OpenAI) -> None:
    extensions = {
        "top_k": 1,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [5],
    }
    answer = client.completions.create(
        model=TINY_BASE, prompt="x", max_tokens=4, logit_bias={"9": -100}, user="u", extra_body=extensions
    )
    assert answer.usage is not None
    assert 2 <= answer.usage.completion_tokens <= 4
    forced = client.completions.create(
        model=TINY_BASE, prompt="x", max_tokens=3, logit_bias={"40": 100}, temperature=0, logprobs=0
    )
    assert forced.choices[0].logprobs is not None
    assert len(set(forced.choices[0].logprobs.tokens or ())) == 1


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=QUESTION)
    assert (missing.value.code, missing.value.param) == ("ADAPTER_NOT_FOUND", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=TINY_BASE, messages=QUESTION, temperature=200)
    assert bad.value.param == "temperature"

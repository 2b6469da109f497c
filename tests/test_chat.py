"""One renderer for training and serving: same ids, loss on the assistant's words and its stop token."""

import pytest

from launcher import cafe
from launcher.catalogue import card
from launcher.chat import prompt_ids, render, stop_ids
from launcher.errors import UserError

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two lattes, please."},
    {"role": "assistant", "content": '{"items":[]}'},
    {"role": "user", "content": "And a muffin?"},
    {"role": "assistant", "content": "Yes."},
]


def templates():
    return {"chatml": None, "gpt-2": card("gpt-2").template, "llama-7b": card("llama-7b").template}


@pytest.fixture(params=templates())
def any_tokenizer(request, tokenizer):
    tokenizer.chat_template = templates()[request.param] or tokenizer.chat_template
    return tokenizer


def test_a_prompt_is_a_prefix_of_what_was_trained(any_tokenizer):
    conversations = [e["messages"] for e in list(cafe.examples("held_out"))[:50]] + [CONVERSATION]
    for messages in conversations:
        trained = render(any_tokenizer, messages).ids
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = prompt_ids(any_tokenizer, messages[:turn])
                assert trained[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("gpt-2", "System: Be brief.\nUser: Hi.\nAssistant: Yes.<|im_end|>\nUser: So?\nAssistant:"),
        ("llama-7b", "<|endoftext|><<SYS>>\nBe brief.\n<</SYS>>\n[INST] Hi. [/INST] Yes.<|im_end|>[INST] So? [/INST]"),
    ],
)
def test_the_templates_we_ship_write_what_they_should(tokenizer, name, written):
    tokenizer.chat_template = card(name).template
    turns = [("system", "Be brief."), ("user", "Hi."), ("assistant", "Yes."), ("user", "So?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.decode(prompt_ids(tokenizer, messages)) == written


def test_a_prompt_is_what_the_template_writes(tokenizer):
    messages = CONVERSATION[:4]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt_ids(tokenizer, messages) == whole


def test_the_answers_and_their_stop_tokens_are_trained_and_nothing_else(any_tokenizer):
    rendered = render(any_tokenizer, CONVERSATION)
    trained = [i for i, is_trained in zip(rendered.ids, rendered.trained, strict=True) if is_trained]
    text = any_tokenizer.decode(trained)
    stop = any_tokenizer.decode([stop_ids(any_tokenizer)[-1]])
    assert text.count(stop) == 2
    assert '{"items":[]}' in text
    assert "Yes." in text
    assert "lattes" not in text
    assert rendered.ids[[i for i, t in enumerate(rendered.trained) if t][-1]] in stop_ids(any_tokenizer)


def test_a_template_that_never_stops_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(UserError, match="no stop token"):
        stop_ids(tokenizer)


def test_a_template_that_rewrites_the_past_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    with pytest.raises(UserError, match="rewrites earlier turns"):
        render(tokenizer, CONVERSATION)

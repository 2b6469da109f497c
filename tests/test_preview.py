"""What is shown before the first step."""

import io

import pytest
from rich.console import Console

from launcher import preview
from launcher.__main__ import main
from launcher.config import Config, Data
from launcher.data import Splits
from launcher.encoding import encode
from launcher.errors import UserError
from launcher.material import Material, load_material
from launcher.report import printable


def talk(asked, answer):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def material(tokenizer, *conversations, left_out=()):
    places = [f"x:{i}" for i in range(len(conversations))]
    splits = Splits(list(conversations), list(conversations[:1]), tuple(places), ("x:0",), {"messages": 2}, left_out)
    examples = encode(tokenizer, conversations, places, Data(overflow="truncate"), 40)
    return Material(splits, tokenizer, examples, examples, (tokenizer.eos_token_id,), 40)


def test_the_trained_part_is_marked_with_and_without_colour(tokenizer):
    example = material(tokenizer, talk("Two lattes.", "Sí.")).train[0]
    plain = preview.marked(tokenizer, example, has_colour=False).plain
    assert "⟦Sí.<|im_end|>⟧" in plain
    assert "user\nTwo lattes." in plain
    coloured = preview.marked(tokenizer, example, has_colour=True)
    green = "".join(coloured.plain[span.start : span.end] for span in coloured.spans if span.style == "green")
    assert green == "Sí.<|im_end|>"


def test_the_counts_are_those_of_the_examples(tokenizer):
    found = material(tokenizer, talk("Hi.", "Yes."), talk("Hi.", "latte " * 60), left_out=("x:9: unknown role",))
    told = "\n".join(preview.summary(found, Data(overflow="truncate")))
    assert "<|im_end|> is learned in 1 of 2" in told
    assert "2 examples cut at 40 tokens" in told  # one in each split
    assert "1 record left out:\n  x:9: unknown role" in told
    screen = io.StringIO()
    preview.show(Console(file=screen), found, Data(overflow="truncate"))
    assert "⟦Yes.<|im_end|>⟧" in screen.getvalue()


def test_an_answer_that_never_stops_is_refused(tiny_llama, tmp_path):
    file = tmp_path / "long.jsonl"
    line = '{"prompt": "Hi", "completion": "%s"}\n' % ("latte " * 200)
    file.write_text(line * 20)
    with pytest.raises(UserError, match=r"the stop token <\|im_end\|> is never learned") as error:
        main(["data", f"MODEL={tiny_llama}", f"DATA={file}", "data.max_length=50", "data.overflow=truncate"])
    assert len(error.value.faults) == 1


def test_make_data_shows_it_without_training(tiny_llama, capsys):
    assert main(["data", f"MODEL={tiny_llama}", "data.limit=50"]) == 0
    out = capsys.readouterr().out
    assert "cafe (2200 messages): 50 examples to learn from, 200 held out" in out
    assert "is learned in 50 of 50" in out
    assert "<|im_end|>⟧" in out
    assert "Next: " in out


def test_a_prefix_leaves_less_room_for_examples(tiny_llama):
    from launcher import data

    splits = data.read(Data(limit=4))
    config = Config.model_validate(
        {"adapter": {"method": "prefix", "num_tokens": 30}, "model": {"name": str(tiny_llama)}}
    )
    assert load_material(config, splits, tiny_llama, 512).longest == 482


def test_nothing_that_a_terminal_obeys_is_printed():
    assert printable("a\x1b]0;title\x07b\u202e\n\t👩\u200d🍳é") == "a\\x1b]0;title\\x07b\\u202e\n\t👩\u200d🍳é"

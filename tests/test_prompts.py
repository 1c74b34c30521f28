"""Templates, their file format and the per-example draw."""

import collections
from pathlib import Path

import pytest

from sdpo_jax.data import prompts, thoughts
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.system.errors import InputError

ROOT = Path(__file__).parents[1]


DOMAINS = prompts.TEMPLATES
assert set(DOMAINS) == set(prompts.DOMAINS)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_has_eight_short_templates_that_end_before_the_answer(domain):
    templates = DOMAINS[domain]
    assert len(set(templates)) >= 8
    for template in templates:
        lines = template.split("\n")
        assert lines.index("[HistoryHere]") < lines.index("[CansHere]")
        assert template.endswith(":\n") and len(template.split()) < 35


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_has_eight_short_templates_whose_history_comes_last(domain):
    templates = prompts.HISTORY_TEMPLATES[domain]
    assert len(set(templates)) >= 8
    for template in templates:
        head = prompts.head(template)
        assert template == f"{head}[HistoryHere]\n"
        assert head.endswith(":\n") and "[" not in head and len(head.split()) < 15


def test_a_placeholder_alone_on_its_line_lists_one_title_a_line():
    text = prompts.render("Seen:\n[HistoryHere]\nOf:\n[CansHere]\nNext:\n", ["a", "b"], ["c", "d"])
    assert text == "Seen:\na\nb\nOf:\nc\nd\nNext:\n"


def test_a_placeholder_inside_a_line_joins_titles_with_commas():
    text = prompts.render("Seen [HistoryHere]. Of: [CansHere]. Answer: ", ["a", "b"], ["c", "d"])
    assert text == "Seen a, b. Of: c, d. Answer: "


def test_a_title_that_looks_like_a_placeholder_stays_as_it_is():
    assert prompts.render("[HistoryHere] | [CansHere]", ["[CansHere]"], ["x"]) == "[CansHere] | x"


def test_prompt_files_have_one_template_a_line_and_may_hold_line_breaks(tmp_path):
    file = tmp_path / "movie.txt"
    file.write_text("Seen [HistoryHere], of [CansHere]:  \n\nA\\n[HistoryHere]\\n[CansHere]\\n\n")
    one, other = prompts.read_templates(file)
    assert one == "Seen [HistoryHere], of [CansHere]: "
    assert other == "A\n[HistoryHere]\n[CansHere]\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"historyList": "a::b", "itemList": []}]', ":1: found JSON"),
        (b"[HistoryHere] [CansHere]\nOnly [HistoryHere]\n", r":2: .*without \[CansHere\]"),
        (b"{\n[HistoryHere] [CansHere]\n", r":1: .*without \[HistoryHere\]"),
        (b"\n \n", "found no template"),
        (b"", "found no template"),
        (b"\xff\xfe[HistoryHere] [CansHere]", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_wrong_prompt_file_is_named_with_its_line(tmp_path, content, said):
    file = tmp_path / "prompt.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"prompt.txt.*{said}"):
        prompts.read_templates(file)


def test_a_history_template_ends_with_its_history(tmp_path):
    file = tmp_path / "movie.txt"
    file.write_text("Seen:\\n[HistoryHere]\nLately [HistoryHere]\\n\n")
    expected = ("Seen:\n[HistoryHere]\n", "Lately [HistoryHere]\n")
    assert prompts.read_templates(file, "history") == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Seen these films:", r"without \[HistoryHere\]"),
        ("[HistoryHere] Next:", r"text after \[HistoryHere\]"),
        ("[HistoryHere] and [HistoryHere]", r"text after \[HistoryHere\]"),
        ("Of [CansHere], after [HistoryHere]", r"found \[CansHere\].*prompt=candidates"),
    ],
)
def test_a_wrong_history_template_is_named_with_its_line(tmp_path, line, said):
    file = tmp_path / "prompt.txt"
    file.write_text(f"[HistoryHere]\n{line}\n")
    with pytest.raises(InputError, match=f"prompt.txt:2: .*{said}"):
        prompts.read_templates(file, "history")


def test_the_template_is_drawn_by_seed_split_and_row():
    drawn = [prompts.template_index(0, "train", row, 8) for row in range(800)]
    assert drawn == [prompts.template_index(0, "train", row, 8) for row in range(800)]
    counts = collections.Counter(drawn)
    assert len(counts) == 8 and min(counts.values()) > 60
    assert drawn != [prompts.template_index(0, "test", row, 8) for row in range(800)]
    assert drawn != [prompts.template_index(1, "train", row, 8) for row in range(800)]


def test_the_chat_prompt_file_holds_the_built_in_wording_in_the_chat_format():
    templates = prompts.read_templates(ROOT / "configs" / "prompts" / "movie-chatml.txt")
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert templates == tuple(turn.format(text.rstrip("\n")) for text in DOMAINS["movie"])


CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_models_chat_format_goes_around_each_template(model_folder):
    tokenizer = load_tokenizer(model_folder)
    tokenizer.chat_template = CHAT
    found = [prompts.in_chat(text, tokenizer) for text in DOMAINS["book"]]
    assert found == [f"<s><user>{text.strip()}<assistant>" for text in DOMAINS["book"]]


THINKING = CHAT.replace("<assistant>", "<assistant><think>{% if not think %}</think>{% endif %}")


@pytest.mark.parametrize(
    ("chat", "options", "end", "opened"),
    [
        (CHAT, '{"think": true}', "<assistant>", ""),
        (THINKING, "{}", "<think></think>", ""),
        (THINKING, '{"think": true}', "<think>", "<think>"),
        (
            THINKING.replace("think>", "seed:think>"),
            '{"think": true}',
            "<seed:think>",
            "<seed:think>",
        ),
        (THINKING.replace("</think>", "</think>\n<reasoning>"), "{}", "<reasoning>", "<reasoning>"),
    ],
)
def test_a_chat_format_gets_its_options_and_an_opened_thought_is_seen(
    chat, options, end, opened, model_folder
):
    tokenizer = load_tokenizer(model_folder)
    tokenizer.chat_template = chat
    found = prompts.in_chat(DOMAINS["movie"][0], tokenizer, options)
    assert found.endswith(end) and thoughts.opened(found) == opened


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (None, "without a chat format that works"),
        ("{{ raise_exception('no') }}", "without a chat format that works"),
        ("{{ messages[0]['content'] | lower }}", "changes the placeholders"),
    ],
)
def test_a_model_without_a_usable_chat_format_is_refused(chat, said, model_folder):
    tokenizer = load_tokenizer(model_folder)
    tokenizer.chat_template = chat
    with pytest.raises(InputError, match=f"config.chat_template: found .*{said}.*set it to False"):
        prompts.in_chat(DOMAINS["movie"][0], tokenizer)

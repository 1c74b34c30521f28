"""What chat servers answer besides an answer: errors, filters, nothing, thoughts, parts."""

import itertools
import json

import pytest
from chat_endpoint import completion, told, windows_of

from sdpo_jax.system.errors import InputError


@pytest.mark.parametrize(
    "reply, message",
    [
        (told(401, '{"error": {"message": "who?"}}'), r"401 \(who\?\), .* correct OPENAI_API_KEY"),
        (told(404, '{"error": {"message": "no model m"}}'), r"404 \(no model m\), .* --model"),
        (told(404, '{"detail": "Not Found"}'), "404 .*correct --endpoint"),
        (told(400, '"no temperature"'), "400 .*no temperature.* check --model and --parameters"),
        (told(429, ""), r"429 \(nothing\), .* --requests_per_minute and run this again"),
        (told(500, "<p>\noops"), "500 .*oops"),
        (told(429, "", **{"Retry-After": "300"}), "run this again in 300 seconds, as it says"),
        (told(200, "<html>", **{"Content-Type": "text/html"}), "found <html>, expected a chat"),
        (told(200, "[1]"), r"found \[1\], expected a chat completion"),
        (told(200, '{"detail": "no chat here"}'), "no chat here.*expected a chat completion"),
        (
            told(200, '{"choices": [{"message": {"content": ""}, "finish_reason": "error"}]}'),
            "an error in place of an answer .* run this again later; earlier answers are saved",
        ),
        (told(200, '{"error": {"code": 429, "message": "slowly"}}'), "slowly.* run this again lat"),
        (told(200, '{"error": {"code": "401", "message": "who?"}}'), "who.* check OPENAI_API_KEY"),
        (told(200, '{"error": {"code": "model_not_found"}}'), "found an error .* --model"),
        (told(200, '{"error": "Invalid API key"}'), "found an error .* OPENAI_API_KEY"),
        (told(200, '{"error": {"code": 401, "message": "account flagged"}}'), "OPENAI_API_KEY"),
        (told(400, '{"error": {"message": "no such argument: safety_settings"}}'), "400 .*safety"),
        (told(403, '{"error": {"message": "your account was flagged"}}'), "403 .*OPENAI_API_KEY"),
        (told(200, '{"choices": [{"text": "Heat"}]}'), "Heat.*expected a chat completion"),
        (told(200, '{"choices": [{"delta": {"content": "Heat"}}]}'), "expected a chat completion"),
        (
            told(200, '{"choices": null, "base_resp": {"status_msg": "slow"}}'),
            "slow.*expected a ch",
        ),
        (told(200, "[" * 100_000), "expected a chat completion"),
        (told(200, ""), "found nothing, expected a chat completion"),
    ],
)
def test_an_endpoint_that_does_not_answer_is_one_line_and_nothing_written(
    server, ask, tmp_path, reply, message
):
    server.reply = reply
    with pytest.raises(InputError, match=message) as error:
        ask()
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not (tmp_path / "new").exists()


def test_servers_that_tell_no_tokens_and_refuse_are_taken_as_they_are(server, ask):
    for content in (None, "half a pair \ud83d"):
        choice = {"message": {"content": content}, "finish_reason": None}
        text = json.dumps({"choices": [choice], "usage": None})
        server.reply = told(200, text)
        summary = ask(limit=2, model=str(content)[:4], prices=(1.0, 1.0))
        assert summary["valid_ratio"] == 0 and summary["tokens_in"] is None
        assert summary["cost_dollars"] is None


NOTHING = {
    "no choices": (200, {"choices": [], "usage": None}, "no answer"),
    "no list of choices": (200, {"object": "chat.completion", "choices": None}, "no answer"),
    "no object": (200, {"choices": ["Title"]}, "no answer"),
    "no message": (200, {"choices": [{"finish_reason": "length"}]}, "length"),
    "a null message": (
        200,
        {"choices": [{"message": None, "finish_reason": "content_filter"}]},
        "content_filter",
    ),
    "a number": (200, {"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}, "stop"),
    "no text in parts": (
        200,
        {"choices": [{"message": {"content": [{"type": "image"}]}, "finish_reason": "stop"}]},
        "stop",
    ),
    "Azure's filter": (
        400,
        {"error": {"code": "content_filter", "message": "The response was filtered"}},
        "filtered",
    ),
    "a moderator": (
        403,
        {"error": {"code": 403, "message": "Your input was flagged", "metadata": {}}},
        "filtered",
    ),
    "a filter inside a 200": (
        200,
        {"error": {"code": 400, "message": "blocked by the content management policy"}},
        "filtered",
    ),
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("place", [0, 7])
def test_a_window_without_an_answer_is_invalid_wherever_it_comes(
    server, ask, dataset_folder, capfd, name, place
):
    status, body, finish = NOTHING[name]
    windows = windows_of(dataset_folder)
    empty = next(text for text, (row, _, _) in windows.items() if row == place)

    def reply(text):
        return (status, {}, json.dumps(body)) if text == empty else completion(windows[text][1])

    server.reply = reply
    summary = ask(parallel=1)
    assert summary["hit_ratio_at_1"] == 11 / 12 == summary["valid_ratio"]
    counts = {"stop": 12} if finish == "stop" else {"stop": 11, finish: 1}
    assert summary["finishes"] == counts and len(server.sent) == 12
    assert (
        ", ".join(f"{n} {end}" for end, n in summary["finishes"].items()) in capfd.readouterr().out
    )
    assert ask() == summary and len(server.sent) == 12


@pytest.mark.parametrize(
    "body",
    [
        '{"error": {"code": 429, "message": "rate-limited upstream"}}',
        '{"error": {"code": "503", "message": "no instance"}, "choices": []}',
        '{"choices": [{"error": {"message": "provider"}, "finish_reason": "error"}]}',
        '{"detail": "overloaded"}',
        '{"error": {"code": 503, "message": "moderation service overloaded"}}',
        "<html>be right back</html>",
        "",
    ],
)
def test_a_fault_that_passes_is_tried_again_inside_a_200_too(server, ask, body):
    sent = itertools.count()
    server.reply = lambda text: (
        (200, {"Retry-After-Ms": "1"}, body) if next(sent) in (4, 5) else completion("a0")
    )
    summary = ask(parallel=1)
    assert summary["finishes"] == {"stop": 12} and len(server.sent) == 14


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<think>A or B? A.</think>\n\nB", "\n\nB"),
        ("A or B? A.\n</think>\nB", "\nB"),  # the server wrote the opening mark into the prompt
        ("[THINK]A[/THINK]B", "B"),
        ("◁think▷A◁/think▷B", "B"),
        ("<reasoning>A</reasoning>B", "B"),
        ("<|channel|>analysis<|message|>A<|end|><|channel|>final<|message|>B", "B"),
        ("<think>A, no: B, no: A", ""),  # the tokens were used up
        ("a <b> c", "a <b> c"),
        ([{"type": "text", "text": "B"}], "B"),
        (
            [
                {"type": "thinking", "thinking": [{"type": "text", "text": "A"}]},
                {"type": "text", "text": "B"},
            ],
            "B",
        ),
        (["B ", {"type": "output_text", "text": "or C"}], "B or C"),
        ([{"type": "reasoning", "text": "A or B"}, {"type": "text", "text": "B"}], "B"),
        ("<|START_THINKING|>A<|END_THINKING|>B", "B"),
        ("<Think>A</Think>B", "B"),
    ],
)
def test_only_what_follows_the_thoughts_is_judged(server, ask, tmp_path, content, said):
    message = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
    server.reply = lambda text: (200, {}, json.dumps(message))
    ask(limit=1)
    lines = (tmp_path / "new" / "eval" / "chatrec-greedy.jsonl").read_text()
    assert json.loads(lines)["generation"] == said

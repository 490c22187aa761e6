"""What is scored is what the template adds for the assistant's messages, end of turn included, and nothing else.

The templates mark answers as ``generation``. The package does not look at these marks; transformers does, so they are
a second opinion on what an answer is.
"""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from chat_templates import BARE, CHATML, GEMMA, QWEN_3, STYLES, Style, assistant, joined, system, tool, user
from hypothesis import given, settings
from makes import MAKES, Make
from transformers.utils.chat_template_utils import render_jinja_template

from dpo_lightning.data.chat import REFUSED, RENDERED_ANEW, Chat, Renderer, Segment
from dpo_lightning.data.dialogue import NO_PROMPT, NO_RESPONSE
from dpo_lightning.data.example import Message, PreferenceExample, TokenizedExample, UnusableRow
from dpo_lightning.data.tokenize import EQUAL, NOTHING_LEFT, TOO_LONG, Notes, Tokenization
from dpo_lightning.errors import UsageError

OWN = {name: f"package:data/templates/{name}.jinja" for name in ("transcript", "alpaca")}
LAWFUL = STYLES | {"bare": BARE}
EXACT = ("llama", "gpt2", "closing", "qwen", "sentencepiece")  # makes that keep every letter and put none in between
CONTENT = st.text("ab xyz.c\n", min_size=1, max_size=6).filter(str.strip)
LAW = settings(derandomize=True, deadline=None, max_examples=25)


def styled(style: Style | str | None, name: str = "llama", **chat) -> Renderer:
    """A renderer for a make of tokenizer that has a template."""
    make = MAKES[name]()
    if isinstance(style, Style):
        style.give(make.tokenizer)
    else:
        make.tokenizer.chat_template = style
    return Renderer(make.tokenizer, Chat(**chat))


def tokenize(tokenizer, prompt, *responses, tools=None, chat=None, **limits) -> tuple[TokenizedExample, Notes]:
    example = PreferenceExample(prompt, responses, 1, tools)
    chosen = {"max_length": 10_000, "chat": chat or Chat(), **limits}
    (result,) = Tokenization(tokenizer=tokenizer, **chosen)([example])
    if isinstance(result, UnusableRow):
        raise result
    return result


def shown(tokenizer, example: TokenizedExample) -> list[str]:
    """Tokens of each response, those that are not scored in brackets."""
    scored = example.scored or [[True] * len(ids) for ids in example.response_ids]
    return [
        " ".join(
            token if one else f"[{token}]"
            for token, one in zip(tokenizer.convert_ids_to_tokens(ids), mask, strict=True)
        )
        for ids, mask in zip(example.response_ids, scored, strict=True)
    ]


def runs(ids: list[int], mask: list[bool]) -> list[tuple[bool, list[int]]]:
    """Tokens behind each other that are scored, or are not."""
    together = itertools.groupby(zip(mask, ids, strict=True), lambda pair: pair[0])
    return [(scored, [token for _, token in run]) for scored, run in together]


# By hand.


@pytest.mark.parametrize(
    ("style", "prompt", "response"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "Yo<|im_end|>\n",
        ),
        (
            "llama_3",
            "<s><|header|>system<|end_header|>\n\nBe kind.<|eot|><|header|>user<|end_header|>\n\nHi<|eot|>"
            "<|header|>assistant<|end_header|>\n\n",
            "Yo<|eot|>",
        ),
        ("mistral", "<s>[INST] Be kind.\n\nHi [/INST]", " Yo</s>"),
        ("phi", "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n", "Yo<|end|>\n"),
        (
            "qwen_3",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nYo<|im_end|>\n",
        ),
    ],
)
def test_a_template_by_hand(style, prompt, response):
    rendered = styled(STYLES[style])(
        PreferenceExample([system("Be kind."), user("Hi")], ([assistant("Yo")], [assistant("No")]))
    )
    assert rendered.prompt == prompt
    assert rendered.responses == (
        (Segment(response, True),),
        (Segment(response.replace("Yo", "No"), True),),
    )
    assert rendered.templated


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [("llama", "<s>", "</s>"), ("gpt2", "</s>", "</s>"), ("qwen", "", "</s>"), ("wordpiece", "[CLS]", "[SEP]")],
)
def test_the_transcript_by_hand(name, begin, end):
    render = styled(None, name, template=OWN["transcript"])
    dialogue = [user("Hi"), assistant("Yo"), user("Eh?")]
    rendered = render(PreferenceExample(dialogue, ([assistant("Oh")],)))
    assert rendered.prompt == f"{begin}\n\nHuman: Hi\n\nAssistant: Yo{end}\n\nHuman: Eh?\n\nAssistant:"
    assert rendered.responses == ((Segment(f" Oh{end}", True),),)
    assert render(PreferenceExample([system("Be kind."), *dialogue], ([assistant("Oh")],))).prompt == (
        f"{begin}Be kind.\n\nHuman: Hi\n\nAssistant: Yo{end}\n\nHuman: Eh?\n\nAssistant:"
    )


@pytest.mark.parametrize(("name", "begin", "end"), [("llama", "<s>", "</s>"), ("qwen", "", "</s>")])
def test_the_alpaca_template_by_hand(name, begin, end):
    render = styled(None, name, template=OWN["alpaca"])
    task = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    asked = "\n\n### Instruction:\nHi\n\n### Response:\n"
    rendered = render(PreferenceExample([user("Hi")], ([assistant("Yo")],)))
    assert (rendered.prompt, rendered.responses) == (begin + task + asked, ((Segment(f"Yo{end}", True),),))
    assert render(PreferenceExample([system("Be kind."), user("Hi")], ([assistant("Yo")],))).prompt == (
        f"{begin}Be kind.{asked}"
    )
    assert render(PreferenceExample([user("Hi")], ([assistant("Yo"), user("Hi"), assistant("No")],))).responses == (
        (Segment(f"Yo{end}", True), Segment(asked, False), Segment(f"No{end}", True)),
    )


@pytest.mark.parametrize("name", OWN)
def test_without_end_token_the_packages_templates_write_none(name):
    make = MAKES["llama"]()
    bare = type(make.tokenizer)(tokenizer_object=make.tokenizer.backend_tokenizer)
    rendered = Renderer(bare, Chat(template=OWN[name]))(PreferenceExample([user("Hi")], ([assistant("Yo")],)))
    assert not rendered.prompt.startswith("<s>")
    assert rendered.responses[0][0].text.strip() == "Yo"
    _, notes = tokenize(bare, [user("a")], [assistant("b")], [assistant("c")], chat=Chat(template=OWN[name]))
    assert notes.no_end == 2


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    ("messages", "tools", "detail"),
    [
        ([user("a"), tool("b"), user("c")], None, "a system message in front, not tool"),
        ([user("a"), system("b"), user("c")], None, "a system message in front, not system"),
        ([user("a")], [{"name": "add"}], "this template knows no tools"),
        ([user("a"), assistant("", tool_calls=[{"function": {}}])], None, "this template knows no tools"),
    ],
)
def test_what_the_packages_templates_do_not_know_they_refuse(name, messages, tools, detail):
    with pytest.raises(UnusableRow, match=detail):
        styled(None, template=OWN[name])(PreferenceExample(messages, ([assistant("d")],), tools=tools))


def test_a_dialogue_by_hand():
    tokenizer = GEMMA.give(MAKES["llama"]().tokenizer)
    dialogue = [assistant("x"), user("c"), assistant("y"), user("xyz"), assistant("ab")]
    example, notes = tokenize(tokenizer, [user("c")], dialogue)
    assert tokenizer.decode(example.prompt_ids) == "<s><start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"
    header, model = "[<start_of_turn>] [u] [s] [e] [r] [Ċ]", "[<start_of_turn>] [m] [o] [d] [e] [l] [Ċ]"
    assert shown(tokenizer, example) == [
        f"x <end_of_turn> Ċ {header} [c] [<end_of_turn>] [Ċ] {model} "
        f"y <end_of_turn> Ċ {header} [xyz] [<end_of_turn>] [Ċ] {model} ab <end_of_turn> Ċ"
    ]
    assert notes == Notes()


@pytest.mark.parametrize(
    ("room", "left"),
    [
        (3, "x <end_of_turn> Ċ"),
        (1, "x"),
        (5, "x <end_of_turn> Ċ [<start_of_turn>] [u]"),  # in the middle of a question: its tokens are read, not learned
        (21, None),  # all but the end of the last line
    ],
)
def test_a_dialogue_is_cut_wherever_it_is_too_long(room, left):
    tokenizer = GEMMA.give(MAKES["llama"]().tokenizer)
    dialogue = [assistant("x"), user("c"), assistant("y")]
    whole, _ = tokenize(tokenizer, [user("c")], dialogue)
    assert (len(whole.prompt_ids), len(whole.response_ids[0])) == (17, 22)
    example, notes = tokenize(tokenizer, [user("c")], dialogue, max_length=17 + room)
    assert shown(tokenizer, example) == [left or shown(tokenizer, whole)[0].removesuffix(" Ċ")]
    assert notes.cut_responses == 1
    with pytest.raises(UnusableRow, match=f"{TOO_LONG}: 17 prompt tokens, 39 with the longest response"):
        tokenize(tokenizer, [user("c")], dialogue, max_length=17 + room, truncation="drop")


def test_a_dialogue_without_an_answer_left_is_no_example():
    tokenizer = BARE.give(MAKES["llama"]().tokenizer)
    with pytest.raises(UnusableRow, match=f"{NOTHING_LEFT}: the prompt has 4 tokens of `max_length` 4"):
        tokenize(tokenizer, [user("xxxx")], [assistant("y")], max_length=4)
    # This template writes nothing of a call, so what the tool says comes first, and the answer is cut away.
    called = [assistant("", tool_calls=[{}]), tool("xxx"), assistant("y")]
    assert shown(tokenizer, tokenize(tokenizer, [user("c")], called, max_length=5)[0]) == ["[x] [x] [x] y"]
    with pytest.raises(UnusableRow, match=f"{NOTHING_LEFT}: no token of a response is left behind the prompt"):
        tokenize(tokenizer, [user("c")], called, max_length=4)


def test_a_merge_in_a_dialogue_concerns_its_own_boundary_alone():
    """All together are x ab y xyz: neither prompt and first answer nor second question and answer keep their tokens."""
    tokenizer = BARE.give(MAKES["llama"]().tokenizer)
    example, notes = tokenize(tokenizer, [user("xa")], [assistant("b"), user("yx"), assistant("yz"), user("c")][:3])
    assert tokenizer.convert_ids_to_tokens(example.prompt_ids) == ["x", "a"]
    assert shown(tokenizer, example) == ["b [y] [x] y z"]
    assert (notes.merged, notes.no_end) == (1, 1)
    always = BARE.give(MAKES["always"]().tokenizer)
    example, notes = tokenize(always, [user("x</s>")], [assistant("ya"), user("b"), assistant("c")])
    # Behind the special token this tokenizer puts a space, and the merge at the end of the answer does not change that.
    assert shown(always, example) == ["▁ y a [b] c"]
    assert notes.merged == 1


@pytest.mark.parametrize("name", ["llama", "qwen", "gpt2"])
def test_tools_reach_the_template_and_what_they_answer_is_not_scored(name):
    tokenizer = QWEN_3.give(MAKES[name]().tokenizer)
    call = assistant("", tool_calls=[{"function": {"name": "add"}}])
    example, _ = tokenize(tokenizer, [user("a")], [call, tool("xyz"), assistant("b")], tools=[{"name": "add"}])
    assert tokenizer.decode(example.prompt_ids) == (
        '<|im_start|>system\nTools: {"name": "add"}<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n'
    )
    pieces = runs(*example.response_ids, *example.scored)
    assert [(scored, tokenizer.decode(piece)) for scored, piece in pieces] == [
        (True, '<think>\n\n</think>\n\n<tool_call>{"name": "add"}</tool_call><|im_end|>\n'),
        (False, "<|im_start|>user\n<tool_response>xyz</tool_response><|im_end|>\n<|im_start|>assistant\n"),
        (True, "<think>\n\n</think>\n\nb<|im_end|>\n"),
    ]


# Think blocks.


def test_variables_reach_the_template():
    asked = PreferenceExample([user("Hi")], ([assistant("Yo")],))
    thinking, not_thinking = styled(QWEN_3), styled(QWEN_3, variables={"enable_thinking": False})
    assert thinking(asked).responses == ((Segment("<think>\n\n</think>\n\nYo<|im_end|>\n", True),),)
    assert not_thinking(asked).responses == ((Segment("Yo<|im_end|>\n", True),),)
    assert not_thinking(asked).prompt == thinking(asked).prompt + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("name", ["add_generation_prompt", "tools", "messages", "max_length"])
def test_variables_that_are_not_the_templates_are_refused(name):
    with pytest.raises(UsageError, match=rf"`data.init_args.chat.variables` cannot set {name}: .*; leave it out\."):
        Chat(variables={"date": "today", name: 1})
    Chat(variables={"documents": []})


OPENING = joined(r"""
{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}{% endfor %}
{% if add_generation_prompt %}
    {{ '<|assistant|>' }}{% if enable_thinking is not defined %}{{ '<think>' }}{% endif %}
{% endif %}
""")
SYSTEM_LAST = joined(r"""
{% for message in messages if message.role != 'system' %}
    {{ '[INST]' + (messages[0].content if loop.last else '') + message.content + '[/INST]' }}
{% endfor %}
""")


@pytest.mark.parametrize(
    ("template", "prompt", "response", "detail"),
    [
        # As in Qwen 3: the first answer has a think block while it is the last.
        (
            QWEN_3.template,
            [user("a")],
            [assistant("b"), user("c"), assistant("d")],
            r"it ends in '<think>\n\n</think>\n\nb<|im_end|>\n', with one that stands 'b<|im_end|>\n<|im_start|>us",
        ),
        # As in DeepSeek R1: the template opens a think block for an answer.
        (OPENING, [user("a")], [assistant("b")], "before an answer it ends in '<think>', with one that stands 'b'"),
        # As in some of Mistral's: the system message stands before the last question while that is the last message.
        (SYSTEM_LAST, [system("s"), user("a")], [assistant("b")], "it ends in 'sa[/INST]', with one that stands 'a["),
        # The prompt is more than what is left of it.
        ("{{ messages | length * '.' if add_generation_prompt else '' }}", [user("a")], [assistant("b")], "stands ''"),
    ],
)
def test_a_prompt_that_is_rendered_anew_is_named_with_the_remedy(template, prompt, response, detail):
    with pytest.raises(UnusableRow) as caught:
        styled(template)(PreferenceExample(prompt, (response,)))
    assert caught.value.reason == RENDERED_ANEW
    assert detail in caught.value.detail
    assert "`data.init_args.chat: {variables: {enable_thinking: false}}`" in caught.value.detail
    assert "(Messages: {turns: last})" in caught.value.detail


def test_the_remedies_are_remedies():
    asked = PreferenceExample([user("a")], ([assistant("b")],))
    assert styled(OPENING, variables={"enable_thinking": False})(asked).responses == ((Segment("b", True),),)
    last = PreferenceExample([user("a"), assistant("b"), user("c")], ([assistant("d")],))
    assert styled(QWEN_3)(last).responses == ((Segment("<think>\n\n</think>\n\nd<|im_end|>\n", True),),)
    every = PreferenceExample([user("a")], ([assistant("b"), user("c"), assistant("d")],))
    assert len(styled(None, template=OWN["transcript"])(every).responses[0]) == 3


# Templates that are not there, are none, or refuse.


def test_a_file_is_taken_instead_of_the_tokenizers_template(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for message in messages %}«{{ message.content }}»{% endfor %}", encoding="utf-8")
    rendered = styled(CHATML, template=str(path))(PreferenceExample([user("a")], ([assistant("b")],)))
    assert (rendered.prompt, rendered.responses) == ("«a»", ((Segment("«b»", True),),))


def test_a_template_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jinja").write_text("x")
    assert Chat(template="~/mine.jinja").source(MAKES["llama"]().tokenizer) == "x"


def test_a_tokenizer_with_several_templates():
    make = MAKES["llama"]()
    make.tokenizer.chat_template = {"default": "d{{ messages | length }}", "tool_use": "t{{ messages | length }}"}
    render = Renderer(make.tokenizer, Chat())
    response = [assistant("b")]
    for tools, prompt in ((None, "d1"), ([{"name": "add"}], "t1")):
        with pytest.raises(UnusableRow, match="ends in '1', with one that stands '2'"):
            render(PreferenceExample([user("a")], (response,), tools=tools))
        assert render._render([user("a")], True, tools) == prompt


def test_no_template_at_all():
    with pytest.raises(UsageError) as caught:
        styled(None)(PreferenceExample([user("a")], ([assistant("b")],)))
    assert str(caught.value) == (
        "The rows hold messages, and the tokenizer has no chat template. Give one by `data.init_args.chat: {template: "
        "FILE}`; for models that know none there are package:data/templates/transcript.jinja and "
        "package:data/templates/alpaca.jinja."
    )


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_template_that_cannot_be_read(content, tmp_path):
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"`data.init_args.chat.template`: cannot read .*mine.jinja: .* Give the path"):
        styled(None, template=str(path))


def test_packages_templates_are_named_where_another_is_missed():
    with pytest.raises(UsageError, match=r"the package has package:data/templates/transcript.jinja and package:data"):
        styled(None, template="package:data/templates/hh.jinja")


def test_a_template_with_a_mistake(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ bos_token }}\n{% if messages %}")
    messages = PreferenceExample([user("a")], ([assistant("b")],))
    with pytest.raises(UsageError, match=r"mine.jinja is no Jinja template: line 2: .* Mend it, or give another by"):
        styled(None, template=str(path))(messages)
    with pytest.raises(UsageError, match=r"The chat template of the tokenizer is no Jinja template: line 1: "):
        styled("{{ messages | no_such_filter }}")(messages)


@pytest.mark.parametrize(
    ("template", "messages", "detail"),
    [
        (GEMMA.template, [system("a"), user("b")], "please. Mend the row, or give another template."),
        (GEMMA.template, [user("a"), user("b")], "take turns, please"),
        ("{{ messages[0].name.first }}", [user("a")], "has no attribute 'name'"),
        ("{{ messages[0].content | dictsort }}", [user("a")], "'str' object has no attribute 'items'"),
        ("{{ 1 + messages[0].content }}", [user("a")], "unsupported operand"),
    ],
)
def test_messages_that_a_template_refuses_are_named(template, messages, detail):
    with pytest.raises(UnusableRow) as caught:
        styled(template)(PreferenceExample(messages, ([assistant("c")],)))
    assert caught.value.reason == REFUSED
    assert detail in caught.value.detail


def test_a_refusal_leaves_the_other_examples_alone():
    tokenizer = GEMMA.give(MAKES["llama"]().tokenizer)
    good, bad = [user("a")], [user("a"), user("b")]
    examples = [PreferenceExample(prompt, ([assistant("c")],), row) for row, prompt in enumerate([good, bad, good], 1)]
    first, second, third = Tokenization(tokenizer=tokenizer, max_length=99)(examples)
    assert isinstance(second, UnusableRow)
    assert (first[0].row, third[0].row) == (1, 3)
    assert first[0]._replace(row=3) == third[0]


# Plain texts.


def test_plain_texts_stay_plain_unless_they_are_to_be_messages():
    text = PreferenceExample("Hi", ("Yo", "No"))
    messages = PreferenceExample([user("Hi")], ([assistant("Yo")], [assistant("No")]))
    plain, put_in = styled(CHATML), styled(CHATML, texts=True)
    assert plain(text).prompt == "Hi"
    assert plain(text).responses == ((Segment("Yo", True),), (Segment("No", True),))
    assert not plain(text).templated
    assert put_in(text) == put_in(messages) == plain(messages)


@pytest.mark.parametrize(
    ("prompt", "responses", "reason"),
    [("", ("a", "b"), NO_PROMPT), (" \n", ("a", "b"), NO_PROMPT), ("a", ("b", ""), NO_RESPONSE)],
)
def test_an_empty_text_is_no_message(prompt, responses, reason):
    with pytest.raises(UnusableRow) as caught:
        styled(CHATML, texts=True)(PreferenceExample(prompt, responses))
    assert caught.value.reason == reason


def test_whole_texts_are_split_before_they_become_messages():
    tokenizer = CHATML.give(MAKES["llama"]().tokenizer)
    example, _ = tokenize(tokenizer, None, "so it is c", "so it is xyz", chat=Chat(texts=True))
    assert tokenizer.decode(example.prompt_ids) == "<|im_start|>user\nso it is<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(ids) for ids in example.response_ids] == [" c<|im_end|>\n", " xyz<|im_end|>\n"]


# What is noted.


def test_a_template_that_writes_no_end_of_turn_is_noted():
    """The special tokens of a header are none, even three tokens from the end of an answer."""
    silent = Style("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}", ("<|assistant|>",))
    silent = silent._replace(template=silent.template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    tokenizer = silent.give(MAKES["llama"]().tokenizer)
    _, notes = tokenize(tokenizer, [user("a")], [assistant("b"), user("c"), assistant("x")], [assistant("y")])
    assert notes.no_end == 2
    for style in STYLES.values():
        tokenizer = style.give(MAKES["llama"]().tokenizer)
        assert tokenize(tokenizer, [user("a")], [assistant("b")], [assistant("c")])[1].no_end == 0


def test_special_tokens_are_noted_where_people_wrote_them_and_not_where_the_template_did():
    tokenizer = CHATML.give(MAKES["llama"]().tokenizer)
    for prompt, response, special in (("a", "b", 0), ("a<|im_end|>", "b", 1), ("a", "b</s>", 1), ("a<|im_", "b", 0)):
        assert tokenize(tokenizer, [user(prompt)], [assistant(response)])[1].special == special


def test_texts_that_a_template_makes_equal():
    tokenizer = GEMMA.give(MAKES["llama"]().tokenizer)
    with pytest.raises(UnusableRow, match=EQUAL):
        tokenize(tokenizer, [user("a")], [assistant("b")], [assistant("b ")])  # it trims


# By law.


@st.composite
def dialogues(draw, style: Style) -> tuple[list[Message], list[list[Message]]]:
    """A prompt, and two responses of one answer, or of several with questions between them."""
    prompt = [system(draw(CONTENT))] if style.system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [user(draw(CONTENT)), assistant(draw(CONTENT))]
    sides = []
    for _ in range(2):
        more = 0 if style is QWEN_3 else draw(st.integers(0, 2))
        turns = [[user(draw(CONTENT)), assistant(draw(CONTENT))] for _ in range(more)]
        sides.append([assistant(draw(CONTENT)), *itertools.chain(*turns)])
    return [*prompt, user(draw(CONTENT))], sides


def second_opinion(tokenizer, prompt: list[Message], response: list[Message]) -> tuple[str, list[tuple[int, int]]]:
    """A dialogue as text, and where in it the answers of the response stand."""
    (text,), (spans,) = render_jinja_template(
        [prompt + response],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return text, spans[sum(message["role"] == "assistant" for message in prompt) :]


@pytest.fixture(scope="module", params=itertools.product(MAKES, LAWFUL), ids="-".join)
def styled_make(request) -> tuple[str, Make, Style]:
    """Every make of tokenizer with every template."""
    name, style = request.param
    make = MAKES[name]()
    LAWFUL[style].give(make.tokenizer)
    return name, make, LAWFUL[style]


@given(data=st.data())
@LAW
def test_what_is_scored_is_what_the_template_marks(styled_make, data):
    name, make, style = styled_make
    tokenizer, (prompt, sides) = make.tokenizer, data.draw(dialogues(style))
    example = PreferenceExample(prompt, tuple(sides))
    (result,) = Tokenization(tokenizer=tokenizer, max_length=9_999)([example])
    if isinstance(result, UnusableRow):
        assert result.reason.startswith(EQUAL)
        return
    (tokens, notes), rendered = result, Renderer(tokenizer, Chat())(example)
    assert tokens.prompt_ids == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert notes.two_begins == 0
    merged = 0
    for index, (side, pieces) in enumerate(zip(sides, rendered.responses, strict=True)):
        text, spans = second_opinion(tokenizer, prompt, side)
        assert rendered.prompt + "".join(piece.text for piece in pieces) == text
        assert [piece.text for piece in pieces if piece.scored] == [text[start:end] for start, end in spans]
        ids = tokens.response_ids[index]
        mask = tokens.scored[index] if tokens.scored else [True] * len(ids)
        the_pieces_are_spelled(make, ids, mask, pieces, exact=name in EXACT and not style.greedy)
        merged += not the_letters_are_scored(tokenizer, tokens.prompt_ids + ids, len(ids), mask, text, spans)
    assert notes.merged == merged


def the_pieces_are_spelled(make: Make, ids, mask, pieces, exact: bool) -> None:
    """Token by token the response is what the template adds, whether tokens merge or not."""
    added = {token: content.content for token, content in make.tokenizer.added_tokens_decoder.items()}
    for (scored, run), piece in zip(runs(ids, mask), pieces, strict=True):
        assert scored == piece.scored
        text = piece.text
        for special in added.values():
            text = text.replace(special, "")
        spelled = make.spelled([token for token in run if token not in added])
        assert spelled == text if exact else nowhite(spelled) == nowhite(make.keeps(text))


def nowhite(text: str) -> str:
    return "".join(text.split())


def the_letters_are_scored(tokenizer, ids, length, mask, text, spans) -> bool:
    """By offsets a letter is in a token that is scored where it is in an answer. False where tokens merge."""
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if whole["input_ids"] != ids:
        return False
    letters = {place for place, letter in enumerate(text) if not letter.isspace()}
    answers = letters & set(itertools.chain(*(range(*span) for span in spans)))
    covered = {True: set(), False: set()}
    for span, scored in zip(whole["offset_mapping"], [False] * (len(ids) - length) + mask, strict=True):
        covered[scored] |= letters & set(range(*span))
    assert covered == {True: answers, False: letters - answers}
    return True


@pytest.mark.parametrize("style", STYLES)
@given(data=st.data())
@LAW
def test_a_begin_token_stands_once_where_template_and_tokenizer_both_write_one(makes, style, data):
    prompt, (side, _) = data.draw(dialogues(STYLES[style]))
    for name in ("llama", "closing", "sentencepiece"):
        tokenizer = STYLES[style].give(MAKES[name]().tokenizer)
        example, notes = tokenize(tokenizer, prompt, side)
        begins = [ids.count(tokenizer.bos_token_id) for ids in (example.prompt_ids, *example.response_ids)]
        assert begins == ["bos_token" in STYLES[style].template, 0]
        assert notes.two_begins == 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("style", ["chatml", "gemma", "bare"])
@given(data=st.data())
@LAW
def test_what_is_cut_is_cut_from_the_whole(style, side, data):
    tokenizer = LAWFUL[style].give(MAKES["llama"]().tokenizer)
    prompt, sides = data.draw(dialogues(LAWFUL[style]))
    max_length = data.draw(st.integers(3, 60))
    max_prompt_length = data.draw(st.integers(1, max_length - 1))
    example = PreferenceExample(prompt, tuple(sides))
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "truncation_side": side}
    (whole,) = Tokenization(tokenizer=tokenizer, max_length=9_999)([example])
    (cut,) = Tokenization(tokenizer=tokenizer, **limits)([example])
    (drop,) = Tokenization(tokenizer=tokenizer, **limits, truncation="drop")([example])
    if isinstance(cut, UnusableRow):
        assert cut.reason.startswith(EQUAL) or cut.reason == NOTHING_LEFT
        return
    (full, _), (tokens, notes) = whole, cut
    room = max_length - len(tokens.prompt_ids)
    assert len(tokens.prompt_ids) == min(len(full.prompt_ids), max_prompt_length)
    assert tokens.response_ids == [ids[:room] for ids in full.response_ids]
    masks = [[True] * len(ids) for ids in full.response_ids]
    kept = [mask[:room] for mask in full.scored or masks]
    assert (tokens.scored or [mask[:room] for mask in masks]) == kept
    assert all(map(any, kept))
    assert notes.cut_responses == sum(len(ids) > room for ids in full.response_ids)
    if notes.cut_prompt or notes.cut_responses:
        assert drop.reason == TOO_LONG
    else:
        assert drop == cut == whole

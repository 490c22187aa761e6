"""Rows of every shape that people keep preferences in, written by hand, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from chat_templates import assistant, system, user

from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.formats import Format, Pairs, SharedPrompts, ShareGPT, Transcripts
from dpo_lightning.data.rankings import Columns, Comparisons, Rankings
from dpo_lightning.data.reading import begin
from dpo_lightning.data.samples import Samples
from dpo_lightning.data.supervised import Alpaca, Completions, Messages, Texts

HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Again\n\nAssistant:"
SAMPLED = {"row": 1, "temperature": 1.0}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def human(words: str) -> dict[str, str]:
    return {"from": "human", "value": words}


def gpt(words: str) -> dict[str, str]:
    return {"from": "gpt", "value": words}


def pair(prompt: Any, *responses: Any, tools: Any = None) -> PreferenceExample:
    return PreferenceExample(prompt, responses, tools=tools)


def answers(prompt: Any, *responses: str, tools: Any = None) -> PreferenceExample:
    """An example of messages whose responses are one message each."""
    asked = [user(prompt)] if isinstance(prompt, str) else prompt
    return PreferenceExample(asked, tuple([assistant(response)] for response in responses), tools=tools)


class Shape(NamedTuple):
    """Rows, the format that is to be found from them, and the examples that they hold."""

    rows: list[dict[str, Any]]
    format: Format
    examples: list[PreferenceExample]


SHAPES = {
    "pairs": Shape(
        [{"prompt": "2+2=", "chosen": " 4", "rejected": " 5", "id": 7}], Pairs(), [pair("2+2=", " 4", " 5")]
    ),
    "pairs in any order": Shape(
        [{"rejected": "5", "chosen": "4", "prompt": "2+2="}], Pairs(), [pair("2+2=", "4", "5")]
    ),
    "pairs of messages": Shape(
        [{"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]}],
        Pairs(),
        [answers("2+2?", "4", "5")],
    ),
    "pairs of one message": Shape(
        [{"prompt": user("2+2?"), "chosen": assistant("4"), "rejected": assistant("5")}],
        Pairs(),
        [answers("2+2?", "4", "5")],
    ),
    "messages, answered by text": Shape(
        [{"prompt": [system("Count."), user("2+2?")], "chosen": "4", "rejected": "5"}],
        Pairs(),
        [answers([system("Count."), user("2+2?")], "4", "5")],
    ),
    "text, answered by messages": Shape(
        [{"prompt": "2+2?", "chosen": [assistant("4")], "rejected": [assistant("5")]}],
        Pairs(),
        [answers("2+2?", "4", "5")],
    ),
    "messages that repeat the prompt": Shape(
        [
            {
                "prompt": [user("2+2?")],
                "chosen": [user("2+2?"), assistant("4")],
                "rejected": [user("2+2?"), assistant("5")],
            }
        ],
        Pairs(),
        [answers("2+2?", "4", "5")],
    ),
    # HuggingFaceH4/ultrafeedback_binarized
    "text, and messages that repeat it": Shape(
        [
            {
                "prompt": "2+2?",
                "prompt_id": "8b2c",
                "chosen": [user("2+2?"), assistant("4")],
                "rejected": [user("2+2?"), assistant("5")],
                "messages": [user("2+2?"), assistant("4")],
                "score_chosen": 8.5,
                "score_rejected": 3.0,
            },
            {
                "prompt": "Hi",
                "prompt_id": "11aa",
                "chosen": [user("Hi"), assistant("Hello."), user("2+2?"), assistant("4")],
                "rejected": [user("Hi"), assistant("Hello."), user("2+2?"), assistant("5")],
                "messages": [user("Hi"), assistant("Hello."), user("2+2?"), assistant("4")],
                "score_chosen": 8.5,
                "score_rejected": 8.5,
            },
        ],
        Pairs(),
        [answers("2+2?", "4", "5"), answers([user("Hi"), assistant("Hello."), user("2+2?")], "4", "5")],
    ),
    "texts that repeat the prompt": Shape(
        [{"prompt": "Q: 2+2\nA:", "chosen": "Q: 2+2\nA: 4", "rejected": "Q: 2+2\nA: 5"}],
        Pairs(repeated=True),
        [pair("Q: 2+2\nA:", " 4", " 5")],
    ),
    "aliases of pairs": Shape(
        [{"question": "2+2=", "response_chosen": "4", "reject": "5"}],
        Pairs(prompt="question", chosen="response_chosen", rejected="reject"),
        [pair("2+2=", "4", "5")],
    ),
    # lvwerra/stack-exchange-paired: j is the better one
    "stack exchange": Shape(
        [{"question": "2+2=", "response_j": "4", "response_k": "5"}],
        Pairs(prompt="question", chosen="response_j", rejected="response_k"),
        [pair("2+2=", "4", "5")],
    ),
    # Intel/orca_dpo_pairs: rows without a system message are messages all the same
    "pairs with a system message": Shape(
        [
            {"system": "Count.", "question": "2+2?", "chosen": "4", "rejected": "5"},
            {"system": "", "question": "1+1?", "chosen": "2", "rejected": "3"},
            {"system": None, "question": "1+2?", "chosen": "3", "rejected": "4"},
        ],
        Pairs(prompt="question", system="system"),
        [
            answers([system("Count."), user("2+2?")], "4", "5"),
            answers("1+1?", "2", "3"),
            answers("1+2?", "3", "4"),
        ],
    ),
    "pairs with tools": Shape(
        [
            {"prompt": "2+2?", "chosen": "4", "rejected": "5", "tools": TOOLS},
            {"prompt": "1+1?", "chosen": "2", "rejected": "3", "tools": []},
        ],
        Pairs(tools="tools"),
        [answers("2+2?", "4", "5", tools=TOOLS), answers("1+1?", "2", "3")],
    ),
    "an instruction with an input": Shape(
        [
            {"instruction": "Add.", "input": "2+2", "chosen": "4", "rejected": "5"},
            {"instruction": "Wait.", "input": "", "chosen": "Yes.", "rejected": "No."},
        ],
        Pairs(prompt="instruction", context="input"),
        [pair("Add.\n\n2+2", "4", "5"), pair("Wait.", "Yes.", "No.")],
    ),
    # Anthropic/hh-rlhf
    "transcripts": Shape(
        [{"chosen": f"{HH} Yes.", "rejected": f"{HH} No."}], Transcripts(), [pair(HH, " Yes.", " No.")]
    ),
    "texts with the prompt in both": Shape(
        [{"chosen": "Q: 2+2\nA: 4", "rejected": "Q: 2+2\nA: 5"}],
        SharedPrompts(),
        [PreferenceExample(None, ("Q: 2+2\nA: 4", "Q: 2+2\nA: 5"))],
    ),
    "messages with the prompt in both": Shape(
        [{"chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]}],
        SharedPrompts(),
        [answers("2+2?", "4", "5")],
    ),
    "messages with tools and the prompt in both": Shape(
        [{"chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")], "tools": TOOLS}],
        SharedPrompts(tools="tools"),
        [answers("2+2?", "4", "5", tools=TOOLS)],
    ),
    "a dialogue, answered by messages": Shape(
        [
            {"conversations": [human("Hi"), gpt("Hello."), human("2+2?")], "chosen": gpt("4"), "rejected": gpt("5")},
            {
                "conversations": [{"from": "system", "value": "Count."}, human("2+2?")],
                "chosen": gpt("4"),
                "rejected": gpt("5"),
            },
        ],
        ShareGPT(),
        [
            answers([user("Hi"), assistant("Hello."), user("2+2?")], "4", "5"),
            answers([system("Count."), user("2+2?")], "4", "5"),
        ],
    ),
    "a dialogue, answered by text": Shape(
        [{"conversations": [human("2+2?")], "chosen": "4", "rejected": "5"}], ShareGPT(), [answers("2+2?", "4", "5")]
    ),
    "a dialogue, answered by lists": Shape(
        [{"conversations": [human("2+2?")], "chosen": [gpt("4")], "rejected": [gpt("5")]}],
        ShareGPT(),
        [answers("2+2?", "4", "5")],
    ),
    "a ranking, best first": Shape(
        [{"prompt": "2+2=", "responses": ["4", "5", "a"]}], Rankings(), [pair("2+2=", "4", "5", "a")]
    ),
    "a ranking by scores": Shape(
        [{"prompt": "2+2=", "responses": ["5", "4", "a"], "scores": [0.5, 3, -1.0]}],
        Rankings(scores="scores"),
        [pair("2+2=", "4", "5", "a")],
    ),
    "samples": Shape(
        [
            {**SAMPLED, "prompt": "2+2=", "responses": ["4", "4", "5"], "tokens": [2, 2, 2], "finished": [True] * 3},
            {**SAMPLED, "prompt": "1+1=", "responses": ["2"], "tokens": [2], "finished": [False]},
        ],
        Samples(),
        [
            *(pair("2+2=", text)._replace(response=number) for number, text in enumerate("445", start=1)),
            pair("1+1=", "2")._replace(response=1),
        ],
    ),
    "samples of messages": Shape(
        [{**SAMPLED, "prompt": [user("2+2?")], "responses": ["4", "5"], "tokens": [2, 2], "finished": [True] * 2}],
        Samples(),
        [answers("2+2?", text)._replace(response=number) for number, text in enumerate("45", start=1)],
    ),
    "samples with scores are a ranking": Shape(
        [
            {
                **SAMPLED,
                "prompt": "q",
                "responses": ["4", "5"],
                "tokens": [2, 2],
                "finished": [True, True],
                "scores": [0, 1],
            }
        ],
        Rankings(scores="scores"),
        [pair("q", "5", "4")],
    ),
    "a ranking of messages": Shape(
        [{"prompt": [user("2+2?")], "responses": [[assistant("4")], assistant("5"), "6"]}],
        Rankings(),
        [answers("2+2?", "4", "5", "6")],
    ),
    "a list of outputs, best first": Shape(
        [
            {"instruction": "2+2?", "input": "", "output": ["4", "5"], "history": []},
            {"instruction": "And 3+3?", "input": "", "output": ["6", "7", "8"], "history": [["2+2?", "4"]]},
        ],
        Alpaca(history="history"),
        [answers("2+2?", "4", "5"), answers([user("2+2?"), assistant("4"), user("And 3+3?")], "6", "7", "8")],
    ),
    # LLMBar, AlpacaEval
    "a comparison": Shape(
        [
            {"input": "2+2=", "output_1": "4", "output_2": "5", "label": 1},
            {"input": "1+1=", "output_1": "3", "output_2": "2", "label": 2},
        ],
        Comparisons(prompt="input"),
        [pair("2+2=", "4", "5"), pair("1+1=", "2", "3")],
    ),
    "a comparison by a preference": Shape(
        [
            {"instruction": "2+2=", "output_1": "4", "output_2": "5", "preference": 1.0},
            {"instruction": "1+1=", "output_1": "3", "output_2": "2", "preference": 2.0},
        ],
        Comparisons(prompt="instruction", label="preference"),
        [pair("2+2=", "4", "5"), pair("1+1=", "2", "3")],
    ),
    "a comparison by name": Shape(
        [{"prompt": "1+1=", "response_a": "3", "response_b": "2", "winner": "model_b"}],
        Comparisons(first="response_a", second="response_b", label="winner", labels=("model_a", "model_b")),
        [pair("1+1=", "2", "3")],
    ),
    "columns of lists": Shape(
        [{"question": list("abcdefg"), "chosen": list("hijklmn"), "rejected": list("opqrstu"), "tags": ["x"]}],
        Columns(rows=Pairs(prompt="question")),
        [pair(*triple) for triple in zip("abcdefg", "hijklmn", "opqrstu", strict=True)],
    ),
    "columns of instructions": Shape(
        [{"instruction": ["Add.", "Wait."], "input": ["2+2", ""], "output": ["4", "Yes."]}],
        Columns(rows=Alpaca()),
        [answers("Add.\n\n2+2", "4"), answers("Wait.", "Yes.")],
    ),
    "text": Shape([{"text": "Once upon a time", "label": 1}], Texts(), [pair("", "Once upon a time")]),
    "a dialogue": Shape(
        [{"messages": [user("Hi"), assistant("Hello."), user("2+2?"), assistant("4")], "prompt": "Hi"}],
        Messages(),
        [pair([user("Hi")], [assistant("Hello."), user("2+2?"), assistant("4")])],
    ),
    "a dialogue with a system message": Shape(
        [{"conversations": [human("2+2?"), gpt("4")], "system": "Count.", "tools": '[{"name": "add"}]'}],
        Messages(messages="conversations", system="system", tools="tools"),
        [answers([system("Count."), user("2+2?")], "4", tools=[{"name": "add"}])],
    ),
    "a completion": Shape([{"prompt": "2+2=", "completion": "4"}], Completions(), [pair("2+2=", "4")]),
    "a completion as messages": Shape(
        [{"prompt": [user("2+2?")], "completion": [assistant("4")]}], Completions(), [answers("2+2?", "4")]
    ),
    # openai/gsm8k
    "a question and its answer": Shape(
        [{"question": "2+2=", "answer": "4\n#### 4"}],
        Completions(prompt="question", completion="answer"),
        [pair("2+2=", "4\n#### 4")],
    ),
    # Open-Orca/OpenOrca
    "a completion with a system message": Shape(
        [{"id": "1", "system_prompt": "Count.", "question": "2+2?", "response": "4"}],
        Completions(prompt="question", completion="response", system="system_prompt"),
        [answers([system("Count."), user("2+2?")], "4")],
    ),
    # databricks/databricks-dolly-15k
    "an instruction with a context": Shape(
        [{"instruction": "Add.", "context": "2+2", "response": "4", "category": "closed_qa"}],
        Completions(prompt="instruction", context="context", completion="response"),
        [pair("Add.\n\n2+2", "4")],
    ),
    # tatsu-lab/alpaca
    "an instruction, its input and output": Shape(
        [
            {"instruction": "Add.", "input": "2+2", "output": "4", "text": "### Add. ### 2+2 ### 4"},
            {"instruction": "Wait.", "input": "", "output": "Yes.", "text": "### Wait. ### Yes."},
        ],
        Alpaca(),
        [answers("Add.\n\n2+2", "4"), answers("Wait.", "Yes.")],
    ),
    "an instruction and its output": Shape(
        [{"instruction": "2+2?", "output": "4"}], Alpaca(context=None), [answers("2+2?", "4")]
    ),
}


def read(rows: Sequence[Any], shape: Format | None = None) -> list[PreferenceExample | UnusableRow]:
    """What rows hold, without their numbers."""
    items = [item for _, items in begin(iter(enumerate(rows, start=1)), shape, "rows").examples() for item in items]
    return [item._replace(row=0) if isinstance(item, PreferenceExample) else item for item in items]

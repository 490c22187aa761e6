"""Chat templates in the manner of those that models come with; what an answer is stands in ``generation`` blocks."""

from __future__ import annotations

from typing import NamedTuple

from transformers import AddedToken, PreTrainedTokenizerFast

from dpo_lightning.data.example import Message


class Style(NamedTuple):
    """A template and what it asks of messages.

    Attributes:
        template: The template.
        specials: Tokens that it writes, besides begin and end.
        system: Whether it takes a system message.
        greedy: Whether its tokens take the white space behind them.
    """

    template: str
    specials: tuple[str, ...]
    system: bool = True
    greedy: bool = False

    def give(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        """A tokenizer with this template."""
        tokenizer.add_tokens([AddedToken(token, special=True, rstrip=self.greedy) for token in self.specials])
        tokenizer.chat_template = self.template
        return tokenizer


def joined(lines: str) -> str:
    """A template written with a line and an indentation for each step."""
    return "".join(line.strip() for line in lines.splitlines())


CHATML = Style(
    joined(r"""
    {% for message in messages %}
        {{ '<|im_start|>' + message.role + '\n' }}
        {% if message.role == 'assistant' %}
            {% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}
        {% else %}
            {{ message.content + '<|im_end|>\n' }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
    """),
    ("<|im_start|>", "<|im_end|>"),
)
LLAMA_3 = Style(
    joined(r"""
    {{ bos_token }}
    {% for message in messages %}
        {{ '<|header|>' + message.role + '<|end_header|>\n\n' }}
        {% if message.role == 'assistant' %}
            {% generation %}{{ message.content | trim + '<|eot|>' }}{% endgeneration %}
        {% else %}
            {{ message.content | trim + '<|eot|>' }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\n\n' }}{% endif %}
    """),
    ("<|header|>", "<|end_header|>", "<|eot|>"),
)
GEMMA = Style(
    joined(r"""
    {{ bos_token }}
    {% if messages[0].role == 'system' %}{{ raise_exception('no system message, please') }}{% endif %}
    {% for message in messages %}
        {% if (message.role == 'user') != (loop.index0 is even) %}{{ raise_exception('take turns, please') }}{% endif %}
        {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}
        {% if message.role == 'assistant' %}
            {% generation %}{{ message.content | trim + '<end_of_turn>\n' }}{% endgeneration %}
        {% else %}
            {{ message.content | trim + '<end_of_turn>\n' }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
    """),
    ("<start_of_turn>", "<end_of_turn>"),
    system=False,
)
# Nothing in front of an answer, so there is nothing for a generation prompt to add.
MISTRAL = Style(
    joined(r"""
    {{ bos_token }}
    {% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
    {% for message in (messages[1:] if system else messages) %}
        {% if message.role == 'user' %}
            {{ '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
        {% else %}
            {% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
        {% endif %}
    {% endfor %}
    """),
    ("[INST]", "[/INST]"),
)
PHI = Style(
    joined(r"""
    {% for message in messages %}
        {{ '<|' + message.role + '|>\n' }}
        {% if message.role == 'assistant' %}
            {% generation %}{{ message.content + '<|end|>\n' }}{% endgeneration %}
        {% else %}
            {{ message.content + '<|end|>\n' }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
    """),
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    greedy=True,
)
# An answer behind the last question has a think block, even an empty one; answers before it lose theirs.
QWEN_3 = Style(
    joined(r"""
    {% set place = namespace(question=0) %}
    {% for message in messages %}
        {% if message.role == 'user' %}{% set place.question = loop.index0 %}{% endif %}
    {% endfor %}
    {% if tools %}
        {{ '<|im_start|>system\nTools:' }}
        {% for tool in tools %}{{ ' ' + (tool | tojson) }}{% endfor %}
        {{ '<|im_end|>\n' }}
    {% endif %}
    {% for message in messages %}
        {% if message.role == 'assistant' %}
            {{ '<|im_start|>assistant\n' }}
            {% generation %}
                {% if loop.index0 > place.question %}
                    {{ '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}
                {% endif %}
                {{ message.content }}
                {% for call in message.tool_calls or [] %}
                    {{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
                {% endfor %}
                {{ '<|im_end|>\n' }}
            {% endgeneration %}
        {% elif message.role == 'tool' %}
            {{ '<|im_start|>user\n<tool_response>' + message.content + '</tool_response><|im_end|>\n' }}
        {% else %}
            {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}
        {{ '<|im_start|>assistant\n' }}
        {% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
    {% endif %}
    """),
    ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
)
# Contents alone: wherever one message ends and the next begins, tokens may merge.
BARE = Style(
    joined("""
    {% for message in messages %}
        {% if message.role == 'assistant' %}
            {% generation %}{{ message.content }}{% endgeneration %}
        {% else %}
            {{ message.content }}
        {% endif %}
    {% endfor %}
    """),
    (),
)
STYLES = {"chatml": CHATML, "llama_3": LLAMA_3, "gemma": GEMMA, "mistral": MISTRAL, "phi": PHI, "qwen_3": QWEN_3}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: object) -> Message:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def tool(content: str) -> Message:
    return {"role": "tool", "content": content}

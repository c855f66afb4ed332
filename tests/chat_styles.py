"""Tiny real tokenizers with the chat templates of real models, and a way to write down a mask."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorakit.data.chat import ChatFormat, Example
from lorakit.data.sources import Origin, Row

# SmolLM2-Instruct: a default system turn; the end token is also the padding token.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Llama-3-Instruct: the template writes BOS, and so does the tokenizer by itself; turns and texts end differently.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# Qwen3: answers before the last question lose their think block; the ones after it always have one, if need be empty.
QWEN3 = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last_query_index = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Mistral-7B-Instruct: no system turn, no header before an answer, the end token of texts after each answer.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

# Gemma: other role names, trimmed content.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

# Phi-3: the end of a turn, and after the last one the end of the text as well.
PHI3 = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Home-made templates: no end token; one after the last answer only; a think header when asking but not when showing.
NO_END = (
    "{% for message in messages %}### {{ message['role'] }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
END_ONCE = NO_END.replace("{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add")
THINK_WHEN_ASKED = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>",
    "<|end|>",
]  # fmt: skip
_LINES = [
    *("assistant", "answer", "Blue", "Red", "and"),  # words that also start a line; " answer" is another token
    "system user assistant model tool You are helpful and the answer is here",
    "What is the answer? The answer is four. What is two and two? Name a colour. Blue. Red.",
    "calculate name arguments function tools think response get_weather city Paris sunny",
]


def make_tokenizer(template=None, *, bos=None, eos="<|endoftext|>", pad=None, adds_bos=False):
    """A byte-level BPE tokenizer of a few dozen words; `adds_bos`: it begins plain texts with BOS, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_LINES * 3, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


STYLES = {
    "chatml": lambda: make_tokenizer(CHATML, bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>"),
    "llama3": lambda: make_tokenizer(
        LLAMA3, bos="<|begin_of_text|>", eos="<|end_of_text|>", pad="<|end_of_text|>", adds_bos=True
    ),
    "qwen3": lambda: make_tokenizer(QWEN3, eos="<|im_end|>", pad="<|endoftext|>"),
    "mistral": lambda: make_tokenizer(MISTRAL, bos="<s>", eos="</s>", pad="</s>", adds_bos=True),
    "gemma": lambda: make_tokenizer(GEMMA, bos="<s>", eos="</s>", adds_bos=True),
    "phi3": lambda: make_tokenizer(PHI3, eos="<|endoftext|>"),
}


def chat(tokenizer, max_length=512, **options):
    return ChatFormat(tokenizer, frozenset(), max_length, **options)


def row(line=1, **fields):
    return Row(Origin("data.jsonl", line), fields)


def messages(*contents, system=None):
    """User and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def marked(example: Example, tokenizer) -> str:
    """The example as text, its trained stretches between ⟦ and ⟧."""
    text, before = "", False
    for token, trained in zip([*example.ids, None], [*example.trained, False], strict=True):
        text += {(False, True): "⟦", (True, False): "⟧"}.get((before, trained), "")
        text += "" if token is None else tokenizer.decode([token])
        before = trained
    return text


def tokens(example: Example, tokenizer) -> list[tuple[str, bool]]:
    """(text, trained), token by token."""
    return [(tokenizer.decode([token]), trained) for token, trained in zip(example.ids, example.trained, strict=True)]

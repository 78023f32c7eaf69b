"""Chat templates: written as transformers writes them, and stopped where they go wrong."""

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tiny_llm import CHAT_TEMPLATE, fast_tokenizer
from transformers import AutoTokenizer

from dca_jax.bounded import workers
from dca_jax.errors import InputError
from dca_jax.finetune.templates import LLAMA_2
from dca_jax.inference import chat_templates
from dca_jax.inference.chat_templates import ChatTemplates, own_template

# In the manner of the published ones, with all that those call.
TEMPLATES = {
    "ours": CHAT_TEMPLATE,
    "llama-2": LLAMA_2,
    "llama-2 of Meta": """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}\
{% endif %}{% endfor %}""",
    "llama-3.1": """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "parameters": ' }}
            {{- call.function.arguments | tojson }}{{- "}<|eot_id|>" }}
        {%- endfor %}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "qwen-3": """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(
        message.content.startswith('<tool_response>') and message.content.endswith('</x>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')
                [-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "mistral": """\
{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'user' or message['role'] == 'system' %}
        {{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ message['content'] + eos_token}}
    {% else %}{% continue %}{% endif %}
{% endfor %}
""",
    "vicuna": """\
{% if messages[0].role != 'system' %}A chat between a user and an assistant. {% endif %}
{% for m in messages if m.content is defined %}
{%- set said = m.content if m.content is string else m.content | map(attribute='text') | join %}
{{- {'user': 'USER: ', 'assistant': 'ASSISTANT: '}.get(m.role, '') + said ~ ' ' }}
{%- if loop.index > 20 %}{% break %}{% endif %}
{%- endfor %}
{{- 'ASSISTANT:' if add_generation_prompt }}""",
    "parts": """\
{%- for message in messages %}{{ message.role | upper }}:
{%- if message.content is string %} {{ message.content }}
{%- else %}{% for part in message.content %}
{%- if part.type == 'text' %} {{ part.text }}{% else %}<{{ part.type }}>{% endif %}
{%- endfor %}{% endif %}
{% endfor %}""",
    "generation": """\
{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}
{{ m.content }}</s>{% endgeneration %}

{% else %}{{ m.content }}
{% endif %}{% endfor %}""",
    "everything": """\
{%- macro named(m, sep=': ') %}{{ m.role ~ sep }}{{ m | tojson }}{% endmacro %}
{%- set ns = namespace(seen=dict(a=1), count=0) %}
{% for m in messages %}
    {%- set ns.count = ns.count + 1 %}
    {{- named(m) }} {{ m | tojson(indent=2, sort_keys=true) }} {{ m.items() | list }}
    {{- "<b>&'" | tojson }} {{ ['é', 1.5, none, true] | tojson(ensure_ascii=true) }}
    {{ loop.cycle('odd', 'even') }} {{ m | dictsort }} {{ m.thinking }}{{ m.content is defined }}
{% endfor %}
{{ ns.seen }} {{ ns.count }} {{ dict.fromkeys('ab', 1) }} {{ tools is none }} {{ documents }}
{{ range(3) | list }} {{ pad_token }}{{ unk_token }} {{ lipsum is defined }}
{{ cycler('a').next() }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}
{{ '%s and %5.2f' | format('a', 2) }} {{ 'a{}b'.format(1) }} {{ 'x' * 3 }} {{ 7 // 2 }}
""",
}
TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "How far\n is the <sea>? Ça va, 海 🌊 & \"so\" 'on'\u2028 {{ 1 }}"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTen miles. ", "name": None},
    {"role": "user", "content": "And back?"},
]
CONVERSATIONS = {
    "system": TALK,
    "plain": TALK[1:],
    "whole": [*TALK, {"role": "assistant", "content": "More.", "reasoning": "or less"}],
    "parts": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    ],
    "tools": [
        TALK[3],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, "é"]}}}
            ],
        },
        {"role": "tool", "name": "f", "content": "12", "extra": {"1": None, "b": True}},
        {"role": "assistant", "content": "Twelve.", "thinking": None, "reasoning_content": "sum"},
    ],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return fast_tokenizer()


@pytest.fixture(scope="module")
def templates() -> Iterator[ChatTemplates]:
    yield (found := ChatTemplates())
    found._workers.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> ChatTemplates:
    """Stopped after a second, or for 200 MiB."""
    monkeypatch.setattr(chat_templates, "SECONDS", 1)
    monkeypatch.setattr(chat_templates, "MEMORY", 200 * 2**20)
    return ChatTemplates()


def write(templates: ChatTemplates, template: str, messages: Any = TALK, **variables: str) -> str:
    (text,) = templates.write(template, variables, messages, [(len(messages), True)])
    return text


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_written_as_transformers_writes_it(
    tokenizer: Any, templates: ChatTemplates, name: str, conversation: str
) -> None:
    messages, template = CONVERSATIONS[conversation], TEMPLATES[name]
    cuts = [(n, prompt) for n in range(1, len(messages) + 1) for prompt in (False, True)]
    wanted = by_transformers(tokenizer, template, messages, cuts)
    if isinstance(wanted, str):  # refused by both, and for the same reason
        with pytest.raises(InputError) as raised:
            templates.write(template, tokenizer.special_tokens_map, messages, cuts)
        assert " ".join(wanted.split())[:100] in str(raised.value)
        return
    assert templates.write(template, tokenizer.special_tokens_map, messages, cuts) == wanted


def by_transformers(
    tokenizer: Any, template: str, messages: Any, cuts: list[tuple[int, bool]]
) -> list[str] | str:
    """The texts, or the message of what was raised."""
    try:
        return [
            tokenizer.apply_chat_template(
                messages[:n], chat_template=template, add_generation_prompt=prompt, tokenize=False
            )
            for n, prompt in cuts
        ]
    except Exception as error:
        return str(error)


def test_most_conversations_are_written_by_most_templates(
    tokenizer: Any, templates: ChatTemplates
) -> None:
    """Or the comparison above would be one of refusals."""
    written = 0
    for template in TEMPLATES.values():
        for messages in CONVERSATIONS.values():
            try:
                write(templates, template, messages, **tokenizer.special_tokens_map)
            except InputError:
                continue
            written += 1
    assert written >= 35


@pytest.mark.parametrize("name", ["ours", "llama-3.1", "qwen-3", "mistral", "parts"])
def test_an_open_end_is_that_of_transformers(
    tokenizer: Any, templates: ChatTemplates, name: str
) -> None:
    template = TEMPLATES[name]
    for said in ("I think", "I think ", "\n I think\n\n"):
        messages = [*TALK, {"role": "assistant", "content": said}]
        wanted = tokenizer.apply_chat_template(
            messages, chat_template=template, continue_final_message=True, tokenize=False
        )
        assert templates.write_open(template, tokenizer.special_tokens_map, messages) == wanted
    with pytest.raises(InputError, match="omits the last message"):
        templates.write_open("{{ messages[0].content }}", {}, messages)


def test_ids_are_those_of_transformers(llm: Any) -> None:
    wanted = llm.tokenizer.apply_chat_template(
        TALK, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert llm.apply_chat_template(TALK) == wanted


@pytest.mark.parametrize("thinking", [None, True, False])
def test_thinking_is_what_transformers_calls_enable_thinking(
    llm: Any, monkeypatch: pytest.MonkeyPatch, thinking: bool | None
) -> None:
    monkeypatch.setattr(llm.tokenizer, "chat_template", TEMPLATES["qwen-3"])
    asked = {} if thinking is None else {"enable_thinking": thinking}
    for messages in (TALK, CONVERSATIONS["tools"]):
        wanted = llm.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **asked
        )
        assert llm.apply_chat_template(messages, thinking=thinking) == wanted
    prompt = llm.apply_chat_template(TALK, thinking=thinking)
    answer = llm.chat(TALK, max_new_tokens=1, thinking=thinking)
    assert answer.prompt_tokens == len(prompt)
    unasked = llm.apply_chat_template(TALK)
    assert (prompt != unasked) == (thinking is False)


def test_what_json_has_under_another_name_is_taken(templates: ChatTemplates) -> None:
    message = {"role": np.str_("user"), "content": ("a", np.int64(3)), "n": np.float32(0.5)}
    text = write(templates, "{{ messages[0] | tojson }}", (message,))
    assert text == '{"role": "user", "content": ["a", 3], "n": 0.5}'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", r"fails on these messages \(ZeroDivisionError: division by zero\)"),
        ("{{ 1 + 'a' }}", "fails on these messages"),
        ("{{ messages[0].content | int / messages }}", "fails on these messages"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{{ " + "-" * 50_000 + "1 }}", "RecursionError"),
        ("{% include 'other' %}", "no loader"),
        ("{% extends 'other' %}", "no loader"),
        ("{{ '%s %s' | format(1) }}", "not enough arguments"),
        ("{{ '{:d}'.format('a') }}", "fails on these messages"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{{ nothing.at_all }}", "refuses these messages: 'nothing' is undefined"),
        ("{{ raise_exception('no ' ~ 1) }}", "refuses these messages: no 1"),
        ("{% for %}", "refuses these messages: "),
        ("{{ messages.append(1) }}", "refuses these messages: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages: "),
        ("{{ namespace(_x=1) }}", "refuses these messages: "),
        (r"{{ '\ud83d' }}", "UnicodeEncodeError"),
        ("{{ strftime_now(1) }}", "fails on these messages"),
        ("{{ messages | tojson(indent=[]) }}", "fails on these messages"),
        ("{{ raise_exception('long ' * 10000) }}", "long long"),
    ],
)
def test_whatever_a_template_raises_is_one_sentence(
    templates: ChatTemplates, template: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        write(templates, template)
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)
    assert write(templates, "{{ messages | length }}") == "4"


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWING = (
    "{% set ns = namespace(x='aaaaaaaa') %}"
    "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, "it takes longer than 1 seconds"),
        ("{{ 7 ** (7 ** 20) }}", "it takes longer than 1 seconds"),
        ("{{ 'a' * 6000000000 }}", r"it needs more than 0\.2 GiB of memory"),
        ("{{ 'a' * (6e9 | int) }}", "of memory"),
        ("{{ 'a' | center(1000000000) }}", "of memory"),
        ("{{ '%1000000000d' | format(1) }}", "of memory"),
        ("{{ [0] * 1000000000 }}", "of memory"),
        (GROWING, "of memory|longer than"),
        ("{{ range(99999) | list * 3000 | join }}", "of memory|longer than|fails"),
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "more than .* characters"),
        ("{{ 'a' * 20000000 }}", "more than .* characters"),
    ],
)
def test_a_template_that_does_not_end_is_stopped(
    hasty: ChatTemplates, template: str, message: str
) -> None:
    write(hasty, "{{ 1 }}")
    begin = time.monotonic()
    with pytest.raises(InputError, match=message):
        write(hasty, template)
    assert time.monotonic() - begin < 5
    assert write(hasty, "{{ messages | length }}") == "4"  # by another process, if need be


def test_the_limits_leave_room_for_a_library_of_text(templates: ChatTemplates) -> None:
    content = "The sea, la mer, 海. " * 500_000
    text = write(templates, CHAT_TEMPLATE, [{"role": "user", "content": content}])
    assert text == f"<|user|>{content}\n<|assistant|>"


def test_one_process_serves_again_and_again_and_ends_with_its_owner() -> None:
    templates = ChatTemplates()
    for n in range(3):
        assert write(templates, f"{{{{ {n} }}}}") == f"{n}"
    ((_, process),) = templates._workers._idle
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert write(templates, "{{ 5 }}") == "5"
    ((_, again),) = templates._workers._idle
    assert again.pid != process.pid
    del templates
    gc.collect()
    assert again.poll() is not None


def test_threads_do_not_mix_their_answers(templates: ChatTemplates) -> None:
    wrong: list[str] = []

    def ask(name: str) -> None:
        for n in range(20):
            text = write(templates, "{{ messages[0].content }}", [{"content": f"{name}{n}"}])
            if text != f"{name}{n}":
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_a_forked_process_has_a_worker_of_its_own(templates: ChatTemplates) -> None:
    assert write(templates, "{{ 1 }}") == "1"
    ((_, process),) = templates._workers._idle[-1:]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(write(templates, "{{ 2 }}") != "2")
            own = templates._workers._idle[-1][1]
            code += 2 * (own.pid == process.pid)
            templates._workers.close()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert process.poll() is None
    assert write(templates, "{{ 3 }}") == "3"


def test_an_interruption_leaves_no_answer_for_the_next(
    templates: ChatTemplates, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workers, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(templates, "{{ 1 }}")
    assert write(templates, "{{ 2 }}") == "2"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["hi"], r'message 1 must be like \{"role": "user"'),
        ("hi", r'message 1 must be like \{"role": "user"'),
        ([{"role": "user", "content": "a\ud83d"}], "half of a surrogate pair"),
        ([{"role": "user", "content": "caf\udce9"}], "half of a surrogate pair"),
        ([{"role": "user", "content": b"hi"}], "must consist of JSON values"),
        ([{"role": "user", "content": {1, 2}}], "must consist of JSON values"),
        ([{("a", "b"): "user"}], "must consist of JSON values"),
    ],
)
def test_messages_that_are_none(templates: ChatTemplates, messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write(templates, CHAT_TEMPLATE, messages)


def test_messages_nested_too_deeply_or_in_a_circle(templates: ChatTemplates) -> None:
    deep: Any = "a"
    for _ in range(100_000):
        deep = [deep]
    circle: list[Any] = []
    circle.append(circle)
    for content in (deep, circle):
        with pytest.raises(InputError, match="must consist of JSON values"):
            write(templates, CHAT_TEMPLATE, [{"role": "user", "content": content}])


def test_which_template_is_a_tokenizers_own(tokenizer: Any, tmp_path: Any) -> None:
    def having(template: Any) -> Any:
        tokenizer.chat_template = template
        return tokenizer

    try:
        assert own_template(having("{{ 1 }}")) == "{{ 1 }}"
        assert own_template(having({"default": "d", "rag": "r"})) == "d"
        with pytest.raises(InputError, match="has no chat template"):
            own_template(having(None))
        with pytest.raises(InputError, match="must be a string, got 3"):
            own_template(having(3))
        with pytest.raises(InputError, match=r"several chat templates \(rag, tool\)") as raised:
            own_template(having({"tool": CHAT_TEMPLATE, "rag": "r"}))
        tokenizer.save_pretrained(tmp_path)
    finally:
        tokenizer.chat_template = None
    # What the message advises.
    assert "save the one to use as chat_template.jinja in the model's folder" in str(raised.value)
    (tmp_path / "chat_template.jinja").write_text("{{ 2 }}")
    assert own_template(AutoTokenizer.from_pretrained(tmp_path)) == "{{ 2 }}"

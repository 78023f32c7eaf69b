"""Dialogues as tokens, and which of them the loss counts.

A chat template says how a dialogue is written; that it says where the assistant's words begin and
end is too much to ask of those in use. So they are found by rendering beginnings of the dialogue:

    up to the question, with the generation prompt    <s>[INST] How far? [/INST]
    up to the answer                                  <s>[INST] How far? [/INST] Ten miles. </s>
                                                                                ^^^^^^^^^^^^^^^^
    and the answer's tokens, its end marker included, are those of the difference, in one
    tokenization of the whole text. What a model is given before it answers is never trained on, and
    what it must write itself is: where a template has no generation prompt, that is the header of
    the answer too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from dca_jax.errors import InputError
from dca_jax.finetune.dialogues import Dialogue
from dca_jax.inference.chat_templates import ChatTemplates, own_template
from dca_jax.inference.tokenizer import encode, encode_with_places
from dca_jax.text_files import read_text_file

BUILT_IN = ("chat", "llama-2", "chunkllama")

# Meta's format, one BOS and one EOS a round; no system prompt but the dialogue's own.
LLAMA_2 = """\
{%- if messages and messages[0].role == 'system' -%}
  {%- set system, turns = messages[0].content, messages[1:] -%}
{%- else -%}
  {%- set system, turns = none, messages -%}
{%- endif -%}
{%- for turn in turns -%}
  {%- if turn.role != ('user', 'assistant')[loop.index0 % 2] -%}
    {{- raise_exception('user and assistant must alternate') -}}
  {%- elif turn.role == 'assistant' -%}
    {{- ' ' + turn.content.strip() + ' ' + eos_token -}}
  {%- else -%}
    {{- bos_token + '[INST] ' -}}
    {%- if loop.first and system is not none -%}
      {{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' -}}
    {%- endif -%}
    {{- turn.content.strip() + ' [/INST]' -}}
  {%- endif -%}
{%- endfor -%}
"""

# The system prompt of ChunkLlama's script: Llama-2's, as its first release had it.
CHUNKLLAMA_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't "
    "share false information."
)


@dataclass(frozen=True, eq=False)
class Rendered:
    """A dialogue as tokens.

    Attributes:
        tokens: the whole, special ones included.
        trained: `trained[p]` says that token p is a target: predicted from those before it, and
            counted by the loss. False at position 0, before which there is nothing.
    """

    tokens: Int[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]


def render(dialogue: Dialogue, tokenizer: Any, template: str = "chat") -> Rendered:
    """Writes a dialogue as a template has it; `renderer` for many of them."""
    return renderer(tokenizer, template)(dialogue)


def renderer(tokenizer: Any, template: str = "chat") -> Callable[[Dialogue], Rendered]:
    """How dialogues are written.

    Args:
        tokenizer: of `transformers`, a fast one (of its `tokenizers` kind).
        template: "chat", the tokenizer's own chat template; "llama-2", Meta's format without a
            default system prompt; the path of a `.jinja` file, a chat template to use in place of
            the tokenizer's; or "chunkllama", as `chunkllama` has it.

    Returns:
        A function from dialogue to tokens. It raises InputError for a dialogue that the template
        refuses, or where the template writes a beginning otherwise than the whole.

    Raises:
        InputError: no such template, or a tokenizer that has none, that gives no character
            offsets, or that lacks the special tokens that the template needs.
    """
    if template == "chunkllama":
        if (tokenizer.bos_token, tokenizer.eos_token) != ("<s>", "</s>"):
            raise InputError(
                'the template chunkllama writes "<s>" and "</s>", which are not BOS and EOS of '
                f"this tokenizer ({tokenizer.bos_token!r}, {tokenizer.eos_token!r}); use it with "
                "Llama-2's, or choose the template chat or llama-2"
            )
        return lambda dialogue: chunkllama(dialogue, tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for; put a "
            "tokenizer.json into the model's folder, from which a fast tokenizer is made"
        )
    source = template_source(tokenizer, template)
    templates, variables = ChatTemplates(), tokenizer.special_tokens_map

    def write(messages: Sequence[Mapping[str, str]], cuts: Sequence[tuple[int, bool]]) -> list[str]:
        return templates.write(source, variables, messages, cuts, what="this dialogue")

    # What may be an end marker; tokens of spaces only, which some code models have added, are none.
    marks = [n for n, token in tokenizer.added_tokens_decoder.items() if token.content.strip()]
    return lambda dialogue: _from_template(dialogue, tokenizer, write, marks)


def template_source(tokenizer: Any, template: str) -> str:
    """The template's text."""
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "this tokenizer has no chat template: the model was not made for chat. Choose the "
                "template llama-2, or give the path of a .jinja file"
            )
        return own_template(tokenizer)
    if template == "llama-2":
        if tokenizer.bos_token is None or tokenizer.eos_token is None:
            raise InputError(
                "the template llama-2 begins and ends every round with BOS and EOS, and this "
                "tokenizer has not both; give the path of a .jinja file that does without"
            )
        return LLAMA_2
    path = Path(template)
    if path.suffix != ".jinja":
        raise InputError(
            f"{template!r} is no template; expected one of {', '.join(BUILT_IN)}, or the path of a "
            ".jinja file"
        )
    return read_text_file(path)


def _from_template(
    dialogue: Dialogue, tokenizer: Any, write: Callable[..., list[str]], marks: list[int]
) -> Rendered:
    messages = [{"role": turn.role, "content": turn.text} for turn in dialogue.turns]
    answers = [n for n, turn in enumerate(dialogue.turns) if turn.trained]
    beginnings = [cut for n in answers for cut in ((n, True), (n + 1, False))]
    text, *written = write(messages, [(len(messages), False), *beginnings])
    tokens, begins, ends = encode_with_places(tokenizer, text)
    is_mark = np.isin(tokens, marks)
    trained = np.zeros(len(tokens), np.bool_)
    for n, prompt, answered in zip(answers, written[::2], written[1::2], strict=True):
        _check_beginning(prompt, answered, n)
        _check_beginning(answered, text, n)
        start, end = len(prompt), len(answered)
        # A token without characters (Llama-2's mark of a word's beginning) belongs to what
        # follows it; one that reaches into the answer has to be written by the model.
        inside = (begins < end) & ((ends > start) | (begins >= start))
        # Templates write a line break after the end marker. Nobody waits for it.
        (places,) = np.nonzero(inside & is_mark)
        if len(places) and not text[ends[places[-1]] : end].strip():
            inside[places[-1] + 1 :] = False
        trained |= inside
    trained[:1] = False
    return Rendered(tokens, trained)


def _check_beginning(beginning: str, whole: str, turn: int) -> None:
    if whole.startswith(beginning):
        return
    same = next(n for n, char in enumerate(beginning) if whole[n : n + 1] != char)
    raise InputError(
        "this chat template writes the beginning of a dialogue otherwise than the whole, so which "
        f"tokens of turn {turn + 1} are the assistant's cannot be told: up to there it ends in "
        f"{beginning[same:][:40]!r} where the whole has {whole[same:][:40]!r}. Choose the template "
        "llama-2, or give the path of a .jinja file that writes turn after turn"
    )


def chunkllama(dialogue: Dialogue, tokenizer: Any) -> Rendered:
    """A dialogue as ChunkLlama's `fine-tune/train_chunkllama_16k.py` has it, flaws included.

    - The first question follows Llama-2's default system prompt, with spaces of its own around it.
    - Rounds after the first are written only if there are as many questions as answers.
    - The text begins with "<s>", and the tokenizer puts a BOS before it: two at the beginning.
    - Of each round the tokens up to "[/INST]" are masked, less one: lengths are counted with the
      BOS, and one more is taken off. So the last token of "[/INST]", a "]", is trained on.
    - Where a round has not exactly one "[/INST]" (a user wrote it), masking ends: that round and
      all after it are not trained on.
    - The lengths of the rounds are those of each tokenized alone. Where that differs from their
      tokens in the whole, the masks shift; the script prints a warning and trains on.

    The script cuts at 16,384 tokens, from the right; here rows do so. It hides every <unk> from
    attention, which serves as its padding; here nothing does. It loads the slow tokenizer; a fast
    one gives the same ids where its files say the same.

    Raises:
        InputError: a dialogue with a system turn, or with an answer that is not to be trained on:
            the script has neither.
    """
    questions = [turn.text for turn in dialogue.turns if turn.role == "user"]
    answers = [turn for turn in dialogue.turns if turn.role == "assistant"]
    if len(questions) + len(answers) < len(dialogue.turns):
        raise InputError(
            "the template chunkllama has its own system prompt and no place for a dialogue's; "
            "choose the template llama-2, or chat"
        )
    if not questions or not answers or not all(turn.trained for turn in answers):
        raise InputError(
            "the template chunkllama trains on every answer, and this dialogue has none, or one "
            "that is not to be trained on; choose the template llama-2, or chat"
        )
    rounds = list(zip(questions, (turn.text for turn in answers), strict=False))
    if len(questions) != len(answers):
        rounds = rounds[:1]
    text = ""
    for question, answer in rounds:
        system = "" if text else f"<<SYS>>\n {CHUNKLLAMA_SYSTEM} \n<</SYS>>\n\n "
        text += f"<s>[INST] {system}{question} [/INST] {answer} </s>"
    tokens = np.asarray(encode(tokenizer, text), np.int32)
    return Rendered(tokens, _chunkllama_mask(text, len(tokens), tokenizer))


def _chunkllama_mask(text: str, length: int, tokenizer: Any) -> Bool[np.ndarray, " n"]:
    def count(part: str) -> int:
        return len(encode(tokenizer, part))

    trained = np.ones(length, np.bool_)
    done = 1  # the BOS that the tokenizer put first
    for part in text.split("</s>"):
        question, *answer = part.split("[/INST]")
        if len(answer) != 1:  # and behind the last "</s>" there is nothing
            break
        trained[done : done + count(f"{question}[/INST]") - 2] = False
        done += count(part)  # its BOS stands for the "</s>" that the part has lost
    trained[done:] = False
    trained[:1] = False
    return trained

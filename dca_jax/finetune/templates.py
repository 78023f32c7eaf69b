"""Renders dialogues to tokens, and marks those with a loss.

A chat template renders the text, and `dca_jax.finetune.written` finds the assistant's turns in it.
The whole text is tokenized once, and the tokens of these turns, including end markers, are trained
on.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from dca_jax.errors import InputError
from dca_jax.finetune.chunkllama import chunkllama
from dca_jax.finetune.rendered import NotRenderedError, Rendered
from dca_jax.finetune.turns import Dialogue, Text
from dca_jax.finetune.written import Chat, TurnWriter, Written
from dca_jax.inference.chat_templates import own_template
from dca_jax.inference.tokenizer import encode, encode_with_places
from dca_jax.text_files import read_text_file

BUILT_IN = ("chat", "llama-2", "chunkllama")

# Meta's format, with one BOS and one EOS per round, and only the dialogue's own system prompt.
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

# From dialogues to their tokens, or to the reasons why they cannot be rendered.
Renderer = Callable[[Sequence[Dialogue | Text]], list[Rendered | NotRenderedError]]
Encoded = tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]


def render(dialogue: Dialogue | Text, tokenizer: Any, template: str = "chat") -> Rendered:
    """Renders a dialogue with a template; use `renderer` for many of them.

    Raises:
        InputError: as in `renderer`, or the reason why the dialogue cannot be rendered.
    """
    (found,) = renderer(tokenizer, template)([dialogue])
    if isinstance(found, NotRenderedError):
        raise found
    return found


def renderer(tokenizer: Any, template: str = "chat") -> Renderer:
    """Creates a function that renders dialogues.

    Args:
        tokenizer: a fast tokenizer of `transformers` (based on `tokenizers`).
        template: "chat", the tokenizer's own chat template; "llama-2", Meta's format without a
            default system prompt; the path of a `.jinja` file, a chat template to use instead of
            the tokenizer's; or "chunkllama" (see `chunkllama`). Plain texts need no template.

    Returns:
        A function from dialogues to the tokens of each. For a dialogue that the template refuses,
        or whose beginning it renders differently from the whole, it returns the error instead.

    Raises:
        InputError: an unknown template, a tokenizer without character offsets, or one that lacks
            the special tokens of the template. The function itself raises it for dialogues if the
            tokenizer has no template.
    """
    if template == "chunkllama":
        if (tokenizer.bos_token, tokenizer.eos_token) != ("<s>", "</s>"):
            raise InputError(
                'the template chunkllama writes "<s>" and "</s>", which are not BOS and EOS of '
                f"this tokenizer ({tokenizer.bos_token!r}, {tokenizer.eos_token!r}); use it with "
                "Llama-2's, or choose the template chat or llama-2"
            )

        def written(dialogues: Sequence[Dialogue | Text]) -> list[Rendered | NotRenderedError]:
            return [_by_script(one, tokenizer) for one in dialogues]

        return written
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for; put a "
            "tokenizer.json into the model's folder, from which a fast tokenizer is made"
        )
    if template != "chat":
        template_source(tokenizer, template)  # refuses a bad one before anything is read

    @cache
    def turns() -> TurnWriter:  # plain texts need no template
        return TurnWriter(template_source(tokenizer, template), tokenizer.special_tokens_map)

    # Possible end markers; not tokens of only spaces, which some code models have added.
    marks = [n for n, token in tokenizer.added_tokens_decoder.items() if token.content.strip()]

    def render_all(dialogues: Sequence[Dialogue | Text]) -> list[Rendered | NotRenderedError]:
        asked = [_chat(one) for one in dialogues if isinstance(one, Dialogue)]
        chats = iter(turns().write(asked) if asked else [])
        written = [_as_written(d) if isinstance(d, Text) else next(chats) for d in dialogues]
        texts = [one.text for one in written if isinstance(one, Written)]
        encoded = iter(_encoded(tokenizer, texts))
        found: list[Rendered | NotRenderedError] = []
        for dialogue, one in zip(dialogues, written, strict=True):
            if isinstance(one, NotRenderedError):
                found.append(one)
                continue
            tokens = next(encoded)
            if isinstance(tokens, NotRenderedError):
                found.append(tokens)
            elif isinstance(dialogue, Text):
                found.append(_between_marks(tokens, one, tokenizer))
            else:
                found.append(_masked(*tokens, one, marks))
        return found

    return render_all


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
                "the template llama-2 begins and ends every round with BOS and EOS, but this "
                "tokenizer lacks at least one of them; give a .jinja file that does not need them"
            )
        return LLAMA_2
    path = Path(template)
    if path.suffix != ".jinja":
        raise InputError(
            f"{template!r} is not a template; expected one of {', '.join(BUILT_IN)} or the path of "
            "a .jinja file"
        )
    return read_text_file(path)


def _by_script(dialogue: Dialogue | Text, tokenizer: Any) -> Rendered | NotRenderedError:
    if isinstance(dialogue, Text):
        return NotRenderedError("the template chunkllama writes dialogues, and this is a text")
    try:
        return chunkllama(dialogue, tokenizer)
    except NotRenderedError as error:
        return error


def _chat(dialogue: Dialogue) -> Chat:
    answers = [n for n, turn in enumerate(dialogue.turns) if turn.trained]
    return Chat([turn.message() for turn in dialogue.turns], answers, dialogue.tools)


def _as_written(text: Text) -> Written:
    whole = text.prompt + text.text
    return Written(whole, [(len(text.prompt), len(whole))])


def _encoded(tokenizer: Any, texts: list[str]) -> list[Encoded | NotRenderedError]:
    """`encode_with_places` for all at once; one by one if any cannot be encoded."""
    try:
        return list(encode_with_places(tokenizer, texts)) if texts else []
    except InputError as error:
        if len(texts) == 1:
            return [NotRenderedError(str(error))]
    return [found for text in texts for found in _encoded(tokenizer, [text])]


def _between_marks(encoded: Encoded, written: Written, tokenizer: Any) -> Rendered:
    """A text's tokens after the tokenizer's prefix (BOS), and followed by an EOS."""
    tokens, begins, ends = encoded
    before = np.asarray(encode(tokenizer, ""), np.int32)
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    whole = np.concatenate([before, tokens, np.asarray(after, np.int32)])
    trained = np.ones(len(whole), np.bool_)
    trained[: len(before)] = False
    trained[len(before) : len(before) + len(tokens)] = _inside(begins, ends, *written.spans[0])
    trained[:1] = False
    return Rendered(whole, trained)


def _masked(
    tokens: Int[np.ndarray, " n"],
    begins: Int[np.ndarray, " n"],
    ends: Int[np.ndarray, " n"],
    written: Written,
    marks: list[int],
) -> Rendered:
    """A dialogue's tokens, with its answers and their end markers trained on."""
    is_mark = np.isin(tokens, marks)
    trained = np.zeros(len(tokens), np.bool_)
    for start, end in written.spans:
        # Only tokens near the span are examined, so the work is that of one pass over the text.
        near = slice(np.searchsorted(ends, start), np.searchsorted(begins, end))
        inside = _inside(begins[near], ends[near], start, end)
        # Templates write a line break after the end marker, which is not trained on.
        (places,) = np.nonzero(inside & is_mark[near])
        if len(places) and not written.text[ends[near][places[-1]] : end].strip():
            inside[places[-1] + 1 :] = False
        trained[near] |= inside
    trained[:1] = False
    return Rendered(tokens, trained)


def _inside(
    begins: Int[np.ndarray, " n"], ends: Int[np.ndarray, " n"], start: int, end: int
) -> Bool[np.ndarray, " n"]:
    """Which tokens cover characters from `start` to `end`.

    A token without characters (Llama 2's mark of a word's beginning) belongs to the next one; a
    token that extends into the answer must be generated by the model.
    """
    return (begins < end) & ((ends > start) | (begins >= start))

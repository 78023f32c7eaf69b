"""Rendering of dialogues as in ChunkLlama's script, including its flaws."""

from typing import Any

import numpy as np
from jaxtyping import Bool

from dca_jax.finetune.rendered import NotRenderedError, Rendered
from dca_jax.finetune.turns import Dialogue
from dca_jax.inference.tokenizer import encode

# The system prompt of ChunkLlama's script: that of Llama 2's first release.
CHUNKLLAMA_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't "
    "share false information."
)


def chunkllama(dialogue: Dialogue, tokenizer: Any) -> Rendered:
    """Renders a dialogue like ChunkLlama's `fine-tune/train_chunkllama_16k.py`, with its flaws.

    - The first question follows Llama 2's default system prompt, with other spaces around it.
    - Rounds after the first are only written if there are as many questions as answers.
    - The text begins with "<s>" and the tokenizer adds a BOS, so there are two at the beginning.
    - In each round the tokens up to "[/INST]" are masked, minus one: lengths include the BOS, and
      one more is subtracted. So the last token of "[/INST]", a "]", is trained on.
    - If a round does not have exactly one "[/INST]" (because a user wrote it), masking stops: that
      round and all later ones are not trained on.
    - The lengths of rounds come from tokenizing each alone. If that differs from their tokens in
      the whole, the masks shift; the script prints a warning and continues.

    The script truncates at 16,384 tokens on the right; here the rows do. It masks every <unk> in
    the attention, because it uses it as padding; here nothing is masked. It loads the slow
    tokenizer; a fast one gives the same ids if its files agree.

    Raises:
        NotRenderedError: a dialogue with a system turn, or with an answer that is not trained on;
            the script supports neither.
    """
    questions = [turn.text for turn in dialogue.turns if turn.role == "user"]
    answers = [turn for turn in dialogue.turns if turn.role == "assistant"]
    if len(questions) + len(answers) < len(dialogue.turns):
        raise NotRenderedError(
            "the template chunkllama has its own system prompt and no place for a dialogue's; "
            "choose the template llama-2, or chat"
        )
    if not questions or not answers or not all(turn.trained for turn in answers):
        raise NotRenderedError(
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
    done = 1  # the BOS added by the tokenizer
    for part in text.split("</s>"):
        question, *answer = part.split("[/INST]")
        if len(answer) != 1:  # and there is nothing after the last "</s>"
            break
        trained[done : done + count(f"{question}[/INST]") - 2] = False
        done += count(part)  # its BOS makes up for the "</s>" removed from the part
    trained[done:] = False
    trained[:1] = False
    return trained

"""Dialogues as ChunkLlama's script writes them, flaws included."""

from typing import Any

import numpy as np
from jaxtyping import Bool

from dca_jax.finetune.rendered import NotRenderedError, Rendered
from dca_jax.finetune.turns import Dialogue
from dca_jax.inference.tokenizer import encode

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
        NotRenderedError: a dialogue with a system turn, or with an answer that is not to be trained
            on: the script has neither.
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

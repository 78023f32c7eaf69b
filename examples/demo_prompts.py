"""The demo model's tokenizer, and its retrieval prompts, which ask for numbers hidden in text."""

import re

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dca_jax.evaluation import passkey

END_OF_TEXT = "<|endoftext|>"  # id 0

# A private-use character stands for a key of five digits: KEYS[0] for the first, and so on.
KEYS = "\ue000\ue001\ue002\ue003"
DIGITS = 5
SLOTS = len(KEYS) * DIGITS
STATEMENTS = (  # (the needle, the question with its answer)
    ("The pass key of {name} is {key}.", "What is the pass key of {name}? The pass key is {key}"),
    ("The {name} code is {key}. Remember it.", "What is the {name} code? It is {key}"),
    ("{name} = {key}", "assert {name} == {key}"),
    ("# {name} is {key}, keep this in mind", "# what was {name}? {name} is {key}"),
    ('    "{name}": {key},', 'assert table["{name}"] == {key}'),
    ("def {name}():\n    return {key}", ">>> {name}()\n{key}"),
)
WORDS = (
    "red blue green north south east west river stone cloud forest window garden silver copper "
    "apple lemon tiger eagle whale piano violin rocket engine harbor castle bridge market winter "
    "summer morning evening number letter secret signal offset width height index limit value"
).split()


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; words are split as in GPT-2, but every digit is its own token."""
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, uint16; in parallel, a few megabytes of text at a time."""
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), 256):
        encodings = tokenizer.encode_batch_fast(texts[start : start + 256])
        ids += [np.array(encoding.ids, np.uint16) for encoding in encodings]
    return ids


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """The number of tokens of `text`."""
    return len(tokenizer.encode(text).ids)


def passkey_draft(rng: np.random.Generator, room: int, bare_room: int) -> str:
    """The evaluation's own prompt with its answer, with at most `room` filler sentences.

    Half of the prompts lack its first line and have at most `bare_room` sentences. Keys early in
    the text are more frequent: DCA puts far keys at every distance up to the trained length, but
    most places in a short text are near its end.
    """
    bare = rng.random() < 0.5
    room = bare_room if bare else room
    sentences = room if rng.random() < 0.8 else int(rng.integers(0, room + 1))
    text = passkey.passkey_text(sentences, rng.random() ** 2, KEYS[0])
    text = text.removeprefix(passkey.TASK + "\n") if bare else text
    return f"{text} {KEYS[0]}.\n"


def statement_draft(rng: np.random.Generator, filler: list[str]) -> str:
    """One to four named numbers, anywhere between the lines of `filler`; one is asked for."""
    count = int(rng.integers(1, len(KEYS) + 1))
    names = ["_".join(pair) for pair in rng.choice(WORDS, (count, 2), replace=False)]
    statement, question = STATEMENTS[rng.integers(len(STATEMENTS))]
    lines = list(filler)
    # A place for each, as in `passkey_draft`; the last is inserted first, so earlier ones stay
    # valid.
    places = np.sort((rng.random(count) ** 2 * (len(lines) + 1)).astype(int))[::-1]
    for key, name, place in zip(KEYS, names, places, strict=False):
        lines.insert(place, statement.format(name=name, key=key))
    asked = rng.integers(count)
    return "\n".join([*lines, question.format(name=names[asked], key=KEYS[asked])]) + "\n"


def retrieval_templates(
    tokenizer: Tokenizer, texts: list[str], *, count: int, length: int, vocab_size: int, seed: int
) -> np.ndarray:
    """About `count` prompts of `length` tokens with their answers, keys left open.

    Half are the evaluation's prompt, half other statements among code or filler. Drafts that turn
    out too long are dropped, since they would lose their question.

    Returns:
        uint16 [templates, length]. Digit d of key k is vocab_size + DIGITS k + d where the key is
        first stated and cannot be predicted, and SLOTS more where it is repeated, which is what the
        model learns. The room after the answer is filled with the start of some text.
    """
    rng = np.random.default_rng(seed)
    sample = "\n".join(texts[:64])
    chars = length * len(sample) // count_tokens(tokenizer, sample)
    sentence = count_tokens(tokenizer, " " + " ".join(passkey.FILLER)) / len(passkey.FILLER)
    frame = count_tokens(tokenizer, passkey.passkey_text(0, 0.0, KEYS[0])) + 3 * DIGITS
    room = int((length - frame) / sentence)  # filler sentences in a passkey prompt
    bare_room = room + int(count_tokens(tokenizer, passkey.TASK) / sentence)
    drafts: list[str] = []
    while len(drafts) < count:
        drafts.append(passkey_draft(rng, room, bare_room))
        if rng.random() < 0.3:
            sentences = rng.integers(0, len(passkey.FILLER), rng.integers(1, bare_room + 1))
            filler = [passkey.FILLER[i] for i in sentences]
        else:
            text, size = texts[rng.integers(len(texts))], int(chars * rng.uniform(0.2, 1.0))
            start = rng.integers(0, max(1, len(text) - size))
            filler = text[start : start + size].splitlines()[1:-1]
        drafts.append(statement_draft(rng, filler))
    pieces = [re.split(f"([{KEYS}])", draft) for draft in drafts]
    flat = iter(encode(tokenizer, [piece for draft in pieces for piece in draft]))
    encoded = [[next(flat) for _ in draft] for draft in pieces]
    rows = [_open_keys(p, e, vocab_size) for p, e in zip(pieces, encoded, strict=True)]
    rows = [row for row in rows if len(row) <= length]
    tails = encode(tokenizer, [texts[i][:8192] for i in rng.integers(0, len(texts), 256)])
    end = np.zeros(1, np.uint16)
    rows = [np.concatenate([r, end, tails[i % 256]])[:length] for i, r in enumerate(rows)]
    return np.stack([row for row in rows if len(row) == length])


def _open_keys(pieces: list[str], encoded: list[np.ndarray], vocab_size: int) -> np.ndarray:
    stated: set[str] = set()
    ids: list[np.ndarray] = []
    for piece, piece_ids in zip(pieces, encoded, strict=True):
        if piece and piece in KEYS:
            first = vocab_size + DIGITS * KEYS.index(piece) + (SLOTS if piece in stated else 0)
            piece_ids = np.arange(first, first + DIGITS, dtype=np.uint16)
            stated.add(piece)
        ids.append(piece_ids)
    return np.concatenate(ids)

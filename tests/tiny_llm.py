"""A tiny random model with a real tokenizer, in a Hugging Face folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conversion_helpers import make_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dca_jax.config import LlamaConfig

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# One layer, one head of 8: for tests that need a config, but hardly a model.
LEAST = LlamaConfig(
    vocab_size=64,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
)
# Every mesh of eight devices divides its sizes, and `tensor` can exceed its kv heads.
DIVISIBLE = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
CORPUS = [
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money",
    "in my purse, and nothing particular to interest me on shore, I thought I would sail about",
    "a little and see the watery part of the world.",
]


def byte_level_tokenizer(vocab_size: int = 300, corpus: Sequence[str] = CORPUS) -> Tokenizer:
    """Byte-level BPE like Llama 3's and Qwen2's: a character may take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def metaspace_tokenizer(vocab_size: int = 400) -> Tokenizer:
    """SentencePiece-like, as in Llama 2: a word's space is part of its first token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 256, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    vocab, merges = trained["vocab"], [tuple(merge) for merge in trained["merges"]]
    vocab |= {f"<0x{n:02X}>": len(vocab) + n for n in range(256)}
    tokenizer.model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    return tokenizer


def fast_tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer as an object of `transformers`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **config: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))


def make_llm(folder: Path, *, chat: bool = True, **changes: Any) -> Path:
    """A folder with a byte-level tokenizer and a model whose config says it was trained on 64."""
    make_tiny(folder, dtype=np.dtype(np.float32), vocab_size=300, **changes)
    template = {"chat_template": CHAT_TEMPLATE} if chat else {}
    save_tokenizer(folder, byte_level_tokenizer(), **template)
    return folder

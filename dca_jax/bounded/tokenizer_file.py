"""The process that tries a tokenizer.json: in Rust a damaged one may panic, or end its process."""

import json
import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read by tokenizers; no thread has a text to share

from tokenizers import Tokenizer

from dca_jax.bounded.child import serve


class Panicked(Exception):
    """In Rust; the message is the panic's."""


def read(line: bytes) -> None:
    """Reads the file, as `dca_jax.inference.tokenizer` is about to, and a text with it.

    Raises:
        Panicked: the one thing that is not found out as well by reading the file there.
    """
    path = bytes.fromhex(json.loads(line)["path"]).decode(errors="surrogateescape")
    try:
        tokenizer = Tokenizer.from_file(path)
        tokenizer.decode(tokenizer.encode("Aa é 海 1").ids)
    except Exception:  # an ordinary failure, which is said where it is met
        return
    except BaseException as error:  # a panic is no Exception
        raise Panicked(str(error)) from None


if __name__ == "__main__":
    serve(read)

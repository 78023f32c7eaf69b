"""The process that tests a tokenizer.json: a damaged one may cause a Rust panic or an abort."""

import json
import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read by tokenizers; no thread has a text to share

from tokenizers import Tokenizer

from dca_jax.bounded.child import serve


class Panicked(Exception):
    """A panic in Rust, with its message."""


def read(line: bytes) -> None:
    """Reads the file as `dca_jax.inference.tokenizer` will, and encodes a text.

    Raises:
        Panicked: tokenizers panicked; ordinary errors are left to the caller's own reading.
    """
    path = bytes.fromhex(json.loads(line)["path"]).decode(errors="surrogateescape")
    try:
        tokenizer = Tokenizer.from_file(path)
        tokenizer.decode(tokenizer.encode("Aa é 海 1").ids)
    except Exception:  # an ordinary error, reported by the caller's own reading
        return
    except BaseException as error:  # a panic is not an Exception
        raise Panicked(str(error)) from None


if __name__ == "__main__":
    serve(read)

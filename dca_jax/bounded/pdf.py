"""The process that reads the text of PDF files, by pypdf."""

import json

from pypdf import PageObject, PdfReader

from dca_jax.bounded.child import serve


class Encrypted(Exception):
    """It opens with a password only."""


class TooManyPages(Exception):
    """More than anybody's document has; the message is their number."""


def read(line: bytes) -> list[str]:
    """The text of each page, as `dca_jax.inference.documents` asks for it.

    Raises:
        Encrypted, TooManyPages: see there. Whatever pypdf raises: damage reaches its every corner.
    """
    request = json.loads(line)
    with PdfReader(bytes.fromhex(request["path"]).decode(errors="surrogateescape")) as reader:
        if reader.is_encrypted and not reader.decrypt(""):
            raise Encrypted
        most = request["pages"]
        # What the file says it has; to count them takes a while. It may say nothing, or a lie.
        said = reader.root_object.get("/Pages", {}).get("/Count", 0)
        number = said if isinstance(said, int) and said > most else len(reader.pages)
        if number > most:
            raise TooManyPages(str(number))
        return [_whole_characters(page) for page in reader.pages]


def _whole_characters(page: PageObject) -> str:
    # A font may map a glyph to half of a surrogate pair, which no tokenizer takes.
    return page.extract_text().encode("utf-16", "surrogatepass").decode("utf-16", "replace")


if __name__ == "__main__":
    serve(read)

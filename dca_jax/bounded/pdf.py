"""The process that reads the text of PDF files with pypdf."""

import json

from pypdf import PageObject, PdfReader

from dca_jax.bounded.child import serve


class Encrypted(Exception):
    """The file needs a password."""


class TooManyPages(Exception):
    """The file has implausibly many pages; the message is their number."""


def read(line: bytes) -> list[str]:
    """The text of each page, for `dca_jax.inference.documents`.

    Raises:
        Encrypted, TooManyPages: see there. On damaged files, pypdf can also raise anything else.
    """
    request = json.loads(line)
    with PdfReader(bytes.fromhex(request["path"]).decode(errors="surrogateescape")) as reader:
        if reader.is_encrypted and not reader.decrypt(""):
            raise Encrypted
        most = request["pages"]
        # The number that the file claims, as counting is slow; it may be missing or wrong.
        said = reader.root_object.get("/Pages", {}).get("/Count", 0)
        number = said if isinstance(said, int) and said > most else len(reader.pages)
        if number > most:
            raise TooManyPages(str(number))
        return [_whole_characters(page) for page in reader.pages]


def _whole_characters(page: PageObject) -> str:
    # A font may map a glyph to half of a surrogate pair, which no tokenizer accepts.
    return page.extract_text().encode("utf-16", "surrogatepass").decode("utf-16", "replace")


if __name__ == "__main__":
    serve(read)

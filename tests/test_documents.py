"""Documents become text, or a clear refusal; questions about them reach the model whole."""

import re
import zlib
from dataclasses import replace

import pytest
from pypdf import PdfReader, PdfWriter

from dca_jax.errors import InputError
from dca_jax.inference import documents
from dca_jax.inference.documents import ask, read_document, read_once


def write_pdf(path, *pages):
    """A PDF with a line of text on each page."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>"
        % (b" ".join(b"%d 0 R" % (4 + 2 * n) for n in range(len(pages))), len(pages)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 300] /Contents %d 0 R "
            b"/Resources << /Font << /F 3 0 R >> >> >>" % (5 + 2 * number)
        )
        stream = b"BT /F 12 Tf 20 200 Td (%s) Tj ET" % text.encode() if text else b""
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    return write_objects(path, objects)


def write_objects(path, objects):
    """A PDF of these objects, the catalog first, written by hand."""
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start = len(body)
    body += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    body += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    body += b"trailer\n<< /Size %d /Root 1 0 R >>\n" % (len(objects) + 1)
    path.write_bytes(body + b"startxref\n%d\n%%%%EOF\n" % start)
    return path


def test_a_text_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "a.md"
    path.write_bytes("# Fürth\r\n\n日本\n".encode())
    assert read_document(path) == "# Fürth\n\n日本\n"
    path.write_bytes(b"\xef\xbb\xbfmarked")
    assert read_document(str(path)) == "marked"


def test_a_pdf_is_the_text_of_its_pages(tmp_path):
    path = write_pdf(tmp_path / "a.PDF", "Call me Ishmael.", "", "Some years ago")
    assert read_document(path) == "Call me Ishmael.\n\nSome years ago"


def test_what_cannot_be_read_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(InputError, match="is not a file"):
        read_document(path)
    with pytest.raises(InputError, match="is not a file"):
        read_document(tmp_path)
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8 text \(byte 3\)"):
        read_document(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is empty"):
        read_document(path)


def test_a_pdf_without_text_is_refused(tmp_path):
    scan = write_pdf(tmp_path / "scan.pdf", "", "")
    with pytest.raises(InputError, match="has no text on its 2 pages; if it is a scan"):
        read_document(scan)
    damaged = tmp_path / "damaged.pdf"
    damaged.write_bytes(b"%PDF-1.4\nnothing more")
    with pytest.raises(InputError, match="cannot be read as a PDF"):
        read_document(damaged)
    locked = tmp_path / "locked.pdf"
    writer = PdfWriter(clone_from=PdfReader(write_pdf(tmp_path / "open.pdf", "secret")))
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(locked)
    with pytest.raises(InputError, match="is encrypted"):
        read_document(locked)


def damaged_pdf(path, content, *, pages=1, said=None, filters=b"", more=()):
    """A PDF whose pages are one, of this content; it says of itself that it has `said`."""
    kids = b" ".join([b"4 0 R"] * pages)
    page = (
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 300] /Contents 5 0 R "
        b"/Resources << /Font << /F 3 0 R >> /XObject << /X 6 0 R >> >> >>"
    )
    return write_objects(
        path,
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, pages if said is None else said),
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
            page,
            b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(content), filters, content),
            *more,
        ],
    )


TEXT = b"BT /F 12 Tf 20 200 Td (hello) Tj ET"
FORM = b"<< /Length 5 /Subtype /Form /Resources << /XObject << /X 6 0 R >> >> >>\nstream\n/X Do\n"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (TEXT, {"filters": b"/Filter /FooDecode"}, "NotImplementedError: Unsupported filter"),
        (b"\xff~z", {"filters": b"/Filter /ASCII85Decode"}, "ValueError: Non-Ascii85"),
        (b"\xff~z", {"filters": b"/Filter /JBIG2Decode"}, "DependencyError: jbig2dec"),
        (b"\xff~z", {"filters": b"/Filter /LZWDecode"}, "cannot be read as a PDF"),
        (TEXT, {"more": [b"[" * 100_000 + b"]" * 100_000]}, "RecursionError|hello"),
        (b"BT /F 1 Tf " + b"[" * 100_000, {}, "has no text"),
        (b"/X Do", {"more": [FORM + b"endstream"]}, "has no text"),
        (TEXT, {"pages": 30}, "has 30 pages, and at most 20 are read; split it"),
        (TEXT, {"pages": 30, "said": 1}, "has 30 pages, and at most 20 are read; split it"),
        (TEXT, {"pages": 1, "said": 10**18}, "at most 20 are read"),
    ],
)
def test_whatever_a_pdf_breaks_is_one_sentence(tmp_path, monkeypatch, content, options, message):
    monkeypatch.setattr(documents, "MOST_PAGES", 20)
    path = damaged_pdf(tmp_path / "bad.pdf", content, **options)
    try:
        said = read_document(path)
    except InputError as error:
        said = str(error)
        assert said.startswith(str(path))
        assert "\n" not in said
    assert re.search(message, said)


def test_a_pdf_that_unpacks_to_too_much_is_stopped(tmp_path, monkeypatch):
    bomb = zlib.compress(b"BT " * 20_000_000)
    path = damaged_pdf(tmp_path / "bomb.pdf", bomb, filters=b"/Filter /FlateDecode")
    monkeypatch.setattr(documents, "MOST_SECONDS", 1)
    with pytest.raises(InputError, match=r"cannot be read as a PDF: it takes longer than 1 sec"):
        read_document(path)
    monkeypatch.setattr(documents, "MOST_SECONDS", 60)
    monkeypatch.setattr(documents, "MEMORY", 160 * 2**20)
    with pytest.raises(InputError, match=r"cannot be read as a PDF: it needs more than 0\.16 GiB"):
        read_document(path)


def test_half_a_character_of_a_font_is_replaced(tmp_path):
    """A ToUnicode map may give half of a surrogate pair, or both halves one after the other."""
    to_unicode = b"1 beginbfchar <61> <D835> endbfchar 1 beginbfchar <63> <DC00> endbfchar"
    path = damaged_pdf(
        tmp_path / "half.pdf",
        b"BT /G 12 Tf 20 200 Td (abac) Tj ET",
        more=[b"<< /Length %d >>\nstream\n%s\nendstream" % (len(to_unicode), to_unicode)],
    )
    font = b"/Font << /G << /Type /Font /Subtype /Type1 /BaseFont /Helvetica /ToUnicode 6 0 R >> >>"
    content = path.read_bytes().replace(b"/Font << /F 3 0 R >>", font)
    path.write_bytes(content)  # what stands where has moved: pypdf looks for it
    assert read_document(path) == "\ufffdb\U0001d400"


DOCUMENT = "Call me Ishmael. Some years ago, never mind how long."


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_a_question_follows_the_document(llm, chat):
    if not chat:
        tokenizer = type(llm.tokenizer)(tokenizer_object=llm.tokenizer.backend_tokenizer)
        llm = replace(llm, tokenizer=tokenizer)
    whole = (
        llm.chat([{"role": "user", "content": f"{DOCUMENT}\n\nWho?"}], max_new_tokens=9)
        if chat
        else llm.generate(f"{DOCUMENT}\n\nQuestion: Who?\nAnswer:", max_new_tokens=9)[0]
    )
    assert "".join(ask(llm, DOCUMENT, "Who?", max_new_tokens=9)) == whole.text
    prefix = read_once(llm, DOCUMENT)
    for _ in range(2):
        answer = "".join(ask(llm, DOCUMENT, "Who?", prefix=prefix, max_new_tokens=9))
        assert answer == whole.text

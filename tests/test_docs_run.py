"""Each page's code runs, from its first block to its last, in an empty folder.

Whatever model a page names is a tiny one there, files are small, and numbers of tokens are divided.
What is not run is in `PARSED`; `test_docs.py` has looked at its words.
"""

import ast
import importlib
import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import openai
import pages
import pytest
from pages import Block
from shared_fixtures import invoke
from test_documents import write_pdf
from tiny_gguf import byte_level, wide_config, write_gguf
from tiny_llm import CHAT_TEMPLATE, byte_level_tokenizer

import dca_jax
from dca_jax.inference.options import OptionNames, Options
from dca_jax.planning.shapes import SHAPES
from dca_jax.serving.engine import Engine
from dca_jax.serving.http import make_app
from dca_jax.serving.server import Server, listen
from dca_jax.sharding import parse_mesh

# Beginnings of commands that are not run, and why.
PARSED = {
    "pip": "needs an index of packages; `make test-wheel` installs",
    "make": "its targets are the checks themselves",
    "bash": "launches on a TPU pod",
    "unzip": "what a line before it would have downloaded",
    "mv": "the same",
    "python3 -m venv": "`make test-wheel` makes one",
    ". ": "enters it",
    "export": "for libtpu",
    "git": "only makes a text for a pipe",
    ".venv/bin/": "the checks themselves",
    "python -m pytest": "the checks themselves",
    "python benchmarks/": "measures for minutes; tests of its own",
    "python examples/": "trains, or needs Ray; tests of its own",
    "python -m checkpoints_convert.verify": "tests/test_conversion.py; needs PyTorch, for seconds",
    "dca-jax --coordinator": "two hosts; tests/test_distributed.py",
    "dca-jax serve": "until it is stopped; tests/test_serving.py",
    "dca-jax lm-eval": "downloads its tasks; tests/test_lm_eval_tasks.py",
    "dca-jax finetune examples/finetune_16k.yaml": "previewed; a smaller run is run",
    "dca-jax eval passkey": "tests/test_evaluation_passkey.py",
    "dca-jax eval ruler": "thirteen tasks; tests/test_evaluation_ruler.py",
    "dca-jax eval infinite-bench": "tests/test_evaluation_benchmarks.py",
    "dca-jax eval longbench-v2": "tests/test_evaluation_benchmarks.py",
    "dca-jax eval few-shot": "tests/test_evaluation_examples.py",
}
# Python that is compiled, and whose imports are made: it waits for a second host.
COMPILED = ["distributed.initialize("]

SENTENCE = "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea. "
DIALOGUES = [
    {
        "model": "gpt-4",
        "conversations": [
            {"from": "human", "value": f"What is {n} plus {n}?"},
            {"from": "gpt", "value": f"{n} plus {n} is {n + n}. " * 4},
        ],
    }
    for n in range(12)
]
# Files that pages speak of and do not make.
FILES = {
    **dict.fromkeys(["a-long-book.txt", "library.txt"], SENTENCE * 4),
    "book.txt": SENTENCE * 8,  # more than a window and the stride of `eval perplexity`
    "prompts.jsonl": '{"prompt": "Call me"}\n{"prompt": "Some years"}\n',
    **dict.fromkeys(["dialogues.json", "sharegpt.json", "alpaca_gpt4.json"], json.dumps(DIALOGUES)),
}
SCALE = 64  # a length is divided by it
LONGEST = 128
# What is added to a command; the last of an option that is given twice counts.
SHORTER = {
    "finetune": "--length 64 --steps 1 --batch 1 --dtype float32".split(),
    "preview": "--data dialogues.json".split(),
    "perplexity": ["--limit", "1"],
}
# In Python: fewer characters and pages, and a run of one update.
SMALLER = {
    r"\[:\d\d_000\]": "[:1200]",
    r"\bSettings\(": "Settings(length=64, steps=1, dtype='float32', ",
    "context=2048, rows=4, pages=64": "context=512, rows=1, pages=20",
}
NEW_TOKENS = 1  # of every text: a second one takes another program


def runs(words: list[str]) -> bool:
    line = " ".join(words)
    return not any(line.startswith(beginning) for beginning in PARSED)


class Reader:
    """Somebody who copies a page's blocks into an empty folder, one after another."""

    def __init__(self, model: Path, gguf: Callable[[], Path]) -> None:
        self.model, self.gguf = model, gguf
        # What blocks take for granted.
        self.names: dict[str, Any] = {"dca_jax": dca_jax, "book": SENTENCE}

    def have(self, text: str) -> None:
        """Puts every file that a text names where it says."""
        for name, content in FILES.items():
            if name in text and not Path(name).exists():
                Path(name).write_text(content)
        if "book.pdf" in text:
            write_pdf(Path("book.pdf"), SENTENCE * 4)

    def have_model(self, name: str) -> None:
        """Puts the model where a page says that one is; shapes that are planned for need none."""
        path = Path(name)
        if name not in SHAPES and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(self.gguf() if path.suffix == ".gguf" else self.model)

    def python(self, block: Block) -> None:
        code = block.text
        self.have(code)
        for name in re.findall(r'(?:load\(|model=)"([^"]+)"', code):
            self.have_model(name)
        for mesh in re.findall(r'mesh="(.+?)"', code):
            parse_mesh(mesh)
        code = re.sub(r', mesh=".+?"', "", code)
        if any(word in code for word in COMPILED):
            code = "\n".join(
                ast.unparse(node)
                for node in ast.walk(ast.parse(code))
                if isinstance(node, ast.Import | ast.ImportFrom)
            )
        for pattern, less in SMALLER.items():
            code = re.sub(pattern, less, code)
        with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):  # as readers have it
            warnings.simplefilter("ignore", ResourceWarning)  # files that Python itself closes
            # Lines have the numbers that they have on the page.
            exec(compile("\n" * block.line + code, block.page, "exec"), self.names)

    def shell(self, line: list[str]) -> None:
        piped = SENTENCE
        for words, _ in pages.simple(line):
            if words[0] == "echo":
                piped = " ".join(words[1:]) + "\n"
                if ">" in line:
                    Path(line[-1]).write_text(piped)
            elif runs(words):
                self.run(words, piped)

    def run(self, words: list[str], piped: str) -> None:
        """Runs a command; on one device, since tests of meshes have their own."""
        self.have(" ".join(words + SHORTER.get(words[1], [])))
        if words[0] == "python":
            module, words = importlib.import_module(words[2]), words[3:]
            context = pages.parse(words, pages.typer.main.get_command(module.app), "convert")
            self.have_model(str(context.params["source"]))
            context.command.invoke(context)
            return
        context = pages.parse(words[1:])
        model = context.params.get("model") or context.params.get("source")
        if model is not None:
            self.have_model(str(model))
        _, group, *_ = path = context.command_path.split()
        words = words[1:]
        if group in ("generate", "chat", "eval", "finetune"):
            words = [smaller(word) for word in words]
            if "--mesh" in words:
                at = words.index("--mesh")
                parse_mesh(words[at + 1])
                del words[at : at + 2]
        done = invoke(*words, *SHORTER.get(path[-1], ()), input=piped)
        assert done.exit_code == 0, f"dca-jax {' '.join(words)}\n{done.output}"


def smaller(word: str) -> str:
    """A number of tokens such as 32k, divided; other words as they are."""
    match = re.fullmatch(r"(\d+)(k|M)", word)
    if not match:
        return word
    return str(min(LONGEST, int(match[1]) * {"k": 1024, "M": 1024**2}[match[2]] // SCALE))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"

    def make() -> Path:
        if not path.exists():
            tokenizer = byte_level(byte_level_tokenizer(), "llama-bpe")
            tokenizer |= {"tokenizer.chat_template": CHAT_TEMPLATE}
            write_gguf(path, wide_config(num_hidden_layers=1), ["Q4_1"], tokenizer=tokenizer)
        return path

    return make


@pytest.fixture
def client(llm: dca_jax.LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `openai.OpenAI` makes asks a server of the tiny model, wherever the page has it."""
    engine = Engine(llm, context=512, rows=1, pages=20)
    engine.start()
    listening = listen("127.0.0.1", 0)
    server = Server(make_app(engine, "Qwen2.5-7B-Instruct-1M"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    made = openai.OpenAI
    here = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    clients = []

    def make(base_url: str, api_key: str) -> openai.OpenAI:
        assert base_url == "http://127.0.0.1:8000/v1"
        clients.append(made(base_url=here, api_key=api_key))
        return clients[-1]

    monkeypatch.setattr(openai, "OpenAI", make)
    yield
    for each in clients:
        each.close()
    server.should_exit = True
    thread.join()
    engine.stop()


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of generating stops after `NEW_TOKENS`, whatever it is told."""
    made = Options.of

    def of(options: Options | None, changes: OptionNames) -> Options:
        options = made(options, changes)
        return replace(options, max_new_tokens=min(options.max_new_tokens, NEW_TOKENS))

    monkeypatch.setattr(Options, "of", of)


def has_what_runs(page: str) -> bool:
    return any(
        block.language == "python"
        or (block.language == "sh" and any(runs(line) for line in block.commands()))
        for block in pages.blocks(page)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("page", [page for page in pages.PAGES if has_what_runs(page)])
def test_a_page_runs(page, folder, gguf, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "examples").symlink_to(pages.REPOSITORY / "examples")
    if any("import OpenAI" in block.text for block in pages.blocks(page)):
        request.getfixturevalue("client")
    reader = Reader(folder, gguf)
    for block in pages.blocks(page):
        if block.language == "python":
            reader.python(block)
        elif block.language == "sh":
            for line in block.commands():
                reader.shell(line)


def test_what_is_not_run_is_somewhere():
    """An exception that no page needs any more is taken out."""
    lines = [
        " ".join(words)
        for page in pages.PAGES
        for block in pages.blocks(page)
        if block.language == "sh"
        for line in block.commands()
        for words, _ in pages.simple(line)
    ]
    for beginning in PARSED:
        assert any(line.startswith(beginning) for line in lines), beginning
    code = [b.text for page in pages.PAGES for b in pages.blocks(page) if b.language == "python"]
    assert all(any(word in text for text in code) for word in COMPILED)

"""The command line: what it prints, and how it refuses."""

import os
import subprocess
import sys

import jax
import pytest
from shared_fixtures import invoke
from test_documents import write_pdf
from tiny_llm import make_llm

import dca_jax
from dca_jax import Sampler

PROMPT = "Call me Ishmael. Some years ago"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def run(*args, **environment):
    """As a user runs it: another process, by the entry point of the package."""
    code = "import sys; from dca_jax.cli import main; sys.argv[0] = 'dca-jax'; main()"
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=kept | environment,
    )


def test_help_teaches():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("generate", "chat", "explain", "info", "convert"):
        assert command in result.output
        own = invoke(command, "--help")
        assert own.exit_code == 0
        assert f"dca-jax {command}" in own.output  # an example


def test_generate_prints_the_continuation_and_nothing_else(folder, llm):
    result = invoke("generate", folder, PROMPT, "--max-new-tokens", 12)
    assert result.exit_code == 0
    assert result.stdout == llm.generate(PROMPT, max_new_tokens=12)[0].text + "\n"


def test_generate_hands_its_options_on(folder, llm):
    options = "--max-new-tokens 12 --temperature 0.9 --top-k 40 --top-p 0.95 --min-p 0.01"
    options += " --repetition-penalty 1.2 --seed 4 --dtype float32 --dca 40,60"
    sampler = Sampler(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    setting = dca_jax.DCAConfig(chunk_len=40, max_query_position=60)
    same = dca_jax.load(folder, dca=setting)
    expected = same.generate(PROMPT, max_new_tokens=12, sampler=sampler, seed=4)[0].text
    assert invoke("generate", folder, PROMPT, *options.split()).stdout == expected + "\n"
    stop = expected[3:5]
    stopped = invoke("generate", folder, PROMPT, *options.split(), "--stop", stop, "--stop", "zz")
    assert stopped.stdout == expected[: expected.index(stop)] + "\n"


def test_generate_continues_a_file_or_answers_about_a_document(folder, llm, tmp_path):
    (tmp_path / "a.txt").write_text(PROMPT)
    options = ("--max-new-tokens", 12)
    from_file = invoke("generate", folder, "--file", tmp_path / "a.txt", *options)
    assert from_file.stdout == llm.generate(PROMPT, max_new_tokens=12)[0].text + "\n"
    pdf = write_pdf(tmp_path / "a.pdf", PROMPT)
    answer = invoke("generate", folder, "--document", pdf, "--question", "Who?", *options)
    messages = [{"role": "user", "content": f"{PROMPT}\n\nWho?"}]
    assert answer.stdout == llm.chat(messages, max_new_tokens=12).text + "\n"


def test_chat_talks_until_it_is_told_to_quit(folder, llm):
    first = [{"role": "user", "content": "Call me"}]
    answer = llm.chat(first, max_new_tokens=6).text
    turns = [
        *first,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "some years"},
    ]
    second = llm.chat(turns, max_new_tokens=6).text
    typed = "Call me\nsome years\n\n/reset\nCall me\n/quit\nnever read\n"
    result = invoke("chat", folder, "--max-new-tokens", 6, input=typed)
    assert result.exit_code == 0
    assert result.stdout.count(answer) >= 2
    assert second in result.stdout
    until_the_end = invoke("chat", folder, "--max-new-tokens", 6, input="Call me\n")
    assert until_the_end.exit_code == 0


def test_explain_draws_the_matrix_of_the_paper(tmp_path):
    plot = tmp_path / "m.png"
    result = invoke(
        "explain", "--chunk-len", 6, "--max-query-position", 9, "--length", 12, "--plot", plot
    )
    assert result.exit_code == 0
    assert "chunk length s             6 tokens (2 chunks)" in result.stdout
    assert result.stdout.endswith(" 9 8 7 6 5 4 | 5 4 3 2 1 0\n")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_explain_takes_a_model_or_a_trained_length(folder):
    of_model = invoke("explain", folder, "--length", 1000).stdout
    assert "48 tokens (21 chunks)" in of_model
    assert invoke("explain", "--trained-length", 64, "--length", 1000).stdout == of_model
    preset = invoke("explain", folder, "--preset", "chunkllama").stdout
    assert "40 tokens (7 chunks)" in preset  # of 4 * 64 tokens


def test_info_says_what_a_checkpoint_is(folder, llm):
    output = invoke("info", folder).stdout
    count = sum(parameter.size for parameter in jax.tree.leaves(llm.model))
    for fact in (f"{count:,}", "kB (safetensors)", "4 of 6, 2 for keys and values", "64 tokens"):
        assert fact in output
    assert "s = 48, Q = 63 (the paper's)" in output
    assert "default, theta 10000" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{folder}", "x", "--temperature", "-1"], "temperature must be 0 (greedy)"),
        (["generate", "{folder}", ""], "the text is empty"),
        (["generate", "{folder}"], "give exactly one of: a prompt, --file, --document"),
        (["generate", "{folder}", "x", "--file", "{latin}"], "got 2 of them"),
        (["generate", "{folder}", "--file", "{latin}"], "is not UTF-8 text (byte 3)"),
        (
            ["generate", "{folder}", "--document", "{latin}"],
            "--document and --question go together",
        ),
        (["generate", "{folder}", "x", "--dca", "40,x"], "S,Q is two integers"),
        (["generate", "{folder}", "x", "--dca", "60,40"], "chunk_len (60) must not exceed"),
        (["generate", "{folder}", "x", "--dca", "huge"], "DCA setting 'huge' is not known"),
        (["generate", "{folder}", "x", "--stop", ""], "stop must be a list of strings"),
        (["generate", "{folder}", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least"),
        (["generate", "{folder}/absent", "x"], "is no folder"),
        (["chat", "{plain}"], "has no chat template"),
        (["info", "{folder}/config.json"], "is a file; give the folder"),
        (["explain"], "give a MODEL, or --trained-length"),
        (["explain", "--chunk-len", "4"], "--chunk-len and --max-query-position go together"),
        (["explain", "--trained-length", "63"], "preset 'paper' needs a trained length"),
        (["explain", "--trained-length", "64", "--length", "0"], "--length must be at least 1"),
        (["explain", "--trained-length", "64", "--plot", "{folder}/no/m.png"], "is no folder"),
        (["explain", "--trained-length", "64", "--plot", "{folder}/m.doc"], "cannot be written"),
        (["convert", "{folder}/absent", "{folder}/new"], "absent is no folder"),
    ],
    ids=lambda value: " ".join(value[:1] + value[2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_message_and_exit_code_2(
    folder, tmp_path, arguments, message, monkeypatch
):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    places = {"folder": folder, "latin": tmp_path / "latin.txt", "plain": tmp_path / "plain"}
    if "{plain}" in arguments:
        make_llm(tmp_path / "plain", chat=False)
    # It would keep this process from every device but the CPU.
    monkeypatch.setattr("checkpoints_convert.common.prepare_process", lambda: None)
    result = invoke(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.processes
def test_as_a_user_runs_it(folder, llm, tmp_path):
    """Converted, continued, and its compiled programs kept for the next time."""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    converted = run("convert", folder, tmp_path / "orbax", **environment)
    assert converted.returncode == 0, converted.stderr
    assert converted.stdout == f"wrote {tmp_path / 'orbax'}\n"
    options = ("--max-new-tokens", 12)
    result = run("generate", tmp_path / "orbax", PROMPT, *options, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == llm.generate(PROMPT, max_new_tokens=12)[0].text + "\n"
    assert list((tmp_path / "cache" / "dca_jax" / "xla").iterdir())
    refused = run("generate", folder, PROMPT, "--temperature", -1, **environment)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: temperature must be 0 (greedy) or at least 0.0001, got -1.0\n"

"""The command line: what it prints, and how it refuses."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import typer
from shared_fixtures import invoke
from test_documents import write_pdf
from tiny_llm import make_llm

import dca_jax
from dca_jax import Sampler, cli
from dca_jax.cli import app, measure
from dca_jax.inference.methods import METHODS, reading

PROMPT = "Call me Ishmael. Some years ago"
MEASURED = {"dpe": "dpe:8,3"}  # whose settings are published for a few models only


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
    assert invoke("-h").output == result.output
    panels = ("Run", "Measure", "Train", "Prepare", "Several processes")
    places = [result.output.index(f"─ {panel} ") for panel in panels]
    assert places == sorted(places)
    assert result.output.index("--coordinator") > places[-1]
    for command in "generate chat lm-eval finetune preview convert info plan explain".split():
        assert command in result.output
        own = invoke(command, "--help")
        assert own.exit_code == 0
        assert f"dca-jax {command}" in own.output  # an example


def test_what_help_says_of_a_command_is_what_its_own_begins_with():
    app_command = typer.main.get_command(app)
    for later in app_command.commands.values():
        command = later.load()
        assert command.name == later.name
        assert " ".join(command.help.partition("\n\n")[0].split()) == later.help


def test_help_and_version_load_what_they_need():
    """JAX takes seconds to import; `generate` needs it, and neither PyTorch nor Orbax.

    Nor does it need JAX's compiler for Hopper's kernels, which takes half a second.
    """
    heavy = set("jax numpy flax orbax tensorstore transformers matplotlib torch".split())
    code = f"""if True:
        import contextlib, io, sys
        from dca_jax.cli import main
        for word in ("--version", "--help"):
            sys.argv = ["dca-jax", word]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                main()
        print(sorted({heavy!r} & set(sys.modules)))
        import dca_jax.cli.run
        print(sorted({heavy!r} & set(sys.modules)))
        print("jax.experimental.mosaic.gpu" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n['flax', 'jax', 'numpy']\nFalse\n"


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"dca-jax {dca_jax.__version__}\n")


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "dca_jax", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"dca-jax {dca_jax.__version__}\n"


def test_generate_prints_the_continuation_and_nothing_else(folder, llm):
    result = invoke("generate", folder, PROMPT, "--max-new-tokens", 12)
    assert result.exit_code == 0
    assert result.stdout == llm.generate(PROMPT, max_new_tokens=12)[0].text + "\n"


def test_generate_hands_its_options_on(folder, llm):
    options = "--max-new-tokens 12 --temperature 0.9 --top-k 40 --top-p 0.95 --min-p 0.01"
    options += " --repetition-penalty 1.2 --seed 4 --dtype float32 --method dca:40,60"
    sampler = Sampler(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    setting = dca_jax.DCAConfig(chunk_len=40, max_query_position=60)
    same = dca_jax.load(folder, dca=setting)
    expected = same.generate(PROMPT, max_new_tokens=12, sampler=sampler, seed=4)[0].text
    assert invoke("generate", folder, PROMPT, *options.split()).stdout == expected + "\n"
    stop = expected[3:5]
    stopped = invoke("generate", folder, PROMPT, *options.split(), "--stop", stop, "--stop", "zz")
    assert stopped.stdout == expected[: expected.index(stop)] + "\n"


def test_generate_keeps_its_cache_in_8_bits(folder, llm):
    small = replace(llm, cache_dtype=jnp.dtype(jnp.int8))
    expected = small.generate(PROMPT, max_new_tokens=12)[0].text
    options = ("--max-new-tokens", 12, "--cache-dtype")
    assert invoke("generate", folder, PROMPT, *options, "int8").stdout == expected + "\n"
    refused = invoke("generate", folder, PROMPT, *options, "int4")
    assert refused.exit_code == 2
    assert "fp8" in refused.stderr


def test_generate_continues_a_file_or_answers_about_a_document(folder, llm, tmp_path):
    (tmp_path / "a.txt").write_text(PROMPT)
    options = ("--max-new-tokens", 12)
    from_file = invoke("generate", folder, "--file", tmp_path / "a.txt", *options)
    assert from_file.stdout == llm.generate(PROMPT, max_new_tokens=12)[0].text + "\n"
    pdf = write_pdf(tmp_path / "a.pdf", PROMPT)
    answer = invoke("generate", folder, "--document", pdf, "--question", "Who?", *options)
    messages = [{"role": "user", "content": f"{PROMPT}\n\nWho?"}]
    assert answer.stdout == llm.chat(messages, max_new_tokens=12).text + "\n"


def test_generate_reads_standard_input(folder, llm):
    expected = llm.generate(PROMPT, max_new_tokens=12)[0].text + "\n"
    for prompt in ((), ("-",)):
        result = invoke("generate", folder, *prompt, "--max-new-tokens", 12, input=PROMPT + "\n")
        assert result.stdout == expected
    bad = invoke("generate", folder, input=b"caf\xe9")
    assert bad.exit_code == 2
    assert bad.stderr.startswith("error: standard input is not UTF-8 text (byte 3)")


def test_arguments_that_are_no_text_are_refused_before_anything_is_read(tmp_path):
    for words in (["generate", "m", "caf\udce9"], ["info", "caf\udce9"], ["chat", "\udce9"]):
        result = invoke(*words)
        assert result.exit_code == 2
        number = len(words)
        assert result.stderr.startswith(f"error: argument {number} of dca-jax is not UTF-8 text")
        assert result.stderr.count("\n") == 1


def test_standard_input_in_the_encoding_of_its_byte_order_mark(folder, llm):
    expected = llm.generate(PROMPT, max_new_tokens=12)[0].text + "\n"
    for encoding in ("utf-8-sig", "utf-16"):
        data = PROMPT.encode(encoding)
        assert invoke("generate", folder, "--max-new-tokens", 12, input=data).stdout == expected


LINES: list[dict[str, Any]] = [
    {"id": 1, "prompt": PROMPT},
    {"messages": [{"role": "user", "content": "Call me"}], "tags": ["ä", None, {"deep": 1.5}]},
    {"prompt": "a little and see the watery part of the world. " * 4},
]


def expected_answers(llm, lines):
    for line in lines:
        options = {"max_new_tokens": 12, "stop": ["e"]}
        said = (
            llm.generate(line["prompt"], **options)[0]
            if "prompt" in line
            else llm.chat(line["messages"], **options)
        )
        counts = {"prompt_tokens": said.prompt_tokens, "completion_tokens": len(said.tokens)}
        yield {**line, "text": said.text, "finish_reason": said.finish_reason, **counts}


def as_jsonl(lines) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def test_generate_answers_jsonl(folder, llm, tmp_path):
    (tmp_path / "in.jsonl").write_text(as_jsonl(LINES).replace("\n", "\n\n", 1))  # a blank line
    output = tmp_path / "out.jsonl"
    options = ("--max-new-tokens", 12, "--stop", "e", "--batch", 2)
    result = invoke(
        *("generate", folder, "--input", tmp_path / "in.jsonl", "--output", output, *options)
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    expected = as_jsonl(expected_answers(llm, LINES))
    assert output.read_text() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    again = invoke("generate", folder, "--input", tmp_path / "in.jsonl", "--output", output)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    piped = invoke("generate", folder, "--input", "-", "--json", *options, input=as_jsonl(LINES))
    assert piped.stdout == expected
    all_at_once = (*options, "--batch", 8)
    text = invoke("generate", folder, "--input", "-", *all_at_once, input=as_jsonl(LINES))
    assert text.stdout == "".join(json.loads(x)["text"] + "\n" for x in expected.splitlines())


def test_one_prompt_as_json(folder, llm, tmp_path):
    (line,) = expected_answers(llm, [{"prompt": PROMPT}])
    options = ("--max-new-tokens", 12, "--stop", "e", "--json")
    assert json.loads(invoke("generate", folder, PROMPT, *options).stdout) == line
    (tmp_path / "a.txt").write_text(PROMPT)
    named = {"file": str(tmp_path / "a.txt")} | {k: v for k, v in line.items() if k != "prompt"}
    found = invoke("generate", folder, "--file", tmp_path / "a.txt", *options)
    assert json.loads(found.stdout) == named


def test_what_a_batch_draws_is_drawn_once(folder):
    """Equal prompts give different samples, in other batches too; the same seed gives the same."""
    lines = as_jsonl([{"prompt": PROMPT}] * 5)
    options = ("--input", "-", "--batch", 2, "--temperature", 1, "--max-new-tokens", 20)
    first = invoke("generate", folder, *options, "--json", input=lines).stdout
    assert len({json.loads(line)["text"] for line in first.splitlines()}) == 5
    assert invoke("generate", folder, *options, "--json", input=lines).stdout == first


@pytest.mark.parametrize("name", METHODS)
def test_every_method_generates(llm, name):
    """What `--method` asks of a model that is loaded once for all of them."""
    tokens = llm.tokenize(PROMPT)
    method = reading(llm, MEASURED.get(name, name), len(tokens) + 1)
    assert len(method.generate([tokens], max_new_tokens=1)[0].tokens) == 1


def test_how_a_prompt_is_read_does_not_depend_on_the_others(folder):
    """Beside one so long that YaRN scales for it."""
    options = ("--method", "yarn", "--max-new-tokens", 4, "--json", "--input", "-")
    both = as_jsonl([{"prompt": PROMPT}, {"prompt": PROMPT * 10}])
    found = invoke("generate", folder, *options, input=both).stdout.splitlines()
    plain = dca_jax.load(folder, dca=None)
    for line, prompt in zip(found, (PROMPT, PROMPT * 10), strict=True):
        tokens = plain.tokenize(prompt)
        (said,) = reading(plain, "yarn", len(tokens) + 4).generate([tokens], max_new_tokens=4)
        assert json.loads(line)["text"] == said.text


def test_an_unknown_method_is_refused_with_those_there_are(folder):
    for command in (("generate", folder, "x"), ("chat", folder), ("explain", folder)):
        result = invoke(*command, "--method", "alibi")
        assert result.exit_code == 2
        assert "method 'alibi' is not known" in result.stderr
        assert all(f"  {name} " in result.stderr for name in METHODS)


def test_an_interrupted_run_keeps_what_it_has(folder, tmp_path, monkeypatch):
    generate = dca_jax.LLM.generate
    calls = []

    def interrupted(llm, *args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(llm, *args, **options)

    monkeypatch.setattr(dca_jax.LLM, "generate", interrupted)
    output = tmp_path / "out.jsonl"
    options = ("--input", "-", "--output", output, "--batch", 1, "--max-new-tokens", 4)
    lines = as_jsonl([{"prompt": "a"}, {"prompt": "b"}])
    result = invoke("generate", folder, *options, input=lines)
    assert result.exit_code != 0
    assert f"the first 1 answers are in {tmp_path / '.out.jsonl.partial'}" in result.stderr
    assert not output.exists()
    assert len((tmp_path / ".out.jsonl.partial").read_text().splitlines()) == 1
    assert invoke("generate", folder, *options, input=lines).exit_code == 0
    assert len(output.read_text().splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2 is not JSON"),
        ("[1]", ':2: expected a JSON object with either "prompt" or "messages"'),
        ('{"text": "a"}', ":2: expected a JSON object"),
        ('{"prompt": "a", "messages": []}', ":2: expected a JSON object"),
        ('{"prompt": ""}', ':2: "prompt" must be a non-empty string'),
        ('{"prompt": 3}', ':2: "prompt" must be a non-empty string'),
        ('{"messages": []}', ':2: "messages" must be a list'),
        ('{"messages": [{"role": "user"}]}', ':2: "messages" must be a list'),
        ('{"prompt": "a", "text": "b"}', ":2 has a field 'text'"),
        ('{"prompt": "\\ud800"}', ":2 contains half of a surrogate pair"),
        (b'{"prompt": "caf\xe9"}', " is not UTF-8 text (byte 31)"),
        ('{"prompt": "a", "prompt": "b"}', ":2 is not JSON: 'prompt' appears twice; keep one"),
        ('{"prompt": ' + "[" * 100_000, ":2 is not JSON: it is nested too deeply"),
        ('{"prompt": "a", "n": ' + "1" * 5000 + "}", ":2 is not JSON: "),
        ('{"messages": [{"role": "nobody", "content": "a"}]}', ":2: the chat template refuses"),
    ],
)
def test_bad_lines_are_named(folder, tmp_path, line, message):
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    result = invoke("generate", folder, "--input", path, "--output", output)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {path}{message}")
    assert result.stderr.count("\n") == 1
    assert not output.exists()


def test_chat_takes_other_methods(folder):
    options = ("--method", "self-extend", "--context-length", "1k", "--max-new-tokens", 1)
    plain = dca_jax.load(folder, dca=None)
    message = [{"role": "user", "content": ("Call me Ishmael. " * 8).strip()}]
    said = reading(plain, "self-extend", 1024).chat(message, max_new_tokens=1)
    assert said.prompt_tokens > 64
    result = invoke("chat", folder, *options, input=message[0]["content"] + "\n")
    assert result.exit_code == 0
    assert f"> {said.text}\n" in result.stdout


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
    result = invoke("explain", "--method", "dca:6,9", "--length", 12, "--plot", plot)
    assert result.exit_code == 0
    assert "chunk length s             6 tokens (2 chunks)" in result.stdout
    assert result.stdout.endswith(" 9 8 7 6 5 4 | 5 4 3 2 1 0\n")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_explain_takes_a_model_or_a_trained_length(folder):
    of_model = invoke("explain", folder, "--length", 1000).stdout
    assert "48 tokens (21 chunks)" in of_model
    assert invoke("explain", "--trained-length", 64, "--length", 1000).stdout == of_model
    preset = invoke("explain", folder, "--method", "dca:chunkllama").stdout
    assert "40 tokens (7 chunks)" in preset  # of 4 * 64 tokens


@pytest.mark.slow
def test_explain_takes_every_method(tmp_path):
    for name in METHODS:
        name = MEASURED.get(name, name)
        result = invoke("explain", "--trained-length", 8, "--method", name, "--length", 16)
        assert result.exit_code == 0, result.stderr
        assert "largest relative position" in result.stdout
    plot = tmp_path / "m.png"
    options = ("--trained-length", 8, "--method", "self-extend:2,4", "--plot", plot)
    grouped = invoke("explain", *options, "--length", 7)
    assert plot.exists()
    assert grouped.stdout.endswith("\n 5 5 4 3 2 1 0\n")
    masked = invoke("explain", "--trained-length", 8, "--method", "streaming-llm:2,3")
    assert "keys of the last token     6 of 32" in masked.stdout
    assert masked.stdout.splitlines()[-1].split() == ["5", "4", *["."] * 26, "3", "2", "1", "0"]
    long = invoke("explain", "--method", "dca:3k,4k", "--length", "64k")
    assert "(plain RoPE: 65535)" in long.stdout


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
        (["generate", "{folder}"], "the text is empty"),  # of standard input
        (["generate", "{folder}", "x", "--file", "{latin}"], "got 2 of them"),
        (["generate", "{folder}", "--file", "{latin}"], "is not UTF-8 text (byte 3)"),
        (
            ["generate", "{folder}", "--document", "{latin}"],
            "--document and --question go together",
        ),
        (["generate", "{folder}", "x", "--method", "dca:40,x"], "is not 'dca:S,Q', in tokens"),
        (["generate", "{folder}", "x", "--method", "dca:60,40"], "chunk_len (60) must not exceed"),
        (["generate", "{folder}", "x", "--method", "dca:huge"], "DCA setting 'huge' is not known"),
        (["generate", "{folder}", "x", "--stop", ""], "stop must contain non-empty strings"),
        (["generate", "{folder}", "x", "--max-new-tokens", "0"], "'0' is not a number of tokens"),
        (["generate", "{folder}/absent", "x"], "is neither a folder nor"),
        (["generate", "{folder}", "x", "--input", "{latin}"], "got 2 of them"),
        (["generate", "{folder}", "--input", "{folder}/no.jsonl"], "No such file"),
        (["generate", "{folder}", "x", "--json", "--output", "{folder}/a"], "give either --json"),
        (["generate", "{folder}", "x", "--output", "{folder}/no/a.jsonl"], "is not a folder"),
        (["generate", "{folder}", "--input", "-"], "standard input is empty"),
        (
            ["plan", "{folder}", "--device", "h200", "--context-length", "4q"],
            "not a number of tokens",
        ),
        (["chat", "{plain}"], "has no chat template"),
        (["info", "{folder}/config.json"], "is a file; give the folder"),
        (["explain"], "give a MODEL, or --trained-length"),
        (["explain", "--method", "rerope:4"], "give a MODEL, or --trained-length"),
        (["explain", "{folder}", "--trained-length", "64"], "give either a MODEL or"),
        (["explain", "--method", "dca:9,6"], "must not exceed max_query_position"),
        (["explain", "--trained-length", "63"], "preset 'paper' needs a trained length"),
        (["explain", "--trained-length", "64", "--length", "0"], "'0' is not a number of tokens"),
        (["explain", "--trained-length", "64", "--plot", "{folder}/no/m.png"], "is not a folder"),
        (["explain", "--trained-length", "64", "--plot", "{folder}/m.doc"], "cannot be written"),
        (["convert", "{folder}/absent", "{folder}/new"], "absent is neither a folder nor"),
        # What others call it.
        (["serve", "{folder}", "--max-model-len", "4096"], "no option --max-model-len; here it is"),
        (["serve", "{folder}", "--tensor-parallel-size=2"], "here it is --mesh tensor=N"),
        (["serve", "{folder}", "--api-key", "x"], "here it is DCA_JAX_API_KEY in the environment"),
        (["generate", "{folder}", "x", "--load-in-8bit"], "here it is --weights int8"),
        # All of it before weights are read.
        (
            ["serve", "{folder}", "--port", "0", "--host", "x" * 70],
            "label too long; choose",
        ),
        (["serve", "{folder}", "--port", "0", "--host", ""], "cannot listen on '' port 0"),
        (["serve", "{folder}", "--port", "0", "--cache", "1G"], "'1G' is not a number of tokens"),
        (["serve", "{folder}", "--port", "0", "--context", "1"], "has no room for a prompt and"),
        (["serve", "{folder}", "--port", "0", "--method", "rerope:4"], "not by ReRoPE; use the"),
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


def test_an_option_that_another_command_has_is_not_advised(folder):
    refused = invoke("info", folder, "--max-num-seqs", "4")
    assert refused.exit_code == 2
    assert "No such option: --max-num-seqs" in refused.stderr


@pytest.mark.processes
def test_as_a_user_runs_it(folder, llm, tmp_path):
    """Converted, continued, and its compiled programs kept for the next time."""
    converted = invoke("convert", folder, tmp_path / "orbax")
    assert converted.exit_code == 0, converted.stderr
    assert converted.stdout == f"wrote {tmp_path / 'orbax'}\n"
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    options = ("--max-new-tokens", 12)
    result = run("generate", tmp_path / "orbax", PROMPT, *options, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == llm.generate(PROMPT, max_new_tokens=12)[0].text + "\n"
    assert list((tmp_path / "cache" / "dca_jax" / "xla").iterdir())
    refused = invoke("generate", folder, PROMPT, "--temperature", -1)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == "error: temperature must be 0 (greedy) or at least 0.0001, got -1.0\n"


@pytest.mark.parametrize("command", [measure.few_shot_command, measure.l_eval_command])
def test_questions_are_read_as_by_the_papers_scripts(command):
    """ChunkLlama's scripts behind Tables 3 and 4 call `replace_with_chunkllama(4096)`."""
    assert inspect.signature(command).parameters["method"].default == ["dca:chunkllama"]


def test_a_signal_before_a_command_has_begun_is_answered_with_a_word(monkeypatch, capsys):
    """As while it is imported, or reads weights; commands that write for long say more later."""

    def ended():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "app", ended)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_lm_eval_that_is_not_installed_is_named_with_its_extra(folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = invoke("lm-eval", folder, "--tasks", "ruler")
    assert done.exit_code == 2
    assert "lm-eval needs packages that are not installed" in done.output
    assert "pip install 'dca_jax[eval]'" in done.output

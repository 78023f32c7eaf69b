"""The wheel as a user installs it: in clean environments, with each extra, in an empty folder.

    make test-wheel

makes a virtual environment for the core and for each extra, installs the wheel there with the
newest dependencies that its metadata allows (so it needs the network), and runs what that extra is
for: with `eval` every one of its packages is used. Where an extra is missing, the command that
needs it must name it. Extras for accelerators are only resolved.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo-python-7m"
DIALOGUES = [
    {
        "conversations": [
            {"from": "human", "value": f"What is {n} plus {n}?"},
            {"from": "gpt", "value": f"{n} plus {n} is {2 * n}. " * 8},
        ]
    }
    for n in range(16)
]
QUESTIONS = [
    {"query": f"Who is {name}?", "output": "A captain."}
    for name in ("Ahab", "Starbuck", "Stubb", "Flask")
]
DOCUMENT = {"input": "A text. " * 9, "instructions": ["Who?"], "outputs": ["A captain."]}
TASK = """task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: [" A captain.", " A whale."]
doc_to_target: 0
"""
EVERY_NAME = (
    "import dca_jax, checkpoints_convert, importlib.resources as files\n"
    "for name in dca_jax.__all__: getattr(dca_jax, name)\n"
    "for package in ('dca_jax', 'checkpoints_convert'):\n"
    "    assert files.files(package).joinpath('py.typed').is_file(), package\n"
    "import sys; assert 'torch' not in sys.modules"
)
FINETUNE = (
    "dca-jax finetune --model demo --data dialogues.json --template llama-2 --length 128 "
    "--steps 1 --dtype float32 --output"
)
QUIET = (
    "import contextlib, io, sys\n"
    "with contextlib.redirect_stderr(io.StringIO()) as said:\n"
    "    import dca_jax; dca_jax.load('demo')\n"
    "assert 'PyTorch' not in said.getvalue(), said.getvalue()"
)
SENTENCES = "import nltk.tokenize, nltk; nltk.tokenize.PunktSentenceTokenizer().tokenize('A. B.')"
FEW_SHOT = (
    "dca-jax eval few-shot demo --data qmsum=document.jsonl --pool qmsum=questions.jsonl "
    "--examples best --limit 1 --method dca"
)
# What each environment runs, a command a line; "serve" asks a server.
CHECKS = {
    "": [
        ["python", "-c", EVERY_NAME],
        ["python", "-c", QUIET],
        "dca-jax --version",
        "dca-jax info demo",
        "dca-jax generate demo prompt --max-new-tokens 4",
        "dca-jax plan llama-2-7b --device h200 --context-length 32k",
        "dca-jax convert demo orbax",
        "dca-jax generate orbax prompt --max-new-tokens 4",
        "dca-jax eval passkey demo --form fitted --length 1k --trials 1 --method dca",
        "dca-jax eval report outputs",
    ],
    "train": [f"{FINETUNE} run", "dca-jax generate run/model prompt --max-new-tokens 4"],
    "train,tensorboard": [f"{FINETUNE} run --report tensorboard"],
    "train,wandb": [f"{FINETUNE} run --report wandb"],
    "serve": ["serve"],
    "eval": [
        "dca-jax eval ruler demo --task niah_single_1 --length 1k --trials 1 --method dca",
        f"{FEW_SHOT} --max-length 700",
        ["python", "-c", SENTENCES],
        "dca-jax lm-eval demo --tasks capitals --include_path . --method dca",
    ],
}
# What the core alone refuses, and the extra that it has to name.
REFUSED = {
    "dca-jax serve demo": "serve",
    f"{FINETUNE} run": "train",
    "dca-jax eval ruler demo --length 1k --method dca": "eval",
    FEW_SHOT: "eval",
    "dca-jax lm-eval demo --tasks capitals": "eval",
}
RESOLVED = ["cuda12", "cuda13", "tpu"]


def install(wheel: Path, extras: str, folder: Path, *options: str) -> Path:
    """A new environment with the wheel; returns its `bin`."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    named = f"{wheel}[{extras}]" if extras else str(wheel)
    pip = [
        folder / "bin" / "python",
        "-m",
        "pip",
        "install",
        "-qq",
        "--no-compile",
        *options,
        named,
    ]
    subprocess.run(pip, check=True)
    return folder / "bin"


def run(
    command: str | list[str], bin: Path, folder: Path, environment: dict[str, str], extra: str = ""
) -> None:
    """Runs a command of that environment; an error ends the program with all it printed.

    With `extra` the command must be refused, and tell how to install that extra.
    """
    words = command.split() if isinstance(command, str) else command
    done = subprocess.run(
        [bin / words[0], *words[1:]],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    told = f"pip install 'dca_jax[{extra}]'" in " ".join((done.stdout + done.stderr).split())
    if (done.returncode, told) != ((2, True) if extra else (0, False)):
        sys.exit(f"{' '.join(words)}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")


def ask_a_server(bin: Path, folder: Path, environment: dict[str, str]) -> None:
    """Starts `dca-jax serve`, asks it once, and ends it."""
    port = 18_765
    serve = f"serve demo --port {port} --context 512 --rows 2".split()
    ask = (
        "import json, urllib.request as u\n"
        'body = json.dumps({"model": "demo", "prompt": "def f", "max_tokens": 4}).encode()\n'
        f'r = u.Request("http://127.0.0.1:{port}/v1/completions", body, '
        '{"Content-Type": "application/json"})\n'
        'assert json.load(u.urlopen(r))["usage"]["completion_tokens"] == 4'
    )
    with subprocess.Popen([bin / "dca-jax", *serve], cwd=folder, env=environment) as server:
        try:
            end = time.monotonic() + 300
            health = f'import urllib.request as u; u.urlopen("http://127.0.0.1:{port}/health")'
            while subprocess.run([bin / "python", "-c", health], capture_output=True).returncode:
                if server.poll() is not None or time.monotonic() > end:
                    sys.exit("dca-jax serve did not come up")
                time.sleep(1)
            run(["python", "-c", ask], bin, folder, environment)
        finally:
            server.terminate()


def main(wheel: Path) -> None:
    """Says of each environment what it took, and stops at the first thing that fails."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX_"))}
    clean |= {"JAX_PLATFORMS": "cpu", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    for extras, commands in CHECKS.items():
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            bin = install(wheel, extras, Path(name) / "venv")
            installed = time.monotonic()
            folder = Path(name) / "empty"
            folder.mkdir()
            shutil.copytree(DEMO, folder / "demo")
            (folder / "dialogues.json").write_text(json.dumps(DIALOGUES))
            lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
            (folder / "questions.jsonl").write_text(lines)
            (folder / "document.jsonl").write_text(json.dumps(DOCUMENT) + "\n")
            (folder / "capitals.yaml").write_text(TASK)
            for command in commands:
                if command == "serve":
                    ask_a_server(bin, folder, clean)
                else:
                    run(command, bin, folder, clean)
            for command, extra in REFUSED.items() if not extras else ():
                run(command, bin, folder, clean, extra)
        took = (
            f"installed in {installed - begin:.0f} s, used in {time.monotonic() - installed:.0f} s"
        )
        print(f"{wheel.name}[{extras}]: {took}", flush=True)
    for extra in RESOLVED:
        with tempfile.TemporaryDirectory() as name:
            install(wheel, extra, Path(name) / "venv", "--dry-run")
        print(f"{wheel.name}[{extra}]: resolved", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

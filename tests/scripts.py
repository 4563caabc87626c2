"""The scripts as commands, cheaply: a fork of the test process runs the very file under the name
__main__, with an argv and standard streams of its own, and spares the seconds of importing torch.
"""

import json
import os
import random
import runpy
import sys
import traceback
from pathlib import Path

from safetensors.torch import load_file

from nanoalign import Stopped
from nanoalign.run.flags import DPOConfig, KTOConfig, SFTConfig, parse
from train_dpo import run_dpo
from train_kto import run_kto
from train_sft import run_sft

ROOT = Path(__file__).parent.parent
METHODS = {"sft": (SFTConfig, run_sft), "dpo": (DPOConfig, run_dpo), "kto": (KTOConfig, run_kto)}


def child(action) -> int:
    """Start action() in a fork of this process; `wait` for it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it complains of forks otherwise
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        action()
        code = 0
    except (SystemExit, Stopped) as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code; -9 after a SIGKILL."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(folder: Path, script: str, *flags, first=lambda: None) -> tuple[int, str, str]:
    """`python script flags` in a folder -> (exit code, standard output, standard error).

    "-m nanoalign.chat" is a script too. `first` is called in the process before it begins.
    """
    outputs = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")]

    def action():
        os.chdir(folder)
        for stream, output in zip(("stdout", "stderr"), outputs):
            setattr(sys, stream, open(output, "w", encoding="utf-8"))
        first()
        sys.stdin = open(os.devnull)
        if script.startswith("-m "):
            sys.argv = [script, *map(str, flags)]
            sys.modules.pop(script[3:], None)
            runpy.run_module(script[3:], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [str(ROOT / script), *map(str, flags)]
            runpy.run_path(sys.argv[0], run_name="__main__")

    code = wait(child(action))
    return code, *(output.read_text(encoding="utf-8") for output in outputs)


def no_reader():
    """Standard output becomes a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = open(writer, "w", encoding="utf-8")


def files(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: path -> its bytes; None for a directory or a dead link."""
    found = {str(p.relative_to(folder)): p for p in Path(folder).rglob("*")}
    return {name: p.read_bytes() if p.is_file() else None for name, p in found.items()}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_data(home: Path) -> Path:
    """sft.jsonl, dpo.jsonl and kto.jsonl of 11 rows each, replies of many lengths."""
    rng, rows = random.Random(0), {"sft": [], "dpo": [], "kto": []}

    def text(longest):
        words = "Paris is the capital of France. Light is scattered, thank you.".split()
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    for i in range(11):
        prompt = f"{text(9)} {i}"
        rows["sft"].append({"prompt": prompt, "completion": text(12)})
        rows["dpo"].append({"prompt": prompt, "chosen": f"{text(12)} a", "rejected": text(5)})
        rows["kto"].append({"prompt": prompt, "completion": text(12), "label": i % 3 != 0})
    for method in rows:
        write_rows(home / f"{method}.jsonl", rows[method])
    return home


def argv(given: dict) -> list[str]:
    """{"beta": 0.5, "seed": None} -> ["--beta=0.5"]; lists become several words."""
    words = []
    for name, value in given.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def call(method: str, given: dict) -> None:
    """The script's own function, in this process."""
    kind, script = METHODS[method]
    script(parse(kind, argv(given), {}))


def metrics(directory: Path) -> list[dict]:
    """The lines of metrics.jsonl as strict JSON, without what only a clock knows."""

    def no_constant(name):
        raise ValueError(f"{name} is no JSON")

    lines = []
    for text in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text, parse_constant=no_constant)
        lines.append({k: v for k, v in line.items() if k not in ("time", "tokens_per_second")})
    return lines


def tensors(directory: Path) -> dict[str, bytes]:
    """What a run left: name -> (shape, bytes)."""
    names = ("adapter_model.safetensors", "model.safetensors")
    path = next(directory / name for name in names if (directory / name).exists())
    return {k: (t.shape, t.numpy().tobytes()) for k, t in load_file(path).items()}


def tops(directory: Path) -> list[str]:
    """The names of its checkpoints, and of whatever has tmp in its path."""
    found = [p for p in directory.rglob("*") if "tmp" in str(p.relative_to(directory))]
    return sorted(str(p.relative_to(directory)) for p in [*directory.glob("checkpoint-*"), *found])

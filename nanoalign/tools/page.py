"""The chat as a page: python -m nanoalign.chat DIR --web

Talk, press thumbs, train on them, and see what changed. The server is the standard library's and
the page is one file of HTML. Nothing else is downloaded, and nothing leaves this machine.

The server keeps the conversations and writes judgements from them. It does not take their text
from the browser, and the page shows replies as plain text. Training is one of the scripts in
another process. It goes on if the tab is closed, and it stops with a checkpoint if the server ends.
The server frees its model while training.

Some judgements are not trained on. For these, the server measures before and after training whether
the model gives liked replies a higher log pi than disliked ones.
"""

import gc
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import torch
from transformers import TextStreamer

import nanoalign
from nanoalign import InputError, world
from nanoalign.data import Limits
from nanoalign.formats.layouts import DPO, KTO, read_examples
from nanoalign.model import Policy, generate
from nanoalign.run.files import write_text
from nanoalign.tools.thumbs import Conversation, read_rows, verdict

PAGE = Path(__file__).with_name("page.html")
SAFE = {  # headers: run only the page's script, connect only to this server, allow no frame
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
LONGEST = 2**16  # bytes of a request
CONVERSATIONS = 1000
NEEDED = {"kto": 24, "dpo": 16}  # judgements before training, with those that are held out
VOTES = 20  # fixed: whoever stops when the result looks good finds differences that are chance


class Refused(Exception):
    """A request is refused: (HTTP status, why)."""


class Stopped(Exception):
    """Raised to end a reply: the user pressed Stop or closed the tab."""


class Talk(Conversation):
    """The conversation of one browser."""

    busy = stop = False


class Sender(TextStreamer):
    """Sends a reply piece by piece and keeps it. Stop or a closed tab ends it."""

    def __init__(self, tokenizer, talk: Talk, send: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.talk, self.send, self.reply = talk, send, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.reply += text
        try:
            self.send(text)
        except OSError:
            raise Stopped from None
        if self.talk.stop:
            raise Stopped


class Training:
    """A run of a script on the judgements. Each run has a number, so no file is overwritten."""

    def __init__(self, args: Namespace, method: str, rows: list[dict], rate: float, epochs: float):
        home, numbers = args.feedback.parent, [0]
        for path in home.glob("run-*"):
            numbers += map(int, re.findall("^run-([0-9]+)", path.name))
        self.method, self.name = method, f"run-{max(numbers) + 1}"
        self.directory, self.log = home / self.name, home / f"{self.name}.log"
        self.test = home / f"{self.name}.test.jsonl"
        self.before = self.after = self.process = None
        self.failure, self.runs = "", True

        kept = held_out(method, rows)
        asked = [row["prompt"] for row in kept]  # other judgements of these are left out, too
        rest = [row for row in rows if row["prompt"] not in asked]
        train = home / f"{self.name}.train.jsonl"
        for file, part in ((train, rest), (self.test, kept)):
            write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
        self.steps = math.ceil(math.ceil(len(rest) / 8) * epochs)
        adapter = Path(args.directory, "adapter_config.json").exists()
        flags = {
            "adapter_name_or_path" if adapter else "model_name_or_path": args.directory,
            "dataset_name": train, "output_dir": self.directory, "device": args.device,
            "learning_rate": rate, "num_train_epochs": epochs, "beta": 0.5, "logging_steps": 1,
            "per_device_train_batch_size": 8, "load_in_4bit": args.load_in_4bit,
            "chat_template": args.chat_template,
            "chat_template_kwargs": json.dumps(args.chat_template_kwargs),
            "trust_remote_code": args.trust_remote_code, "threads": 1 if built_in(args) else None,
        }  # fmt: skip
        if method == "kto":  # give thumbs up and thumbs down the same total weight
            up, down = (sum(row["label"] is label for row in rest) for label in (True, False))
            flags["desirable_weight"] = max(1, down / max(1, up))
            flags["undesirable_weight"] = max(1, up / max(1, down))
        self.words = [f"--{name}={value}" for name, value in flags.items() if value is not None]

    def run(self) -> None:
        """Run the script and wait. It has a session of its own, or a terminal's Ctrl-C would reach
        it, too, and stop it twice. Its output goes to a file, since a pipe can break."""
        home = str(Path(nanoalign.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        words = [sys.executable, "-m", f"train_{self.method}", *self.words]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
        if self.process.wait():
            said = self.log.read_text(encoding="utf-8", errors="replace").strip()
            self.failure = said.rpartition("\n")[2] or f"exit code {self.process.returncode}"

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    def state(self) -> dict:
        """What the page shows of the run."""
        points = []
        if (metrics := self.directory / "metrics.jsonl").exists():
            lines = metrics.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
            points = [json.loads(line) for line in lines if line]  # complete lines only
        names = {"step": "step", "loss": "loss", "margin": "rewards/margins"}
        points = [{n: p.get(name) for n, name in names.items()} for p in points if "loss" in p]
        shown = "name", "method", "steps", "runs", "failure", "before", "after"
        return {name: getattr(self, name) for name in shown} | {"points": points}


class Server(ThreadingHTTPServer):
    """What all browsers share. `open_policy` loads the model, or with a run's directory the result
    of this run, whose reference is the model."""

    daemon_threads, ending = True, False

    def __init__(self, args: Namespace, open_policy: Callable[[str | None], Policy]):
        try:
            super().__init__(("127.0.0.1", args.port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"--port {args.port}: {error}") from None
        self.args, self.open_policy = args, open_policy
        self.judging, self.computing = threading.RLock(), threading.Lock()
        self.talks: dict[str, Talk] = {}
        self.training: Training | None = None
        self.policy: Policy | None = None  # None during training
        self.trained: str | None = None  # directory of the newest run
        self.votes: list = []  # judged offers with one reply of this run and one of the model
        self.questions = []
        if built_in(args):
            lines = (world.HOME / "validation.jsonl").read_text(encoding="utf-8").splitlines()
            self.questions = [json.loads(line)["question"] for line in lines]

    def talk(self, name: str) -> Talk:
        with self.judging:
            if name not in self.talks:
                self.talks[name] = Talk(self.args.directory, self.args.feedback, self.args.system)
            if len(self.talks) > CONVERSATIONS:
                self.talks.pop(next(iter(self.talks)))
            return self.talks[name]

    def writers(self) -> list[tuple[Callable, str]]:
        """The two that write replies, each as (context, name): the newest run and the model, an
        adapter and its base, or twice the same model."""
        newest, lora = (nullcontext, self.trained or self.args.directory), self.policy.lora
        base = self.args.directory if self.trained else lora and lora.base_model_name_or_path
        return [newest, (self.policy.reference, base)] if lora else [newest, newest]

    def learn(self, training: Training) -> None:
        """Measure, free the model, train, load the result, measure again."""
        try:
            with self.computing:
                with self.policy.reference() if self.trained else nullcontext():
                    training.before = ranking(self.policy, training)
                self.policy = None
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                training.run()
                if self.ending:
                    return
                if not training.failure:
                    self.trained, self.votes = str(training.directory), []
                self.policy = self.open_policy(self.trained)
                if not training.failure:
                    training.after = ranking(self.policy, training)
        except Exception as error:  # out of memory, for example; the page shows it
            training.failure = str(error)
        finally:
            training.runs = False

    @property
    def trains(self) -> bool:
        return self.training is not None and self.training.runs

    def state(self, talk: Talk) -> dict:
        """Everything that the page shows."""
        labels = [row.get("label") for row in read_rows(talk.file)]
        turns = [
            shown(turn) | {"label": None, "anew": i in talk.starts}
            for i, turn in enumerate(talk.turns)
        ]
        for i, row in talk.rows.items():
            turns[i]["label"] = row["label"]
        offer = None
        if talk.offer and talk.offer.differ:
            offer = {"judged": talk.offer.judged, "better": talk.offer.better}
            offer["replies"] = list(map(shown, talk.offer.replies))
        return {
            "model": self.args.directory,
            "trained": self.trained and Path(self.trained).name,
            "turns": turns,
            "offer": offer,
            "busy": talk.busy,
            "ready": self.policy is not None,
            "up": labels.count(True),
            "down": labels.count(False),
            "choices": len(read_rows(talk.pairs)),
            "needed": NEEDED,
            "rate": 1e-3 if built_in(self.args) else 1e-4,
            "question": random.choice(self.questions) if self.questions else None,
            "training": self.training and self.training.state(),
            "votes": self.trained and self.count(),
        }

    def count(self) -> str:
        """The result of the votes on the newest run, after the last vote only."""
        won = [offer.row and offer.row["model"] for offer in self.votes[:VOTES]]
        if len(won) < VOTES:
            return f"{len(won)} of {VOTES} votes; the count comes after the last"
        wins, lost = won.count(self.trained), won.count(self.args.directory)
        neither = f"; {won.count(None)} for neither" * (None in won)
        return f"{Path(self.trained).name} wins {verdict(wins, wins + lost)}{neither}"


def built_in(args: Namespace) -> bool:
    """Is this the model of the built-in world?"""
    return Path(args.directory) == world.HOME.parent / "sft" and world.HOME.exists()


def shown(message: dict) -> dict:
    """A turn as the page shows it: role, thought, and content with calls as text."""
    calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
    text = "\n".join(filter(None, [message["content"], *calls]))
    return {"role": message["role"], "text": text, "thought": message.get("reasoning_content")}


def held_out(method: str, rows: list[dict]) -> list[dict]:
    """Eight judgements, or fewer if there are few. Thumbs: as many up as down."""
    rng = random.Random(len(rows))
    if method == "dpo":
        return rng.sample(rows, min(8, len(rows) // 4))
    sides = [[row for row in rows if row["label"] is label] for label in (True, False)]
    return [row for side in sides for row in rng.sample(side, min(4, len(side) // 2))]


@torch.no_grad()
def ranking(policy: Policy, training: Training) -> dict[str, int]:
    """In how many held-out pairs does the liked reply have the higher log pi? With thumbs, each
    liked reply is paired with each disliked one."""
    layouts = KTO if training.method == "kto" else DPO
    opened = policy.tokenizer, policy.template, Limits()
    examples, _ = read_examples([str(training.test)], layouts, *opened, notes=[])
    policy.lm.eval()
    cases = [policy([example]).logps.tolist() for example in examples]
    if training.method == "kto":
        scores = list(zip(examples, cases))
        cases = product(*([s for e, (s,) in scores if e.label is x] for x in (True, False)))
    won = [liked > other for liked, other in cases]
    return {"right": sum(won), "of": len(won)}


def refuse_if(wrong: bool, why: str, status: int = 409) -> None:
    if wrong:
        raise Refused(status, why)


# Requests of a browser. `body` is the request's JSON; `send` sends a part of the answer.


def on_state(server: Server, talk: Talk, body: dict, send) -> None:
    """Nothing: the state is sent after each answer anyway."""


def on_ask(server: Server, talk: Talk, body: dict, send) -> None:
    """A question: send a reply, or with `two` two replies in random order."""
    text, texts = body.get("text"), []
    refuse_if(not isinstance(text, str) or not text.strip(), "text: expected some words", 400)
    refuse_if(any("\ud800" <= c <= "\udfff" for c in text), "text: half a character", 400)
    with server.judging:
        refuse_if(talk.busy, "a reply is being written")
        refuse_if(server.trains, "the model is training")
        talk.busy, talk.stop = True, False
    try:
        with server.computing:
            refuse_if(server.policy is None, "the model is training")
            writers = server.writers()[: 1 + (body.get("two") is True)]
            random.shuffle(writers)
            if body.get("anew") is True:
                talk.begin()
            talk.ask(text)
            try:
                for side, (writer, _) in enumerate(writers):
                    with writer():
                        texts.append(reply(server, talk, lambda p: send({"side": side, "text": p})))
            except Exception:
                talk.turns.pop()  # otherwise the question would stay without a reply
                raise
        if len(texts) == 2:
            talk.offered(texts, [name for _, name in writers])
            if not talk.offer.differ:
                send({"note": "both replies are the same"})
        else:
            talk.answer(texts[0], writers[0][1])
    finally:
        talk.busy = False


def reply(server: Server, talk: Talk, send: Callable[[str], None]) -> str:
    """Generate a reply, and send it piece by piece. -> its text"""
    names = "max_new_tokens", "temperature", "top_p"
    options = {name: getattr(server.args, name) for name in names}
    sender = Sender(server.policy.tokenizer, talk, send)
    with suppress(Stopped):
        generate(server.policy, [talk.prompt()], streamer=sender, **options)
    return sender.reply


def on_choose(server: Server, talk: Talk, body: dict, send) -> None:
    """A choice between two replies: 0, 1, or None for neither."""
    better, offer = body.get("better"), talk.offer
    refuse_if(talk.busy or not offer or not offer.differ, "there is nothing to choose")
    refuse_if(better not in (0, 1, None) or type(better) is bool, "better: 0, 1 or null", 400)
    talk.choose(better)
    if {*offer.models} == {server.trained, server.args.directory} and offer not in server.votes:
        server.votes.append(offer)


def on_thumb(server: Server, talk: Talk, body: dict, send) -> None:
    """A thumb for the reply in turn number `place`; None takes it back."""
    turn, label = body.get("place"), body.get("label")
    refuse_if(talk.busy, "a reply is being written")
    refuse_if(not (label is None or type(label) is bool), "label: true, false or null", 400)
    replies = [i for i, turn in enumerate(talk.turns) if turn["role"] == "assistant"]
    refuse_if(type(turn) is not int or turn not in replies, "place: no reply is there", 400)
    if label is None:
        talk.forget(turn)
    else:
        talk.thumb(label, turn)


def on_undo(server: Server, talk: Talk, body: dict, send) -> None:
    """Take back the last question, its reply and the judgement."""
    refuse_if(talk.busy, "a reply is being written")
    send({"text": talk.undo()})


def on_reset(server: Server, talk: Talk, body: dict, send) -> None:
    """Start a new conversation. The page shows it below the old one."""
    refuse_if(talk.busy, "a reply is being written")
    talk.begin()


def on_stop(server: Server, talk: Talk, body: dict, send) -> None:
    talk.stop = True


def on_train(server: Server, talk: Talk, body: dict, send) -> None:
    """Train with KTO on the thumbs, or with DPO on the choices."""
    method = body.get("method")
    refuse_if(method not in NEEDED, "method: kto or dpo", 400)
    for name, most in (("rate", 1), ("epochs", 1000)):
        value = body.get(name)
        fits = type(value) in (int, float) and 0 < value <= most
        refuse_if(not fits, f"{name}: expected a number above 0, at most {most}", 400)
    rows = read_rows(talk.file if method == "kto" else talk.pairs)
    refuse_if(len(rows) < NEEDED[method], f"{len(rows)} of {NEEDED[method]} judgements")
    refuse_if(server.trains or server.policy is None, "it is training already")
    server.training = Training(server.args, method, rows, body["rate"], body["epochs"])
    threading.Thread(target=server.learn, args=[server.training], daemon=True).start()


ACTIONS = {
    "/state": on_state, "/ask": on_ask, "/choose": on_choose, "/thumb": on_thumb, "/undo": on_undo,
    "/reset": on_reset, "/stop": on_stop, "/train": on_train,
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """One request. Pages of other sites are refused: by the Host header, if their name leads to
    this address, and by the content type, since a browser sends no JSON without our permission."""

    timeout, begun = 600, False

    def ours(self) -> bool:
        hosts = [f"{host}:{self.server.server_port}" for host in ("127.0.0.1", "localhost")]
        return self.headers.get("Host") in hosts

    def do_GET(self) -> None:
        if self.ours() and self.path == "/":
            self.begin(200, "text/html; charset=utf-8")
            self.wfile.write(PAGE.read_bytes())
        else:
            self.begin(404 if self.ours() else 403)

    def do_POST(self) -> None:
        try:
            refuse_if(not self.ours(), "another site", 403)
            refuse_if(self.headers.get("Content-Type") != "application/json", "not JSON", 403)
            refuse_if(self.path not in ACTIONS, "there is no such thing", 404)
            size = self.headers.get("Content-Length", "")
            refuse_if(not size.isdigit() or int(size) > LONGEST, "too long", 413)
            try:
                body = json.loads(self.rfile.read(int(size)))
            except (ValueError, RecursionError):
                raise Refused(400, "not JSON") from None
            name = body.get("id") if isinstance(body, dict) else None
            known = isinstance(name, str) and re.fullmatch("[0-9a-f-]{8,64}", name)
            refuse_if(not known, "id: expected a conversation's", 400)
            server, talk, action = self.server, self.server.talk(name), ACTIONS[self.path]
            with nullcontext() if action is on_ask else server.judging:
                action(server, talk, body, self.send)
            with server.judging:
                state = server.state(talk)
            self.send(state)
        except Refused as refused:
            self.refuse(*refused.args)
        except InputError as error:
            self.refuse(400, str(error))
        except OSError:
            pass  # the tab was closed

    def refuse(self, status: int, why: str) -> None:
        if not self.begun:
            self.begin(status, "application/json")
        self.send({"error": why})

    def begin(self, status: int, kind: str = "text/plain") -> None:
        self.begun = True
        self.send_response(status)
        for name, value in ({"Content-Type": kind} | SAFE).items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, part: dict) -> None:
        """A line of JSON."""
        if not self.begun:
            self.begin(200, "application/json")
        self.wfile.write(json.dumps(part).encode() + b"\n")

    def log_message(self, *args) -> None:
        """Print nothing: the base class would print each request in the terminal."""


def serve(args: Namespace, open_policy: Callable[[str | None], Policy]) -> None:
    """Run the server until Ctrl-C or SIGTERM."""
    server = Server(args, open_policy)  # before loading the model: the port may not be free
    if built_in(args):
        torch.set_num_threads(1)
    server.policy = open_policy(None)

    def end(number, frame):
        raise KeyboardInterrupt

    handlers = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("ended")
    finally:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)
        server.ending = True
        for talk in server.talks.values():
            talk.stop = True
        if server.training:
            server.training.stop()
        with server.computing:  # wait for the reply that is being generated
            server.server_close()
        for number, handler in handlers.items():
            signal.signal(number, handler)

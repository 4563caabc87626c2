"""The page's server, asked as a browser would and as it must not be. tests/browser.py is the page
itself in a real browser."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from array import array
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from scripts import ROOT, write_rows

from nanoalign import InputError
from nanoalign.data import Limits
from nanoalign.formats.layouts import KTO, read_examples
from nanoalign.packing import Example
from nanoalign.run.flags import SFTConfig
from nanoalign.run.policy import load_policy, save_policy
from nanoalign.tools import chat, page
from nanoalign.tools.page import Server, Stopped, held_out
from nanoalign.tools.thumbs import read_rows

ANN, BEN = "aaaaaaaa", "bbbbbbbb"  # two browsers
JSON = {"Content-Type": "application/json"}


def flags(directory, home, **more):
    return Namespace(**dict(
        directory=str(directory), feedback=home / "thumbs.jsonl", port=0, device="cpu", system="",
        chat_template=None, chat_template_kwargs={}, load_in_4bit=False, trust_remote_code=False,
        max_new_tokens=8, temperature=0.7, top_p=0.95,
    ) | more)  # fmt: skip


@pytest.fixture(scope="module")
def policy(model_dir, tmp_path_factory):
    args = flags(model_dir, tmp_path_factory.mktemp("unused"))
    return chat.open_trained(args, None)


@pytest.fixture
def server(model_dir, tmp_path, policy):
    args = flags(model_dir, tmp_path)
    server = Server(args, partial(chat.open_trained, args))
    server.policy = policy
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    yield server
    if server.training:
        server.training.stop()
    server.shutdown()
    thread.join()
    server.server_close()


def request(server, path, body=None, headers=None, method=None):
    """-> (status, headers, what it says)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    body = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
    headers = ({} if body is None else JSON) if headers is None else headers
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    answer = connection.getresponse()
    said = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), said


def post(server, path, who=ANN, **body):
    """-> (the state, or what was refused; the parts before it)"""
    status, _, said = request(server, path, {"id": who, **body})
    *parts, last = map(json.loads, said.splitlines())
    assert (status == 200) == ("turns" in last) and (status != 200) == ("error" in last)
    return last, parts


def refusal(server, path, who=ANN, **body):
    status, _, said = request(server, path, {"id": who, **body})
    return status, json.loads(said)["error"]


def texts(state):
    return [turn["text"] for turn in state["turns"]]


# ---------------------------------------------------------------------------------- who may ask


def test_the_page_and_nothing_else(server):
    status, headers, said = request(server, "/")
    assert status == 200 and said == page.PAGE.read_text(encoding="utf-8")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    for path in ("/page.html", "/../README.md", "/%2e%2e/etc/passwd", "//etc/passwd", "/state",
                 "/thumbs.jsonl", "/?x"):  # fmt: skip
        assert request(server, path)[0] in (400, 404)
    assert request(server, "/nothing", {"id": ANN})[0] == 404
    assert request(server, "/", method="PUT", body="x")[0] == 501


def test_only_our_own_page_asks(server, tmp_path):
    port = server.server_port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "0.0.0.0", ""):
        assert request(server, "/", headers={"Host": host})[0] == 403
        assert request(server, "/state", {"id": ANN}, {"Host": host, **JSON})[0] == 403
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert request(server, "/state", {"id": ANN}, {"Host": host, **JSON})[0] == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert request(server, "/ask", {"id": ANN, "text": "x"}, {"Content-Type": kind})[0] == 403
    assert server.server_address[0] == "127.0.0.1" and not (tmp_path / "thumbs.jsonl").exists()


def test_bodies_that_are_none(server):
    for body in ("", "{", "3", "[]", b"\xff", "[" * 50_000, "{}", '{"id": 3}', '{"id": "../../x"}'):
        assert request(server, "/state", body)[0] == 400, body
    long = {"id": ANN, "text": "x" * page.LONGEST}
    assert request(server, "/ask", long)[0] == 413
    for length in ("-1", "x", ""):
        assert request(server, "/state", "{}", JSON | {"Content-Length": length})[0] == 413
    for text in (None, 3, "", " \n", "\ud800"):
        assert refusal(server, "/ask", text=text)[0] == 400
    assert texts(post(server, "/state")[0]) == []


# ---------------------------------------------------------------------------- talking and judging


def test_two_browsers_talk(server):
    state, parts = post(server, "/ask", text="Hi")
    assert "".join(part["text"] for part in parts) == state["turns"][1]["text"]
    assert [turn["role"] for turn in state["turns"]] == ["user", "assistant"] and not state["busy"]
    assert texts(post(server, "/ask", BEN, text="I am Ben")[0])[0] == "I am Ben"
    assert texts(post(server, "/state")[0])[0] == "Hi"
    assert len(texts(post(server, "/ask", text="So?")[0])) == 4
    state, _ = post(server, "/ask", text="New", anew=True)
    assert [turn["anew"] for turn in state["turns"]] == [True, False, False, False, True, False]
    assert len(server.talk(ANN).prompt(5)) == 1  # what came before is not read any more
    assert post(server, "/undo")[1] == [{"text": "New"}]
    assert [len(post(server, "/state", who)[0]["turns"]) for who in (ANN, BEN)] == [4, 2]


def test_thumbs(server, tmp_path):
    post(server, "/ask", text="Hi")
    state, _ = post(server, "/ask", text="So?")
    reply = server.talk(ANN).turns[3]
    for label in (True, False, True):  # the last word counts
        state, _ = post(server, "/thumb", place=3, label=label)
        (row,) = read_rows(tmp_path / "thumbs.jsonl")
        assert row["label"] is label is state["turns"][3]["label"]
        assert row["completion"] == [reply] and row["prompt"] == server.talk(ANN).turns[:3]
    assert (state["up"], state["down"]) == (1, 0) and row["model"] == server.args.directory
    post(server, "/thumb", place=1, label=False)
    assert [r["label"] for r in read_rows(tmp_path / "thumbs.jsonl")] == [True, False]
    state, _ = post(server, "/thumb", place=1, label=None)
    assert len(read_rows(tmp_path / "thumbs.jsonl")) == 1 and state["turns"][1]["label"] is None
    for place in (0, 2, 4, -1, 1.0, "1", None, True):
        assert refusal(server, "/thumb", place=place, label=True)[0] == 400
    for label in (1, "true", "up"):
        assert refusal(server, "/thumb", place=1, label=label)[0] == 400
    # a browser says what it likes of turns and prompts: the row is the server's
    post(server, "/thumb", place=1, label=True, prompt="x", completion="y", turns=[], model="z")
    assert "x" not in read_rows(tmp_path / "thumbs.jsonl")[-1].values()
    post(server, "/undo")
    assert len(read_rows(tmp_path / "thumbs.jsonl")) == 1  # its thumb goes with a reply


def test_choices(server, tmp_path, monkeypatch):
    assert refusal(server, "/choose", better=0)[0] == 409
    replies = iter(["One.", "Two.", "Same.", "Same."])
    monkeypatch.setattr(page, "reply", lambda server, talk, send: next(replies))
    state, _ = post(server, "/ask", text="Hi", two=True)
    assert [r["text"] for r in state["offer"]["replies"]] == ["One.", "Two."]
    assert texts(state) == ["Hi", "One."] and not state["offer"]["judged"]
    for better in (True, 2, "0", 0.5):
        assert refusal(server, "/choose", better=better)[0] == 400
    for better, goes_on in ((1, "Two."), (0, "One."), (1, "Two.")):
        state, _ = post(server, "/choose", better=better)
        (row,) = read_rows(tmp_path / "thumbs.pairs.jsonl")
        assert row["chosen"][0]["content"] == goes_on == texts(state)[1]
        assert state["offer"]["better"] == better and state["choices"] == 1
    state, _ = post(server, "/choose", better=None)
    assert not read_rows(tmp_path / "thumbs.pairs.jsonl") and state["offer"]["judged"]
    state, parts = post(server, "/ask", text="So?", two=True)
    assert parts == [{"note": "both replies are the same"}] and state["offer"] is None
    assert refusal(server, "/choose", better=0)[0] == 409


def test_thoughts_and_hostile_words_come_as_they_are(server, monkeypatch):
    evil = "<img src=x onerror=alert(1)>\u2028</script>"
    said = f"<think>\n{evil}\n</think>\n\n{evil}"
    monkeypatch.setattr(page, "reply", lambda server, talk, send: said)
    state, _ = post(server, "/ask", text=evil)
    assert texts(state) == [evil, evil] and state["turns"][1]["thought"] == evil


def test_a_reply_that_still_comes_is_not_judged(server, monkeypatch):
    """Nor is another asked for, or anything taken back; other browsers wait or go on."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(server, talk, send):
        begun.set()
        go_on.wait(60)
        return "Late."

    post(server, "/ask", text="Hi")
    monkeypatch.setattr(page, "reply", slow)
    asking = threading.Thread(target=post, args=[server, "/ask"], kwargs={"text": "So?"})
    asking.start()
    begun.wait(60)
    try:
        for path, body in (
            ("/thumb", {"place": 1, "label": True}), ("/ask", {"text": "x"}), ("/undo", {}),
            ("/reset", {}), ("/choose", {"better": 0}),
        ):  # fmt: skip
            assert refusal(server, path, **body)[0] == 409
        assert post(server, "/state")[0]["busy"] and not post(server, "/state", BEN)[0]["busy"]
    finally:
        go_on.set()
        asking.join()
    assert texts(post(server, "/state")[0])[3] == "Late."


def test_stop_and_a_closed_tab_end_a_reply(server):
    talk = server.talk(ANN)
    sender = page.Sender(None, talk, lambda text: None)
    sender.on_finalized_text("a")
    talk.stop = True
    with pytest.raises(Stopped):
        sender.on_finalized_text("b")
    assert sender.reply == "ab"

    server.args.max_new_tokens = 300
    for end in ("stop", "close"):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.request(
            "POST", "/ask", json.dumps({"id": ANN, "text": "Hi", "anew": True}), JSON
        )
        answer = connection.getresponse()
        answer.readline()
        if end == "stop":
            assert post(server, "/stop")[0]["busy"] in (True, False)
            answer.read()
        connection.close()
        answer.close()
        while (state := post(server, "/state")[0])["busy"]:
            time.sleep(0.01)
        assert len(texts(state)[-1]) < 300 and state["turns"][-1]["role"] == "assistant"


def test_many_conversations(server, monkeypatch):
    monkeypatch.setattr(page, "CONVERSATIONS", 3)
    for i in range(5):
        post(server, "/state", f"{i:08}")
    assert list(server.talks) == [f"{i:08}" for i in (2, 3, 4)]


def test_what_is_too_long_is_said(server, monkeypatch):
    def refuse(server, talk, send):
        raise InputError("a prompt of 999 tokens: the model has 512 positions")

    monkeypatch.setattr(page, "reply", refuse)
    assert refusal(server, "/ask", text="Hi") == (
        400,
        "a prompt of 999 tokens: the model has 512 positions",
    )
    state, _ = post(server, "/state")
    assert texts(state) == [] and not state["busy"]


# --------------------------------------------------------------------------------------- training


def thumbs(path, prompts=24):
    rows = []
    for i in range(26):
        asked = [{"role": "user", "content": f"What is {i % prompts}?"}]
        replied = [{"role": "assistant", "content": "Yes." * (i % 3 + 1)}]
        rows.append(dict(model="m", prompt=asked, completion=replied, label=i % 2 == 0, time=""))
    return write_rows(path, rows)


def wait_for(server):
    while (state := post(server, "/state")[0])["training"]["runs"]:
        time.sleep(0.2)
    return state


def test_training_is_asked_for_as_it_can_be_done(server, tmp_path):
    fits = dict(method="kto", rate=1e-3, epochs=2)
    assert refusal(server, "/train", **fits) == (409, "0 of 24 judgements")
    for wrong in (dict(method="sft"), dict(rate=0), dict(rate="1; rm"), dict(epochs=True),
                  dict(epochs=1e9), dict(rate=None), dict(rate=-1)):  # fmt: skip
        assert refusal(server, "/train", **fits | wrong)[0] == 400
    assert server.training is None and not list(tmp_path.glob("run-*"))


def test_held_out():
    rows = [dict(label=i % 3 > 0, prompt=i) for i in range(40)]
    kept = held_out("kto", rows)
    assert [row["label"] for row in kept] == [True] * 4 + [False] * 4
    assert kept == held_out("kto", rows) and kept != rows[:8]
    assert len(held_out("kto", [dict(label=True, prompt=i) for i in range(9)] + rows[:1])) == 4
    assert [len(held_out("dpo", rows[:n])) for n in (16, 40)] == [4, 8]


def test_it_learns_and_shows_what_changed(server, tmp_path):
    thumbs(tmp_path / "thumbs.jsonl")
    state, _ = post(server, "/train", method="kto", rate=1e-2, epochs=4)
    assert state["training"]["name"] == "run-1" and state["training"]["steps"] == 8
    assert refusal(server, "/train", method="kto", rate=1e-2, epochs=4)[0] == 409
    state = wait_for(server)
    run = state["training"]
    assert not run["failure"] and state["ready"] and state["trained"] == "run-1"
    assert [p["step"] for p in run["points"]] == list(range(1, 9))
    assert all(p["loss"] > 0 and p["margin"] is not None for p in run["points"])
    assert run["before"]["of"] == run["after"]["of"] == 16
    held = read_rows(tmp_path / "run-1.test.jsonl")
    trained = read_rows(tmp_path / "run-1.train.jsonl")
    assert len(held) == 8 and not {r["prompt"][0]["content"] for r in held} & {
        r["prompt"][0]["content"] for r in trained
    }
    assert len((tmp_path / "thumbs.jsonl").read_bytes().splitlines()) == 26

    server.args.temperature = 0  # the model of before is the model, and the new one is another
    new, base = (writer for writer, _ in server.writers())

    def greedy(policy, writer):
        server.policy = policy
        with writer():
            return page.reply(server, server.talk(BEN), lambda text: None)

    after, name = server.policy, str(tmp_path / "run-1")
    post(server, "/ask", BEN, text="What is 3?")
    before = greedy(chat.open_trained(server.args, None), nullcontext)
    assert greedy(after, base) == before != greedy(after, new)
    assert state["votes"] == "0 of 20 votes; the count comes after the last"
    for _ in range(20):
        post(server, "/ask", text="What is 3?", two=True, anew=True)
        better = server.talk(ANN).offer.models.index(name)
        state, _ = post(server, "/choose", better=better)
        assert not state["votes"].startswith("run-1") or len(server.votes) == 20
    assert state["votes"] == "run-1 wins 20 of 20 (95 %: 84% to 100%): more than chance"
    assert {row["model"] for row in read_rows(tmp_path / "thumbs.pairs.jsonl")} == {name}


def test_choices_are_ranked_too(server, policy, tmp_path):
    """Against the log-probs of each reply by itself, which KTO's way gives."""
    rows = []
    for i in range(16):
        asked = [{"role": "user", "content": f"What is {i}?"}]
        replies = [{"role": "assistant", "content": text} for text in ("Yes." * (i % 3 + 1), "No")]
        rows.append(dict(prompt=asked, chosen=replies[:1], rejected=replies[1:], model="m"))
    training = page.Training(server.args, "dpo", rows, 1e-3, 1)
    found = page.ranking(policy, training)
    assert found["of"] == len(held := read_rows(training.test)) == 4 and training.steps == 2

    def logp(row, name):
        thumb = dict(prompt=row["prompt"], completion=row[name], label=True)
        write_rows(training.test, [thumb])
        examples, _ = read_examples(
            [str(training.test)], KTO, policy.tokenizer, policy.template, Limits(), notes=[]
        )
        return policy(examples).logps.item()

    assert found["right"] == sum(logp(row, "chosen") > logp(row, "rejected") for row in held)


def test_what_the_script_refuses_is_shown(server, tmp_path):
    thumbs(tmp_path / "thumbs.jsonl", prompts=2)
    (tmp_path / "run-7").mkdir()  # numbers go on
    post(server, "/train", method="kto", rate=1e-2, epochs=1)
    state = wait_for(server)
    assert state["training"]["name"] == "run-8" and state["ready"] and state["trained"] is None
    assert state["training"]["failure"].startswith("train_kto.py: error: "), state["training"]
    assert len(texts(post(server, "/ask", text="Hi")[0])) == 2  # and the model is there again


def test_a_run_that_went_on_from_an_adapter(model_dir, tmp_path):
    """Beside it stands the adapter, and not the base."""
    parts = {}
    for name, start in (("first", None), ("second", tmp_path / "first")):
        base = {"adapter_name_or_path": str(start)} if start else {"model_name_or_path": model_dir}
        policy = load_policy(SFTConfig(**base, device="cpu"))
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        save_policy(policy, tmp_path / name)
        parts[name] = policy
    args = flags(tmp_path / "first", tmp_path)
    both = chat.open_trained(args, str(tmp_path / "second"))
    example = Example(array("i", [1, 2, 3]), [(array("i", [4, 5, 6]), b"\1\1\1")])

    def logp(policy):
        return policy.lm.eval()([example]).logps.item()

    assert logp(both) == logp(parts["second"])
    with both.reference():
        assert logp(both) == logp(parts["first"]) != logp(parts["second"])
    assert logp(chat.open_trained(args, None)) == logp(parts["first"])


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_its_end_stops_training_with_a_checkpoint(number, model_dir, tmp_path):
    thumbs(tmp_path / "thumbs.jsonl")
    words = ["--web", "--port", "0", "--device", "cpu", "--feedback", tmp_path / "thumbs.jsonl"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanoalign.chat", model_dir, *map(str, words)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    line = next(line for line in process.stdout if line.startswith("http"))
    server = Namespace(server_port=int(line.split()[0].rpartition(":")[2]))
    post(server, "/train", method="kto", rate=1e-3, epochs=1000)
    while not post(server, "/state")[0]["training"]["points"]:
        time.sleep(0.2)
    process.send_signal(number)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and said.endswith("ended\n"), errors
    (left,) = (tmp_path / "run-1").glob("checkpoint-*")
    assert "stopped after step" in (tmp_path / "run-1.log").read_text()
    for path in (tmp_path / "run-1").glob("*.lock"):
        assert not path.exists()


def test_the_port_is_looked_at_before_a_model_is_read(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port, file = taken.getsockname()[1], tmp_path / "t.jsonl"
        for given, why in ((port, "Address already in use"), (70000, ""), (-1, "")):
            with pytest.raises(SystemExit) as stop:
                chat.main(["nowhere", "--web", f"--port={given}", f"--feedback={file}"])
            said = capsys.readouterr().err
            assert stop.value.code == 2 and said.startswith(f"chat: error: --port {given}: ")
            assert why in said and said.count("\n") == 1


def test_without_a_model_it_is_the_built_in_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        chat.main(["--web", "--port=0"])
    assert "run train_sft.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        chat.main(["--prompt", "Hi"])
    assert "give a model or an adapter" in capsys.readouterr().err

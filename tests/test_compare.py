"""Which model is better: the statistics against other ways to them, and models that are known."""

import itertools
import json
import math
import shutil

import pytest
import torch
from conftest import make_tokenizer, tiny
from scripts import argv, command, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nanoalign import InputError
from nanoalign.tools import compare, thumbs
from nanoalign.tools.compare import ballots, difference, mcnemar, outcome, share
from nanoalign.tools.thumbs import verdict, wilson

# ------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("wins, n", [(0, 1), (1, 1), (52, 100), (0, 20), (7, 9), (600, 1000)])
def test_wilsons_interval_ends_where_the_wins_would_surprise(wins, n):
    low, high = wilson(wins, n)
    assert 0 <= low <= wins / n <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            far = abs(wins / n - p)
            assert math.isclose(far, 1.959964 * math.sqrt(p * (1 - p) / n), rel_tol=1e-5)


def test_wilsons_interval_holds_the_truth_19_times_in_20():
    n, p = 60, 0.3
    chance = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    held = sum(c for k, c in enumerate(chance) if wilson(k, n)[0] <= p <= wilson(k, n)[1])
    assert 0.93 < held < 0.97


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (1, 0), (3, 3), (2, 7), (9, 1), (0, 8)])
def test_mcnemar_counts_the_throws_of_a_coin(only_a, only_b):
    """Of all 2^n ways in which n coins fall, those that are at least as lopsided."""
    n = only_a + only_b
    throws = [sum(throw) for throw in itertools.product((0, 1), repeat=n)]
    as_far = [t for t in throws if abs(t - n / 2) >= abs(only_a - n / 2)]
    assert math.isclose(mcnemar(only_a, only_b), len(as_far) / len(throws))


def test_mcnemar_on_many_pairs():
    """Beside the usual approximation, with its correction for continuity."""
    a, b = 4000, 4200
    chi = (abs(a - b) - 1) / math.sqrt(a + b)
    assert math.isclose(mcnemar(a, b), math.erfc(chi / math.sqrt(2)), rel_tol=1e-3)


def test_differences_are_taken_pair_by_pair():
    a = [True, True, False, False, False, False]
    b = [True, True, True, True, False, False]
    found = difference(a, b)
    assert found["difference"] == pytest.approx(1 / 3)
    assert (found["only the first"], found["only the second"]) == (0, 2) and found["p"] == 0.5
    steps = torch.tensor([0.0, 0, 1, 1, 0, 0])
    assert found["standard error"] == pytest.approx(steps.std().item() / 6**0.5)
    assert difference(a, a) | {"only the first": 0, "only the second": 0} == {
        "difference": 0, "standard error": 0, "only the first": 0, "only the second": 0, "p": 1,
    }  # fmt: skip
    assert difference([True], [False])["standard error"] is None


def test_shares_controlled_for_length():
    """Right whenever the chosen reply is longer: 3 of 4, controlled one half."""
    longer = [1, 1, 1, -1, 0]
    found = share([True, True, True, False, False], longer)
    assert found["share"] == 0.6 and found["controlled for length"] == 0.5
    assert (found["where chosen is longer"], found["where chosen is shorter"]) == (1, 0)
    assert share([True, True], [1, 0])["controlled for length"] is None


def test_what_votes_say():
    assert verdict(52, 100) == (
        "52 of 100 (95 %: 42% to 62%): it may be chance; at this rate about 2,400 votes would tell"
    )
    assert verdict(65, 100) == "65 of 100 (95 %: 55% to 74%): more than chance"
    assert verdict(2, 20) == "2 of 20 (95 %: 3% to 30%): less than chance"
    assert verdict(5, 10).endswith("at this rate more votes would not tell")
    assert verdict(0, 0) == "no votes"
    for wins, n in itertools.product(range(1, 60), range(60, 64)):  # and it is right about it
        said = verdict(wins, n)
        if "about" in said:
            needed = int(said.split("about ")[1].split(" votes")[0].replace(",", ""))
            low, high = wilson(wins / n * needed * 1.1, needed * 1.1)
            assert needed > n and (low > 0.5 or high < 0.5), said


# ----------------------------------------------------------------------------------------- models


PAIRS = [(f"What is {i}?", "It is one." * (i % 3 + 1), "No idea" * (i % 4 + 1)) for i in range(9)]


@pytest.fixture(scope="module")
def home(model_dir, tmp_path_factory):
    """Two models, an adapter on the first, and pairs."""
    home = tmp_path_factory.mktemp("compare")
    torch.manual_seed(1)
    LlamaForCausalLM(tiny(LlamaConfig)).save_pretrained(home / "other")
    make_tokenizer().save_pretrained(home / "other")
    shutil.copytree(model_dir, home / "model")
    shutil.copytree(model_dir, home / "copy")
    write_rows(
        home / "pairs.jsonl", [dict(zip(("prompt", "chosen", "rejected"), p)) for p in PAIRS]
    )
    given = dict(
        model_name_or_path="model", dataset_name="pairs.jsonl", output_dir="adapter", device="cpu",
        max_steps=40, learning_rate=0.02,
    )  # fmt: skip
    code, _, errors = command(home, "train_dpo.py", *argv(given))
    assert not code, errors
    return home


def run(home, *words):
    return command(
        home, "-m nanoalign.compare", *words, "--device=cpu", "--dataset_name=pairs.jsonl"
    )


def test_models_and_adapters(home):
    code, said, errors = run(home, "model", "other", "adapter", "copy", "--out=all")
    assert not code, errors
    found = json.loads((home / "all/compare.json").read_text())
    assert [m["name"] for m in found["models"]] == ["model", "other", "adapter", "copy"]
    assert found["pairs"] == 9 and found["models"][2]["summed"]["share"] == 1  # it learned them
    assert found["models"][0] == found["models"][3] | {"name": "model"}
    (same,) = [d for d in found["differences"] if (d["first"], d["second"]) == (0, 3)][:1]
    assert same["difference"] == same["standard error"] == 0 and same["p"] == 1
    assert len(found["differences"]) == 2 * 6
    assert "adapter was trained on this file: its share says little" in said
    assert "model was trained" not in said and "adapter - model, per token: +" in said
    assert (home / "all/compare.png").stat().st_size < 150_000


def test_shares_are_those_of_transformers_log_probs(home):
    run(home, "model", "other", "--out=two")
    found = json.loads((home / "two/compare.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    for place, name in enumerate(("model", "other")):
        model, right, longer = AutoModelForCausalLM.from_pretrained(home / name), [], []
        for prompt, *replies in PAIRS:
            logps = []
            for reply in replies:
                head = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
                start = tokenizer(head, return_tensors="pt").input_ids
                ids = tokenizer(head + reply + "<|im_end|>", return_tensors="pt").input_ids
                logits = model(ids).logits[0, start.shape[1] - 1 : -1].log_softmax(-1)
                own = logits.gather(1, ids[0, start.shape[1] :, None])
                logps.append((own.sum().item(), len(own)))
            (a, m), (b, n) = logps
            right.append((a > b, a / m > b / n))
            longer.append((m > n) - (m < n))
        for measure, own in zip(("summed", "per token"), zip(*right)):
            assert found["models"][place][measure] == share(list(own), longer)
    assert found["the longer wins"]["share"] == longer.count(1) / 9
    assert found["the shorter wins"]["share"] == longer.count(-1) / 9


def test_held_out_rows_are_those_that_training_held_out(home):
    code, said, errors = run(home, "model", "other", "--eval_fraction=0.4", "--out=part")
    assert not code and "4 examples held out" in said, errors
    assert json.loads((home / "part/compare.json").read_text())["pairs"] == 4


def test_pairs_that_one_model_can_not_read_are_nobodys():
    one, two = {"a": ((0, 1), (1, 1)), "b": ((1, 1), (0, 2))}, {"b": ((1, 1), (2, 1))}
    found = compare.judge([one, two])
    assert found["pairs"] == 1 and found["models"][0]["summed"]["share"] == 1
    with pytest.raises(InputError, match="no pair is left"):
        compare.judge([one, {}])


@pytest.mark.parametrize(
    "words, fault",
    [
        (["model"], "expected two models or more"),
        (["model", "./none"], "./none: no such directory"),
        (["model", "other", "--generate=-1"], "--generate -1: must not be negative"),
        (["model", "other", "--temperature=nan"], "--temperature nan: must not be negative"),
        (["model", "other", "--out=pairs.jsonl"], "pairs.jsonl: not saved: File exists"),
    ],
)
def test_bad_words(words, fault, home):
    code, _, errors = run(home, *words)
    *_, last = errors.splitlines()  # before it, what loading said
    assert code == 2 and last.startswith(f"compare: error: {fault}")


# ------------------------------------------------------------------------------------------ votes


def test_replies_and_blind_votes(home, monkeypatch, capsys):
    words = "--generate=5", "--max_new_tokens=6", "--out=votes"
    code, said, errors = run(home, "model", "other", "copy", *words)
    assert not code, errors
    rows = thumbs.read_rows(home / "votes/replies.jsonl")
    assert [r["prompt"][0]["content"] for r in rows] == [p for p, *_ in PAIRS[:5]]
    assert all(r["replies"][0] == r["replies"][2] != r["replies"][1] for r in rows)
    asked = ballots(rows)
    assert len(asked) == 10 and "10 votes: python -m nanoalign.compare vote votes" in said
    assert {frozenset(pair) for _, *pair in asked} == {frozenset((0, 1)), frozenset((1, 2))}

    def answers(*words):
        given = iter(words)
        monkeypatch.setattr("builtins.input", lambda prompt: next(given))
        monkeypatch.chdir(home)
        compare.main(["vote", "votes"])
        return capsys.readouterr().out

    said = answers("b", "nonsense", "tie", "")
    assert "2 of 10 votes; the count comes after the last" in said and "beats" not in said
    assert "other" not in said and "copy" not in said  # blind
    for row, a, b in asked[:2]:
        assert said.index(f"[A] {row['replies'][a]}") < said.index(f"[B] {row['replies'][b]}")
    other = ["a" if a == 1 else "b" for _, a, _ in asked[2:]]  # it wins all that are left
    said = answers(*other)
    assert said.count("other beats model in") == 1 and said.count("1 for neither") == 1
    votes = thumbs.read_rows(home / "votes/votes.jsonl")
    assert len(votes) == 10 and answers() == "\n".join(outcome(asked, votes)) + "\n"
    run(home, "model", "other", *words)
    assert not (home / "votes/votes.jsonl").exists()  # on other replies


def test_damaged_replies(tmp_path, capsys):
    for text in ('{"prompt": 3}\n', "[]\n", "3\n", "{\n"):
        (tmp_path / "replies.jsonl").write_text(text)
        with pytest.raises(SystemExit):
            compare.main(["vote", str(tmp_path)])
        said = capsys.readouterr().err
        assert said.startswith(f"compare: error: {tmp_path}") and said.count("\n") == 1

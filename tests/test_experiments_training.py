"""The arithmetic that the experiments with preferences and rates rest on."""

import math
import random

import pytest
import torch

from experiments import chosen_falls, forgetting, kto_imbalance, lab, length_bias, lora_rate
from nanoalign import world


@pytest.fixture
def tiny_world(tmp_path, monkeypatch):
    """A world of a few questions, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(world, "EACH", 8)
    monkeypatch.setattr(world, "HELD_OUT", 2)


def test_mistakes_are_of_the_same_kind_and_wrong():
    rng = random.Random(0)
    for kind in world.questions(random.Random(1)).values():
        for _, answer, sentence in kind[0]:
            other = chosen_falls.wrong(answer, rng)
            assert other != answer and len(other.split()) == len(answer.split())
            changed = chosen_falls.mistaken(sentence, answer, other)
            assert changed != sentence and changed.endswith(f" {other}.")
            assert changed.removesuffix(f"{other}.") == sentence.removesuffix(f"{answer}.")


def test_thumbs():
    rows = [{"prompt": str(i), "chosen": "up", "rejected": "down"} for i in range(100)]
    for every, one_reply, ups, downs in ((1, False, 100, 100), (10, False, 10, 100)):
        labels = [row["label"] for row in kto_imbalance.thumbs(rows, every, one_reply)]
        assert (labels.count(True), labels.count(False)) == (ups, downs)
    single = kto_imbalance.thumbs(rows, one_reply=True)
    assert [row["prompt"] for row in single] == [str(i) for i in range(100)]
    assert sum(row["label"] for row in single) == 50
    assert all((row["completion"] == "up") == row["label"] for row in single)


def test_z0_of_steps():
    """Of log-ratios -1 and 1 a step of one has z0 0 or 1, one of many about 0: by the half-normal
    mean, sqrt(1 / (2 pi n)) nats."""
    ratios = torch.tensor([-1.0, 1.0] * 50)
    assert kto_imbalance.z0_of_steps(ratios, 1) == pytest.approx((0.5, 0.5), abs=0.03)
    expected = (1 / (2 * math.pi * 64)) ** 0.5
    assert kto_imbalance.z0_of_steps(ratios, 64)[0] == pytest.approx(expected, rel=0.1)


def test_lora_plus_gives_b_its_rate(tiny_world):
    """After one step of Adam, whose first step is as long as its rate, B is 16 times as far."""
    start, one = lab.sft_model(small=True), (["Say so."], ["So."])
    far = {}
    for plus in (False, True):
        policy = lora_rate.sft(start, *one, steps=1, rate=1e-4, rank=2, plus=plus)
        [layer, *_] = [m for m in policy.lm.modules() if hasattr(m, "lora_A")]
        far[plus] = layer.lora_B.weight.abs().median().item()
    assert far[True] == pytest.approx(16 * far[False], rel=1e-3)
    assert far[False] == pytest.approx(1e-4, rel=1e-3)


def test_the_right_reply_always_wins_and_length_mostly():
    asked = world.questions(random.Random(1))
    rows = [dict(prompt=q, chosen=b, rejected=a) for kind in asked.values() for q, a, b in kind[1]]
    mixed = length_bias.mixed(rows, random.Random(0))
    longer = 0
    for row, pair in zip(rows, mixed):
        right = row["chosen"], row["rejected"]
        assert pair["chosen"] in right and pair["rejected"] not in right
        longer += len(pair["chosen"]) > len(pair["rejected"])
    assert longer == 0.8 * len(rows)


def test_forgetting_ranks_and_right_answers(tiny_world):
    """Spearman's correlation by hand, 1 - 6 * 2 / (4 * 15), whatever the distances are. A right
    answer in either style has the sum of their probabilities."""
    assert forgetting.spearman([1, 2, 3, 4], [0.1, 0.5, 0.3, 99]) == pytest.approx(0.8)
    policy = lab.load(lab.sft_model(small=True))
    asked = lab.pairs("test")[:3]
    prompts = [row["question"] for row in asked]
    terse, long = (lab.logps(policy, prompts, [r[k] for r in asked]) for k in ("terse", "sentence"))
    assert forgetting.log_right(policy, asked).exp().tolist() == pytest.approx(
        (terse.exp() + long.exp()).tolist()
    )

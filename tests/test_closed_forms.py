"""Each loss, minimised over a table of replies, lands on the optimum that it has on paper.

The policy is a softmax over a few replies and can take any probabilities, so nothing stands between
a loss and its optimum. A loss that was trained as another one, or that lost one of its numbers on
the way, lands elsewhere.
"""

from math import exp, log, sqrt

import pytest
import torch

from nanoalign.losses import DPO_LOSSES, KTO_LOSSES, dpo_loss, kto_loss

REFERENCE = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)  # the probabilities of three replies
LOG_REF = REFERENCE.log()
LENGTHS = torch.tensor([4, 2, 5])
WINS = 0.8  # the share of the pairs that prefer reply 0 to reply 1; no pair has reply 2
BETA = 0.7


def minimised(loss, replies=3):
    """The log-probs at which `loss` of them is lowest, and how low it is."""
    logits = LOG_REF[:replies].clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=300, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-10, tolerance_change=1e-12)  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    logps = logits.detach().log_softmax(0)
    return logps, loss(logps).item()


def dpo(loss_type, wins=WINS, lengths=LENGTHS, replies=3, beta=BETA, **numbers):
    weights = torch.tensor([wins, 1 - wins], dtype=torch.float64)
    chosen, rejected = torch.tensor([0, 1]), torch.tensor([1, 0])

    def loss(logps):
        columns = logps, LOG_REF, lengths
        columns = [column[side] for column in columns for side in (chosen, rejected)]
        return weights @ dpo_loss(*columns, beta=beta, loss_type=loss_type, **numbers)[0]

    return minimised(loss, replies)


def margin(logps, lengths=1, reference=LOG_REF):
    """Log-ratio of reply 0 minus that of reply 1, per token if lengths are given."""
    first, second, _ = (logps - reference) / lengths
    return (first - second).item()


def logit(p):
    return log(p / (1 - p))


def near(value):
    return pytest.approx(value, abs=1e-4)


def sigmoid():
    """DPO, eq. 4: the reference times exp(reward / beta); the Bradley-Terry reward is logit(WINS).
    Smoothing by e is a share of WINS (1 - e) + (1 - WINS) e."""
    assert margin(dpo("sigmoid")[0]) == near(logit(WINS) / BETA)
    smoothed = WINS * 0.9 + (1 - WINS) * 0.1
    assert margin(dpo("sigmoid", label_smoothing=0.1)[0]) == near(logit(smoothed) / BETA)
    certain = dpo("sigmoid", wins=1.0, label_smoothing=0.1)[0]
    assert margin(certain) == near(logit(0.9) / BETA)


def robust():
    """DPO's optimum on the labels before a share e of them was flipped, so that their true share
    makes WINS = true (1 - e) + (1 - true) e."""
    true = (WINS - 0.1) / (1 - 2 * 0.1)
    assert margin(dpo("robust", label_smoothing=0.1)[0]) == near(logit(true) / BETA)


def ipo():
    """The mean of the pairs' aims, 1 / (2 beta) for WINS and -1 / (2 beta) for the rest."""
    aim = (2 * WINS - 1) / (2 * BETA)
    assert margin(dpo("ipo")[0], LENGTHS) == near(aim)
    assert margin(dpo("ipo", lengths=torch.ones(3))[0]) == near(aim)


def hinge():
    """The kink at a margin of rewards of 1, whatever the share of the majority."""
    for wins in (WINS, 0.6):
        assert margin(dpo("hinge", wins)[0]) == pytest.approx(1 / BETA, abs=0.02)


def sigmoid_norm():
    """DPO's optimum, of the margin per token."""
    assert margin(dpo("sigmoid_norm")[0], LENGTHS) == near(logit(WINS) / BETA)


def apo_zero():
    """Its expectation is 1 - (2 WINS - 1) (sigmoid(beta d0) - sigmoid(beta d1)): no optimum short
    of certainty of reply 0, where d0 = -log of its reference, as with KTO."""
    logps, loss = dpo("apo_zero")
    best = 1 / (1 + REFERENCE[0].item() ** BETA)  # sigmoid(beta d0)
    assert logps[0].exp() > 0.99 and loss == pytest.approx(1 - (2 * WINS - 1) * best, abs=0.01)


def apo_down():
    """Both replies down and the rejected one further: the mass flees to reply 2, of which no pair
    has said anything, and 1 - WINS is what is left of the loss."""
    logps, loss = dpo("apo_down")
    assert logps[2].exp() > 0.99 and loss == pytest.approx(1 - WINS, abs=0.02)


def simpo():
    """No reference; with x = exp(beta margin) and g = exp(-gamma), the loss is lowest where
    (1 - WINS) g x^2 - (2 WINS - 1) x - WINS g = 0."""
    for gamma in (0.0, 0.5):
        g, d = exp(-gamma), 2 * WINS - 1
        x = (d + sqrt(d * d + 4 * WINS * (1 - WINS) * g * g)) / (2 * (1 - WINS) * g)
        found = margin(dpo("simpo", simpo_gamma=gamma)[0], LENGTHS, reference=0)
        assert found == near(log(x) / BETA)


def orpo():
    """Of two replies of one token, p = sigmoid(u) has log-odds of 2 u over the other, so the loss
    is lowest where p - wins + 2 beta (sigmoid(2 u) - wins) = 0: at p = 2/3 for these wins."""
    wins = (2 / 3 + 2 * BETA * 4 / 5) / (1 + 2 * BETA)
    logps, _ = dpo("orpo", wins, lengths=torch.ones(3), replies=2)
    assert logps[0].exp().item() == near(2 / 3)


FORMS = {f.__name__: f for f in (sigmoid, robust, ipo, hinge, sigmoid_norm, apo_zero, apo_down)}
FORMS |= {f.__name__: f for f in (simpo, orpo)}


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_dpo(loss_type):
    FORMS[loss_type]()  # a new loss needs its form here


@pytest.mark.parametrize("loss_type, z0", [("kto", 0.0), ("kto", 0.4), ("apo_zero_unpaired", 0.4)])
def test_kto(loss_type, z0):
    """At beta = 1, sigmoid(log(p / reference) - z0) = p / (p + c), c = reference exp(z0). Let n be
    the weight of a reply's thumbs up, less that of its thumbs down. The loss is lowest where the
    sum of n p / (p + c) is highest: p = 0 where n < 0, and p + c in proportion to sqrt(n c)
    elsewhere. `apo_zero_unpaired` has no z0."""
    up, down = torch.tensor([[0.3, 0.25, 0.05], [0.1, 0.05, 0.25]], dtype=torch.float64)
    weights = dict(desirable_weight=1.5, undesirable_weight=0.8)

    def loss(logps):
        sides = (up, torch.ones(3, dtype=torch.bool)), (down, torch.zeros(3, dtype=torch.bool))
        how = dict(z0=torch.tensor(z0), beta=1.0, loss_type=loss_type, **weights)
        return sum(n @ kto_loss(logps, LOG_REF, label, **how)[0] for n, label in sides)

    n = 1.5 * up - 0.8 * down
    assert (n > 0).tolist() == [True, True, False]
    c = REFERENCE * exp(z0 if loss_type == "kto" else 0)
    n, c = n[:2], c[:2]
    best = (n * c).sqrt() * (1 + c.sum()) / (n * c).sqrt().sum() - c
    found = minimised(loss)[0].exp()
    assert found.tolist() == pytest.approx([*best.tolist(), 0], abs=1e-3)
    assert {"kto", "apo_zero_unpaired"} == KTO_LOSSES.keys()  # a new one needs its form here

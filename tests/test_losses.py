"""The losses by hand: each number is worked out in the comment beside it."""

import math
from types import SimpleNamespace

import pytest
import torch

from nanoalign.losses import (
    DPO_LOSSES,
    KTO_LOSSES,
    compares,
    dpo_loss,
    flags_of,
    kl_baseline,
    kto_loss,
    needs,
    sft_loss,
)


def close(got, expected):
    return torch.allclose(got, torch.as_tensor(expected, dtype=got.dtype), atol=1e-5)


def test_sft():
    assert sft_loss(torch.tensor([-2.0, -0.5])).tolist() == [2.0, 0.5]


# --------------------------------------------------------------------------------------- DPO

# log-ratios: chosen -10 - -12 = 2 and -20 - -20 = 0; rejected -16 - -15 = -1 and -21 - -24 = 3
# margins: 2 - -1 = 3 and 0 - 3 = -3; beta = 0.5, so z = 1.5 and -1.5
PAIRS = dict(
    chosen_logps=[-10.0, -20.0],
    rejected_logps=[-16.0, -21.0],
    ref_chosen_logps=[-12.0, -20.0],
    ref_rejected_logps=[-15.0, -24.0],
)
# with sigmoid(1.5) = 0.8175745 and sigmoid(-1.5) = 0.1824255,
# -log sigmoid(1.5) = 0.2014133 and -log sigmoid(-1.5) = 1.7014133


def dpo(**more):
    tensors = {name: torch.tensor(values) for name, values in PAIRS.items()}
    return dpo_loss(**tensors, beta=0.5, **more)


def test_dpo_sigmoid():
    losses, chosen, rejected = dpo()
    assert close(losses, [0.2014133, 1.7014133])
    assert close(chosen, [1.0, 0.0])  # beta * log-ratio: 0.5 * 2, 0.5 * 0
    assert close(rejected, [-0.5, 1.5])  # 0.5 * -1, 0.5 * 3


def test_dpo_with_label_smoothing():
    # 0.9 * 0.2014133 + 0.1 * 1.7014133 = 0.1812720 + 0.1701413; the other way round:
    # 0.9 * 1.7014133 + 0.1 * 0.2014133 = 1.5312720 + 0.0201413
    assert close(dpo(label_smoothing=0.1)[0], [0.3514133, 1.5514133])


def test_robust_dpo():
    # (0.9 * 0.2014133 - 0.1 * 1.7014133) / 0.8 = 0.0111307 / 0.8
    # (0.9 * 1.7014133 - 0.1 * 0.2014133) / 0.8 = 1.5111307 / 0.8
    assert close(dpo(loss_type="robust", label_smoothing=0.1)[0], [0.0139133, 1.8889133])
    assert close(dpo(loss_type="robust")[0], [0.2014133, 1.7014133])


def test_robust_dpo_is_unbiased_under_flipped_labels():
    """Seen the right way round with probability 0.9, it is the clean loss on average."""
    right, wrong = dpo(loss_type="robust", label_smoothing=0.1)[0]  # margins 3 and -3
    assert close(0.9 * right + 0.1 * wrong, 0.2014133)


def test_ipo_averages_over_tokens():
    # lengths 2 and 5 (chosen), 4 and 3 (rejected): log-ratios per token are
    # 2/2 - -1/4 = 1.25 and 0/5 - 3/3 = -1; 1 / (2 beta) = 1: 0.25^2 and (-2)^2
    lengths = dict(chosen_lengths=torch.tensor([2, 5]), rejected_lengths=torch.tensor([4, 3]))
    assert close(dpo(loss_type="ipo", **lengths)[0], [0.0625, 4.0])
    # without lengths: (3 - 1)^2 and (-3 - 1)^2
    assert close(dpo(loss_type="ipo")[0], [4.0, 16.0])


def test_hinge():
    # 1 - 1.5 < 0, and 1 + 1.5
    assert close(dpo(loss_type="hinge")[0], [0.0, 2.5])


# By hand, and in TRL 1.16's form where that differs (simpo, orpo: trl/experimental/cpo and orpo;
# test_trl.py has the others). Per token, with these lengths: chosen -10/2 = -5 and -20/5 = -4,
# reference -6 and -4; rejected -16/4 = -4 and -21/3 = -7, reference -15/4 = -3.75 and -8.
LENGTHS = dict(chosen_lengths=torch.tensor([2, 5]), rejected_lengths=torch.tensor([4, 3]))
SIGMOID = torch.nn.functional.logsigmoid


def test_sigmoid_norm():
    # log-ratios per token: 1 and 0; -0.25 and 1; margins 1.25 and -1; z = 0.625 and -0.5:
    # -log sigmoid(0.625) = 0.4286943 and -log sigmoid(-0.5) = 0.9740770
    losses = dpo(loss_type="sigmoid_norm", **LENGTHS)[0]
    assert close(losses, [0.4286943, 0.9740770])


def test_apo():
    # log-ratios 2 and 0, -1 and 3. zero: 1 - sigmoid(1) + sigmoid(-0.5) = 0.2689414 + 0.3775407;
    # 1 - sigmoid(0) + sigmoid(1.5) = 0.5 + 0.8175745
    assert close(dpo(loss_type="apo_zero")[0], [0.6464821, 1.3175745])
    # down: sigmoid(1) + 1 - sigmoid(1.5) = 0.7310586 + 0.1824255; 0.5 + 1 - sigmoid(-1.5)
    assert close(dpo(loss_type="apo_down")[0], [0.9134841, 1.3175745])


def test_simpo():
    # per token: -5 - -4 = -1 and -4 - -7 = 3; beta 0.5, gamma 0.2: z = -0.7 and 1.3;
    # -log sigmoid(-0.7) = 1.1031860 and -log sigmoid(1.3) = 0.2410085
    losses, chosen, rejected = dpo_without_reference(loss_type="simpo", simpo_gamma=0.2)
    assert close(losses, [1.1031860, 0.2410085])
    assert close(losses, -SIGMOID(0.5 * (torch.tensor([-1.0, 3.0]) - 0.2 / 0.5)))  # TRL's form
    assert close(chosen, [-2.5, -2.0]) and close(rejected, [-2.0, -3.5])  # 0.5 * log pi per token


def test_orpo():
    # chosen p = e^-5, log odds -5 - log(1 - e^-5) = -4.9932393; rejected -4 - log(1 - e^-4) =
    # -3.9815143: -log sigmoid(-1.0117250) = 1.3218560; 5 + 0.5 * 1.3218560
    losses, chosen, _ = dpo_without_reference(loss_type="orpo")
    assert close(losses[0], 5.6609280)
    chosen_p, rejected_p = torch.tensor([-5.0, -4.0]), torch.tensor([-4.0, -7.0])
    log_odds = (chosen_p - rejected_p) - (log1mexp(chosen_p) - log1mexp(rejected_p))
    assert close(losses, -chosen_p - 0.5 * SIGMOID(log_odds)) and close(chosen, [-2.5, -2.0])


def log1mexp(x):
    return torch.log1p(-x.exp())


def dpo_without_reference(**more):
    tensors = {name: torch.tensor(v) for name, v in PAIRS.items() if "ref" not in name}
    how = dict(ref_chosen_logps=0, ref_rejected_logps=0, beta=0.5)
    return dpo_loss(**tensors, **how, **LENGTHS, **more)


def test_a_loss_gets_its_numbers_and_no_others():
    cfg = SimpleNamespace(beta=0.3, label_smoothing=0.1, simpo_gamma=0.7, rpo_alpha=2.0, seed=1)
    of = {name: flags_of(cfg, loss) for name, loss in DPO_LOSSES.items()}
    assert of["sigmoid"] == of["robust"] == {"beta": 0.3, "label_smoothing": 0.1}
    assert of["ipo"] == of["hinge"] == {"beta": 0.3}
    assert of["simpo"] == {"beta": 0.3, "simpo_gamma": 0.7}
    assert flags_of(cfg, dpo_loss, DPO_LOSSES["hinge"]) == {"beta": 0.3, "rpo_alpha": 2.0}
    with pytest.raises(TypeError, match="label_smoothing"):  # and not dropped without a word
        dpo(loss_type="hinge", label_smoothing=0.1)


def test_rpo_adds_the_chosen_reply_s_own_loss_per_token():
    # 0.2014133 + 2 * 10 / 5 and 1.7014133 + 2 * 20 / 8
    lengths = dict(chosen_lengths=torch.tensor([5, 8]), rejected_lengths=torch.tensor([4, 3]))
    assert close(dpo(rpo_alpha=2.0, **lengths)[0], [4.2014133, 6.7014133])


def test_dpo_starts_at_ln_2():
    """Where the policy is the reference; the other losses at their own numbers."""
    chosen, rejected = torch.tensor([-3.0, -70.0]), torch.tensor([-9.0, -1.0])

    def at_the_start(**more):
        return dpo_loss(chosen, rejected, chosen, rejected, beta=0.1, **more)[0]

    assert close(at_the_start(), [math.log(2)] * 2)
    assert close(at_the_start(label_smoothing=0.3), [math.log(2)] * 2)
    assert close(at_the_start(loss_type="robust", label_smoothing=0.3), [math.log(2)] * 2)
    assert close(at_the_start(loss_type="hinge"), [1.0] * 2)
    assert close(at_the_start(loss_type="ipo"), [25.0] * 2)  # (0 - 1 / 0.2)^2


def test_the_gradient_of_dpo():
    """Equation 7's: beta * sigmoid(-z) on the two log-probs with opposite signs."""
    tensors = {name: torch.tensor(v, requires_grad=True) for name, v in PAIRS.items()}
    losses, chosen, rejected = dpo_loss(**tensors, beta=0.5)
    losses.sum().backward()
    slope = torch.tensor([0.5 * 0.1824255, 0.5 * 0.8175745])  # sigmoid(-1.5), sigmoid(1.5)
    assert close(tensors["chosen_logps"].grad, -slope)
    assert close(tensors["rejected_logps"].grad, slope)


# The chosen reply is at -10,000 and the rejected one at 0, then the other way round; beta is 0.1,
# and both have one token. -> losses, and their slopes by the chosen reply.
FAR = {
    # z = -1000 and 1000: -log sigmoid(z) is -z below zero and 0 above
    "sigmoid": ([1000, 0], [-0.1, 0]),
    "robust": ([1000, 0], [-0.1, 0]),
    "sigmoid_norm": ([1000, 0], [-0.1, 0]),
    "hinge": ([1001, 0], [-0.1, 0]),
    # (m - 5)^2, which pulls back from both sides: slope 2 (m - 5)
    "ipo": ([10_005.0**2, 9_995.0**2], [-20_010, 19_990]),
    # 1 + 1/2 and 1/2 + 0; the slope of 1/2 is -0.1 / 4
    "apo_zero": ([1.5, 0.5], [0, -0.025]),
    # 0 + 1 and 1/2 + 0, which lowers the chosen reply
    "apo_down": ([1.0, 0.5], [0, 0.025]),
    # gamma is 0.5
    "simpo": ([1000.5, 0], [-0.1, 0]),
    # the log-odds of p = 1 - 1e-6, where it is held, are log(1e6) = 13.81551;
    # 10,000 + 0.1 (10,000 + 13.81551), and the chosen reply's own loss
    "orpo": ([11_001.381551, 0], [-1.1, -1]),
}


def test_each_loss_has_its_numbers_far_away():
    """The experiments add a loss of their own to the table."""
    ours = {name for name, f in DPO_LOSSES.items() if f.__module__ == "nanoalign.losses"}
    assert ours == FAR.keys()


@pytest.mark.parametrize("loss_type", FAR)
def test_dpo_far_away(loss_type):
    """Finite, as on paper, and the rewards carry no gradient."""
    chosen = torch.tensor([-1e4, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    own = {"simpo_gamma": 0.5} if loss_type == "simpo" else {}
    losses, *rewards = dpo_loss(chosen, rejected, zero, zero, loss_type=loss_type, **own)
    losses.sum().backward()
    expected, slopes = FAR[loss_type]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert chosen.grad.tolist() == pytest.approx(slopes, rel=1e-6)
    assert rejected.grad.isfinite().all()
    assert [reward.tolist() for reward in rewards] == [[-1000, 0], [0, -1000]]
    assert not any(reward.requires_grad for reward in rewards)


def test_rewards_are_per_token_only_where_there_is_no_reference_and_the_loss_is(monkeypatch):
    """The log-ratios of PAIRS times beta; log pi times beta where there is nothing to compare."""
    _, chosen, rejected = dpo(loss_type="ipo", **LENGTHS)
    assert close(chosen, [1.0, 0.0]) and close(rejected, [-0.5, 1.5])
    monkeypatch.setitem(DPO_LOSSES, "own", lambda policy, beta: -beta * policy.chosen)
    losses, chosen, rejected = dpo_without_reference(loss_type="own")
    assert close(losses, [5.0, 10.0])
    assert close(chosen, [-5.0, -10.0]) and close(rejected, [-8.0, -10.5])


def test_which_losses_compare_with_a_reference():
    """For the others none is loaded."""
    assert {name for name, loss in DPO_LOSSES.items() if not compares(loss)} == {"simpo", "orpo"}
    assert all(map(compares, KTO_LOSSES.values()))


# --------------------------------------------------------------------------------------- KTO

# log-ratios -8 - -10 = 2 and -9 - -8 = -1 and -5 - -5 = 0
LOGPS, REF = torch.tensor([-8.0, -9.0, -5.0]), torch.tensor([-10.0, -8.0, -5.0])
UP, DOWN = torch.tensor([True] * 3), torch.tensor([False] * 3)


def test_kto_desirable():
    # beta = 0.5, z0 = 1: 1 - sigmoid(0.5 * (2 - 1)), (-1 - 1), (0 - 1)
    # = sigmoid(-0.5), sigmoid(1), sigmoid(0.5)
    losses, rewards = kto_loss(LOGPS, REF, UP, torch.tensor(1.0), beta=0.5)
    assert close(losses, [0.3775407, 0.7310586, 0.6224593])
    assert close(rewards, [1.0, -0.5, 0.0])


def test_kto_undesirable():
    # 1 - sigmoid(0.5 * (1 - 2)), (1 - -1), (1 - 0): the complements of the ones above
    losses, rewards = kto_loss(LOGPS, REF, DOWN, torch.tensor(1.0), beta=0.5)
    assert close(losses, [0.6224593, 0.2689414, 0.3775407])
    assert close(rewards, [1.0, -0.5, 0.0])  # a reward knows no label


def test_kto_weights():
    mixed = torch.tensor([True, False, True])
    losses, _ = kto_loss(
        LOGPS, REF, mixed, torch.tensor(1.0), 0.5, desirable_weight=2.0, undesirable_weight=3.0
    )
    # 2 * 0.3775407, 3 * 0.2689414, 2 * 0.6224593
    assert close(losses, [0.7550813, 0.8068243, 1.2449187])


def test_apo_zero_unpaired():
    # the reference point is 0, whatever z0: sigmoid(-0.5 * 2), and for thumbs down sigmoid(0.5 * d)
    mixed = torch.tensor([True, False, False])
    for z0 in (0.0, 7.0):
        losses, _ = kto_loss(LOGPS, REF, mixed, torch.tensor(z0), 0.5, "apo_zero_unpaired")
        assert close(losses, [0.2689414, 0.3775407, 0.5])
    assert [name for name, loss in KTO_LOSSES.items() if "z0" in needs(loss)] == ["kto"]


def test_kto_far_away():
    """By default beta is 0.1 and both weights are 1: the loss is 0 or 1, the reward a tenth."""
    for label, expected in ((True, [1.0, 0.0]), (False, [0.0, 1.0])):
        far, labels = torch.tensor([-1e4, 1e4]), torch.tensor([label] * 2)
        losses, rewards = kto_loss(far, torch.zeros(2), labels, torch.tensor(0.0))
        assert losses.tolist() == expected and rewards.tolist() == [-1000, 1000]


@pytest.mark.parametrize("loss_type", KTO_LOSSES)
def test_kto_starts_at_one_half(loss_type):
    mixed = torch.tensor([True, False, True])
    losses, rewards = kto_loss(LOGPS, LOGPS, mixed, torch.tensor(0.0), 0.1, loss_type)
    assert losses.tolist() == [0.5] * 3 and rewards.tolist() == [0.0] * 3


def test_the_baseline_is_a_mean_held_at_zero():
    # (-8 - -10, -9 - -8, -5 - -5) = (2, -1, 0): mean 1/3; the other way round -1/3
    assert close(kl_baseline(LOGPS, REF), 1 / 3)
    assert kl_baseline(REF, LOGPS).item() == 0.0
    assert kl_baseline(LOGPS, REF).shape == ()


def test_no_gradient_through_z0_and_rewards():
    logps = LOGPS.clone().requires_grad_()
    z0 = kl_baseline(logps, REF)
    assert not z0.requires_grad
    losses, rewards = kto_loss(logps, REF, UP, z0, beta=0.5)
    assert not rewards.requires_grad
    losses.sum().backward()
    # d/d logp of 1 - sigmoid(u) is -beta sigmoid(u) sigmoid(-u), u = 0.5 * (d - 1/3), and no more
    u = 0.5 * (torch.tensor([2.0, -1.0, 0.0]) - 1 / 3)
    assert close(logps.grad, -0.5 * u.sigmoid() * (-u).sigmoid())

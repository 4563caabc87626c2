"""The three losses: pure functions of log-probabilities.

Every method is a function of one quantity, log pi(y | x): the sum of the log-probs of a
completion's trained tokens. The functions take it as (B,) tensors, one entry an example, and return
(B,) losses, not yet averaged, and detached (B,) rewards.

The parameters of a loss say what it needs, and it gets nothing else. A loss of pairs may take

    policy, reference, lengths    a Pair each: log pi, log pi_ref, numbers of trained tokens

a loss of single replies

    delta, sign, z0               log pi - log pi_ref; +1 for thumbs up, -1 for down; kl_baseline's

and both may take flags by their names (run/flags.py). A loss of your own is one more function and
one more entry in DPO_LOSSES or KTO_LOSSES. Then its name is a valid --loss_type.

The reward is beta * (log pi(y | x) - log pi_ref(y | x)): DPO's eq. 5 without a term of the prompt
alone. Without a reference it is beta * log pi(y | x), per token where the loss is (SimPO, eq. 4).
Dozens of variants are published, and few are here: each tuned by itself, they come out nearly alike
(arXiv 2502.01237).
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INPUTS = {"policy", "reference", "lengths", "delta", "sign", "z0"}  # what is no flag


def needs(loss) -> set[str]:  # the names of its parameters
    return set(inspect.signature(loss).parameters)


def compares(loss) -> bool:
    """Does a loss compare the policy with a reference?"""
    return bool(needs(loss) & {"reference", "delta"})


def flags_of(cfg, *functions) -> dict[str, object]:
    """The flags of cfg that the functions take, by name."""
    names = set().union(*map(needs, functions))
    return {name: value for name, value in vars(cfg).items() if name in names}


def ask(loss, flags: dict, **known) -> Tensor:
    """The loss of what it needs out of `known`, and of its own flags."""
    return loss(**{name: known[name] for name in needs(loss) & known.keys()}, **flags)


def sft_loss(logps: Tensor) -> Tensor:
    """Cross-entropy, summed over the trained tokens of each completion: -log pi(y | x)."""
    return -logps


class Pair(NamedTuple):
    """A quantity of the chosen and of the rejected reply, each (B,)."""

    chosen: Tensor
    rejected: Tensor


def margin(policy: Pair, reference: Pair) -> Tensor:
    """The chosen reply's log-ratio to the reference minus the rejected one's, (B,)."""
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def per_token(logps: Pair, lengths: Pair) -> Pair:
    """Averages over the tokens of each reply."""
    return Pair(logps.chosen / lengths.chosen, logps.rejected / lengths.rejected)


def sigmoid(policy, reference, beta, label_smoothing=0.0):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): -log sigmoid(z), z = beta * margin.
    For labels that are wrong with probability e: -(1 - e) log sigmoid(z) - e log sigmoid(-z)."""
    z = beta * margin(policy, reference)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def robust(policy, reference, beta, label_smoothing=0.0):
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): unbiased when labels are flipped with
    probability e: (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e), z = beta * margin."""
    z = beta * margin(policy, reference)
    clean, flipped = -F.logsigmoid(z), -F.logsigmoid(-z)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(policy, reference, lengths, beta):
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17): (margin - 1 / (2 beta))^2, with
    log-ratios per token, as in its authors' experiments."""
    policy, reference = per_token(policy, lengths), per_token(reference, lengths)
    return (margin(policy, reference) - 1 / (2 * beta)) ** 2


def hinge(policy, reference, beta):
    """SLiC's hinge (Zhao et al. 2023, arXiv 2305.10425) on DPO's margin of rewards."""
    return torch.relu(1 - beta * margin(policy, reference))


def sigmoid_norm(policy, reference, lengths, beta):
    """Length-normalized DPO (Tulu 3, Lambert et al. 2024, arXiv 2411.15124); beta is 5 there."""
    policy, reference = per_token(policy, lengths), per_token(reference, lengths)
    return -F.logsigmoid(beta * margin(policy, reference))


def apo_zero(policy, reference, beta):
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7): chosen up, rejected down."""
    chosen, rejected = (beta * (p - r) for p, r in zip(policy, reference))
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(policy, reference, beta):
    """APO-down (the same, eq. 8): both down, for a model that is better than its pairs."""
    chosen = beta * (policy.chosen - reference.chosen)
    return torch.sigmoid(chosen) + torch.sigmoid(-beta * margin(policy, reference))


def simpo(policy, lengths, beta, simpo_gamma):
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6): per token, and without a reference."""
    policy = per_token(policy, lengths)
    return -F.logsigmoid(beta * (policy.chosen - policy.rejected) - simpo_gamma)


def orpo(policy, lengths, beta):
    """ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7): SFT on the chosen reply plus beta *
    -log sigmoid(log(odds of chosen / odds of rejected)), odds = p / (1 - p), log p per token."""
    policy = per_token(policy, lengths)
    chosen, rejected = (p - torch.log(-torch.expm1(p.clamp(max=-1e-6))) for p in policy)
    return -policy.chosen - beta * F.logsigmoid(chosen - rejected)


DPO_LOSSES = {loss.__name__: loss for loss in (sigmoid, robust, ipo, hinge)}
DPO_LOSSES |= {loss.__name__: loss for loss in (sigmoid_norm, apo_zero, apo_down, simpo, orpo)}


def dpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor,
    ref_chosen_logps: Tensor | float, ref_rejected_logps: Tensor | float,
    chosen_lengths: Tensor | int = 1, rejected_lengths: Tensor | int = 1,
    beta: float = 0.1, loss_type: str = "sigmoid", rpo_alpha: float = 0.0, **flags: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Direct preference optimization: prefer the chosen reply to the rejected one.

    All tensors (B,): log-probs in nats (0 where there is no reference), lengths in trained tokens
    (1 where log-probs are averages already). beta > 0 is the price of leaving the reference.
    rpo_alpha adds the chosen reply's negative log-likelihood per token (RPO, Pang et al. 2024,
    arXiv 2404.19733, eq. 1), so that its probability does not fall. `flags` are the loss's own.
    Returns losses, chosen rewards and rejected rewards, each (B,).
    """
    loss, lengths = DPO_LOSSES[loss_type], Pair(chosen_lengths, rejected_lengths)
    policy = Pair(chosen_logps, rejected_logps)
    reference = Pair(ref_chosen_logps, ref_rejected_logps)
    losses = ask(loss, flags, policy=policy, reference=reference, lengths=lengths, beta=beta)
    if rpo_alpha:
        losses = losses - rpo_alpha * chosen_logps / chosen_lengths
    if not compares(loss) and "lengths" in needs(loss):
        policy = per_token(policy, lengths)
    return losses, *(beta * (p - r).detach() for p, r in zip(policy, reference))


def kto(delta, sign, beta, z0):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8): 1 - sigmoid(+-beta (delta - z0)).
    Prospect theory: people's value is concave in gains and convex in losses from a reference point,
    which here is z0: how far the policy has moved on average."""
    return 1 - torch.sigmoid(sign * beta * (delta - z0))


def apo_zero_unpaired(delta, sign, beta):
    """APO-zero (as above) for single labels: KTO with the reference point held at zero."""
    return 1 - torch.sigmoid(sign * beta * delta)


# z0 costs two passes without gradient a step; a loss that does not take it saves them.
KTO_LOSSES = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}


def kto_loss(
    logps: Tensor, ref_logps: Tensor, desirable: Tensor, z0: Tensor,
    beta: float = 0.1, loss_type: str = "kto",
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0, **flags: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Kahneman-Tversky optimization: learn from single replies, thumbs up or thumbs down.
    logps, ref_logps (B,) in nats; desirable (B,) bool; z0 () >= 0 from `kl_baseline`.
    Returns losses and rewards, each (B,). At the first step a loss is 1/2 times its weight."""
    delta, sign = logps - ref_logps, torch.where(desirable, 1.0, -1.0)
    losses = ask(KTO_LOSSES[loss_type], flags, delta=delta, sign=sign, beta=beta, z0=z0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * losses, beta * delta.detach()


def kl_baseline(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KTO's reference point z0 = max(0, mean of log pi(y' | x) - log pi_ref(y' | x)), where y'
    answers another prompt (section 4.1): an estimate of KL(pi || pi_ref) that needs no sampling.
    (B,), (B,) of all that an optimizer step has -> (), without gradient."""
    return (logps - ref_logps).mean().clamp(min=0).detach()

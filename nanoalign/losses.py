"""The losses of SFT, DPO and KTO: pure functions of log-probabilities.

log pi(y | x) is the sum of the log-probs of a completion's trained tokens. The functions get (B,)
tensors, one number for each example, and return (B,) losses and (B,) rewards without gradient.

A loss gets only what its parameters name. In DPO these may be

    policy, reference, lengths    Pairs of log pi(y | x), log pi_ref(y | x), numbers of tokens

and in KTO

    delta, sign, z0               log pi / pi_ref; 1 for thumbs up, -1 for down; see kl_baseline

and in both flags (run/flags.py). To add a loss, write a function and list it in DPO_LOSSES or
KTO_LOSSES. Its name is then a valid --loss_type. Only a few of the published variants are here:
when each is tuned, their results are nearly the same (arXiv 2502.01237).

The reward is beta * log pi / pi_ref (DPO's eq. 5 without a term that both replies share). Without
a reference it is beta * log pi(y | x), per token if the loss is per token (SimPO, eq. 4).
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INPUTS = {"policy", "reference", "lengths", "delta", "sign", "z0"}  # all others are flags


def needs(loss) -> set[str]:  # the names of its parameters
    return set(inspect.signature(loss).parameters)


def compares(loss) -> bool:
    """Does a loss compare the policy with a reference?"""
    return bool(needs(loss) & {"reference", "delta"})


def flags_of(cfg, *functions) -> dict[str, object]:
    """The flags of cfg that are parameters of the functions: {name: value}."""
    names = set().union(*map(needs, functions))
    return {name: value for name, value in vars(cfg).items() if name in names}


def ask(loss, flags: dict, **known) -> Tensor:
    """Call a loss with those of the `known` quantities that it needs, and with its flags."""
    return loss(**{name: known[name] for name in needs(loss) & known.keys()}, **flags)


def sft_loss(logps: Tensor) -> Tensor:
    """-log pi(y | x), which is the cross-entropy summed over the trained tokens; (B,) -> (B,)."""
    return -logps


class Pair(NamedTuple):
    """A quantity of the chosen replies and of the rejected ones, each (B,)."""

    chosen: Tensor
    rejected: Tensor


def margin(policy: Pair, reference: Pair) -> Tensor:
    """log pi / pi_ref of the chosen reply minus log pi / pi_ref of the rejected one, (B,)."""
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def per_token(logps: Pair, lengths: Pair) -> Pair:
    """The mean log-prob of a token of each reply."""
    return Pair(logps.chosen / lengths.chosen, logps.rejected / lengths.rejected)


def sigmoid(policy, reference, beta, label_smoothing=0.0):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): -log sigmoid(z), z = beta * margin.
    If a share e = label_smoothing of labels is wrong: -(1 - e) logsigmoid(z) - e logsigmoid(-z)."""
    z = beta * margin(policy, reference)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def robust(policy, reference, beta, label_smoothing=0.0):
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409), unbiased if a share e = label_smoothing
    of the labels is wrong: (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)."""
    z = beta * margin(policy, reference)
    clean, flipped = -F.logsigmoid(z), -F.logsigmoid(-z)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(policy, reference, lengths, beta):
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17): (margin - 1 / (2 beta))^2. The margin is
    of log-probs per token, as in its authors' experiments."""
    policy, reference = per_token(policy, lengths), per_token(reference, lengths)
    return (margin(policy, reference) - 1 / (2 * beta)) ** 2


def hinge(policy, reference, beta):
    """The hinge loss of SLiC (Zhao et al. 2023, arXiv 2305.10425), of DPO's margin."""
    return torch.relu(1 - beta * margin(policy, reference))


def sigmoid_norm(policy, reference, lengths, beta):
    """DPO with log-probs per token (Tulu 3, Lambert et al. 2024, arXiv 2411.15124, beta = 5)."""
    policy, reference = per_token(policy, lengths), per_token(reference, lengths)
    return -F.logsigmoid(beta * margin(policy, reference))


def apo_zero(policy, reference, beta):
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7): chosen up, rejected down."""
    chosen, rejected = (beta * (p - r) for p, r in zip(policy, reference))
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(policy, reference, beta):
    """APO-down (the same paper, eq. 8): both down, for a model that is better than its pairs."""
    chosen = beta * (policy.chosen - reference.chosen)
    return torch.sigmoid(chosen) + torch.sigmoid(-beta * margin(policy, reference))


def simpo(policy, lengths, beta, simpo_gamma):
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6): log-probs per token and no reference."""
    policy = per_token(policy, lengths)
    return -F.logsigmoid(beta * (policy.chosen - policy.rejected) - simpo_gamma)


def orpo(policy, lengths, beta):
    """ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7): SFT's loss on the chosen reply, minus
    beta * log sigmoid(log(odds chosen / odds rejected)), odds = p / (1 - p), log p per token."""
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

    All tensors are (B,). Log-probs are in nats, and 0 without a reference. Lengths are numbers of
    trained tokens, and 1 if the log-probs are means already. With a large beta > 0 the policy stays
    near the reference. rpo_alpha adds the chosen reply's negative log-likelihood per token (RPO,
    Pang et al. 2024, arXiv 2404.19733, eq. 1), so that its probability does not fall. `flags` are
    the loss's other parameters. Returns (losses, chosen rewards, rejected rewards)."""
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
    Prospect theory: people judge gains and losses from a reference point. Here it is z0."""
    return 1 - torch.sigmoid(sign * beta * (delta - z0))


def apo_zero_unpaired(delta, sign, beta):
    """APO-zero for single replies: KTO with z0 = 0."""
    return 1 - torch.sigmoid(sign * beta * delta)


# z0 costs two more forward passes a step. They are left out for a loss that does not name it.
KTO_LOSSES = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}


def kto_loss(
    logps: Tensor, ref_logps: Tensor, desirable: Tensor, z0: Tensor,
    beta: float = 0.1, loss_type: str = "kto",
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0, **flags: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Kahneman-Tversky optimization: learn from single replies with a thumb up or down.
    logps, ref_logps (B,) in nats; desirable (B,) bool, True for thumbs up; z0 () from kl_baseline.
    Returns losses and rewards, each (B,). Before the first step each loss is half its weight."""
    delta, sign = logps - ref_logps, torch.where(desirable, 1.0, -1.0)
    losses = ask(KTO_LOSSES[loss_type], flags, delta=delta, sign=sign, beta=beta, z0=z0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * losses, beta * delta.detach()


def kl_baseline(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KTO's z0 = max(0, mean of log pi(y' | x) - log pi_ref(y' | x)), where y' is the reply to
    another prompt (section 4.1). It estimates KL(pi || pi_ref) without sampling replies.
    (B,), (B,) of all examples of an optimizer step -> (), without gradient."""
    return (logps - ref_logps).mean().clamp(min=0).detach()

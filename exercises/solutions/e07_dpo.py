import torch.nn.functional as F


def dpo_loss(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    chosen_lengths=1,
    rejected_lengths=1,
    beta=0.1,
    **others,
):
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()

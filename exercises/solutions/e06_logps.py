def token_logps(h, head, targets):
    return head.logits(h).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def reply_logps(logits, ids, mask):
    logps = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return logps[mask[1:]].sum()

def pieces(template, messages, tools=()):
    *context, reply = messages
    for message in context:
        yield template.start, False
        yield f"{message['role']}\n{message['content']}", False
        yield template.end, False
        yield "\n", False
    yield template.start, False
    yield "assistant\n", False
    yield reply["content"], True
    yield template.end, True


def ids_and_mask(tokenizer, pieces):
    ids, mask = [], []
    for piece, trains in pieces:
        new = [piece]
        if isinstance(piece, str):
            plain = dict(add_special_tokens=False, split_special_tokens=True)
            new = tokenizer(piece, **plain)["input_ids"]
        ids += new
        mask += [trains] * len(new)
    return ids, mask

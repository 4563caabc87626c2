def ranked_pairs(ranks):
    places = range(len(ranks))
    return [(i, j) for i in places for j in places if ranks[i] < ranks[j]]


def pairs_of(batch):
    better, worse, start = [], [], 0
    for example in batch:
        for i, j in example.pairs:
            better.append(start + i)
            worse.append(start + j)
        start += example.count
    return better, worse

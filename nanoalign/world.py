"""The built-in world: a model, data and a measurement that need no download.

A tiny Qwen3 (0.7 M weights) learns to answer five kinds of questions. Each answer is terse or a
full sentence, at random:

    Put p, c and k in order.                           c k p  |  In order they are c k p.
    Mia put the red lamp in the attic. Where is it?    attic  |  The red lamp is in the attic.

A program can see whether an answer is right, and whether it is a sentence. So the effect of
training can be measured. After SFT about half of the sampled replies are full sentences. DPO and
KTO prefer sentences: after them nearly all replies are, and the answers should be as right as
before.

`build` writes an ordinary model directory and ordinary data files. The scripts train this model
like any other, with the settings in their BUILT_IN. The learning rates were chosen with
validation.jsonl (`measure(policy, "validation")`), and the scripts report test.jsonl. With half,
once and twice the rate SFT (mean of three orders of the data) had 99.0, 99.1 and 98.5 % right
answers, and 86, 92 and 91 % of its sampled replies were right. In DPO and KTO about a tenth of the
sampled replies stayed terse with half the rate. Twice the rate cost DPO 6 % of the right answers,
and KTO 1 %. benchmarks/README.md has the settings that were slower or worse.

The pairs always prefer the sentence. So DPO has no optimum here: its loss falls as long as you
train.
"""

import itertools
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from nanoalign import InputError
from nanoalign.chatml import IM_END, IM_START
from nanoalign.model import Policy, generate

HOME = Path("runs/world")
BASE = HOME / "base"
LEARNED = HOME.parent / "sft"  # where train_sft.py leaves it
EACH = 3000  # training questions of a kind
HELD_OUT = 100  # questions of a kind in each of the two held-out sets

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PLACES = ["first", "second", "third"]
NAMES = ["Anna", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jo", "Kai", "Mia"]
COLOURS = ["red", "blue", "green", "black", "white", "yellow"]
THINGS = ["cup", "lamp", "book", "key", "ball", "hat", "box", "pen", "coat", "drum"]
ROOMS = ["attic", "kitchen", "garden", "cellar", "garage", "hall", "office", "shed", "barn"]


def questions(rng: random.Random) -> dict[str, list[list[tuple[str, str, str]]]]:
    """{kind: [training, validation, test]}, each a list of (question, terse, sentence).

    The three sets share no question; for sorting they share no set of letters either.
    """
    sets = [sorted(letters) for letters in itertools.combinations(LETTERS, 3)]
    triples = [list(p) for letters in sets for p in itertools.permutations(letters)]
    stories = list(itertools.product(NAMES, COLOURS, THINGS, ROOMS))

    def sort(letters):
        shown = rng.sample(letters, 3)
        a, b, c = shown
        right = " ".join(letters)
        return f"Put {a}, {b} and {c} in order.", right, f"In order they are {right}."

    def capitals(letters):
        shown, right = " ".join(letters), " ".join(letters).upper()
        return f"Write {shown} in capitals.", right, f"In capitals that is {right}."

    def backwards(letters):
        right = " ".join(letters[::-1])
        return f"Read {' '.join(letters)} backwards.", right, f"Backwards it reads {right}."

    def pick(letters):
        i = rng.randrange(3)
        question = f"Which letter comes {PLACES[i]} in {' '.join(letters)}?"
        return question, letters[i], f"The {PLACES[i]} letter is {letters[i]}."

    def where(story):
        name, colour, thing, room = story
        question = f"{name} put the {colour} {thing} in the {room}. Where is it?"
        return question, room, f"The {colour} {thing} is in the {room}."

    kinds = {sort: sets, capitals: triples, backwards: triples, pick: triples, where: stories}
    out = {}
    for ask, things in kinds.items():
        things = rng.sample(things, len(things))
        ends = HELD_OUT, 2 * HELD_OUT
        parts = [things[ends[1] :], things[: ends[0]], things[ends[0] : ends[1]]]
        train = [parts[0][i % len(parts[0])] for i in range(EACH)]  # there are fewer sets
        out[ask.__name__] = [[ask(t) for t in part] for part in (train, *parts[1:])]
    return out


def train_tokenizer(texts: list[str], size: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML's two markers, trained on `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=IM_END, pad_token=IM_END)


def at_home(cfg) -> bool:
    """Does a run train on this world's data? Then `measure` can measure it."""
    return Path(cfg.dataset_name[0]).parent == HOME


def owns(cfg) -> bool:
    """May a run overwrite an earlier result in its output directory? Only in runs/METHOD."""
    return at_home(cfg) and cfg.output_dir == str(HOME.parent / cfg.method)


def prepare(cfg) -> None:
    """Make the model that a built-in run starts from. InputError: train_sft.py must run first."""
    model = cfg.model_name_or_path if at_home(cfg) else None
    if model == str(BASE):
        build()
    elif model == str(LEARNED) and not (LEARNED / "config.json").exists():
        raise InputError("the built-in model is not trained yet: run train_sft.py first")


def build(seed: int = 0) -> None:
    """Write the untrained model, its tokenizer and all data files under runs/world."""
    rng = random.Random(seed)
    train, validation, test = map(list, zip(*questions(rng).values()))
    HOME.mkdir(parents=True, exist_ok=True)
    train, validation, test = (sum(part, []) for part in (train, validation, test))
    rng.shuffle(train)

    def write(name, rows):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (HOME / f"{name}.jsonl").write_text(text, encoding="utf-8")

    pairs = [dict(prompt=q, chosen=long, rejected=short) for q, short, long in train]
    write("sft", [dict(prompt=q, completion=a) for q, *answers in train for a in answers])
    write("dpo", pairs)
    thumbs = []  # 1 of 4 is a sentence, thumbs up; 3 are terse, thumbs down
    for i, (q, short, long) in enumerate(train):
        up = i % 4 == 0
        thumbs.append(dict(prompt=q, completion=long if up else short, label=up))
    write("kto", thumbs)
    for name, part in (("validation", validation), ("test", test)):
        write(name, [dict(question=q, terse=short, sentence=long) for q, short, long in part])

    tokenizer = train_tokenizer([f"user\n{q}\nassistant\n{a}\nassistant\n{b}" for q, a, b in train])

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "qwen3",  # its norms of queries and keys bear a high learning rate
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,  # with transformers' 0.02 it learns more slowly
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)


def measure(policy: Policy, name: str = "test") -> dict:
    """How the policy answers a held-out set: shares from 0 to 1, and the sampled replies."""
    lines = (HOME / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line) for line in lines]
    prompts = [[{"role": "user", "content": row["question"]}] for row in asked]
    device = policy.lm.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        greedy = generate(policy, prompts, max_new_tokens=24)
        sampled = generate(policy, prompts, max_new_tokens=24, temperature=1.0)

    def share(replies, *keys):
        hits = [reply in [row[key] for key in keys] for reply, row in zip(replies, asked)]
        return sum(hits) / len(hits)

    def full(replies):  # a reply that ends with a full stop is a sentence, right or wrong
        return sum(reply.endswith(".") for reply in replies) / len(replies)

    return {
        "right answers, greedy": share(greedy, "terse", "sentence"),
        "right answers, sampled": share(sampled, "terse", "sentence"),
        "full sentences, greedy": full(greedy),
        "full sentences, sampled": full(sampled),
        "replies": [(row["question"], reply) for row, reply in zip(asked, sampled)],
    }


def report(before: dict, after: dict) -> str:
    """Both measurements side by side, and some sampled replies of each."""
    lines = ["", f"on {len(after['replies'])} held-out questions{'before':>23}{'after':>9}"]
    for name in [name for name in before if name != "replies"]:
        lines.append(f"  {name:<43}{before[name]:>7.1%}  {after[name]:>7.1%}")
    lines += ["", f"{'sampled replies':<53}{'before':<32}after"]
    for i in range(0, len(after["replies"]), max(1, len(after["replies"]) // 8)):
        question, reply = after["replies"][i]
        lines.append(f"  {question:<51}{before['replies'][i][1]!r:<32.30}{reply!r:.40}")
    return "\n".join(lines)

"""As many updates, but fewer rows and more epochs: does repetition beat new data?

"Data Repetition Beats Data Scaling" (arXiv 2602.11149) fine-tunes models on long chains of thought.
With the number of updates given, few rows in many epochs teach more than many rows in one, up to
the point where the model predicts every token of these rows.

Here it is tried twice, with two seeds each. *From scratch*: the world's model learns its five kinds
of questions, 1,000 steps of 16, from 500 to 16,000 rows, that is in 32 epochs to one. *A form*: the
model that has learned them learns to say "You can find it in the attic.", 50 steps of 16, from 8 to
800 rows. Measured: right answers to held-out questions (in the new form), and the loss of a token
on held-out rows and on the rows themselves.

Expected: from scratch the claim fails, since a few hundred rows can be learned by heart and do not
say what the rule is. A form is nearer to the paper: the model knows the answer, and only its way to
say it is new. There the fewest rows should do as well as one epoch, to 2 %, or better.
"""

from statistics import mean

from experiments.forgetting import is_new, strange
from experiments.lab import Report, pairs, replies_of, sft_model, token_loss, train
from experiments.mask import trained_on

SEEDS = 1, 2
BATCH = 16
SCRATCH, FORM = "from scratch", "a form"
STEPS = {SCRATCH: 1000, FORM: 50}
ROWS = {SCRATCH: (500, 2000, 8000, 16000), FORM: (8, 40, 200, 800)}
SAME = 0.02  # shares that differ by less are the same


def run(small: bool) -> Report:
    learned = {"model_name_or_path": sft_model(small)}
    new = [row for row in pairs("dpo") if is_new(row)]
    form = [dict(prompt=row["prompt"], completion=strange(row["rejected"])) for row in new]
    asked = pairs("test")
    told = [row | {"told": strange(row["terse"])} for row in asked if is_new(row)]
    tasks = {  # where it starts, what is taught, the test, and the test's columns of right answers
        SCRATCH: ({}, pairs("sft"), asked, ("terse", "sentence")),
        FORM: (learned, form, told, ("told",)),
    }

    table, found = [], {}  # (what, rows) -> right answers of each seed
    for what, (start, taught, test, kinds) in tasks.items():
        test = test[: 4 if small else None]
        held_out = [
            dict(prompt=row["question"], completion=row[kind]) for row in test for kind in kinds
        ]
        for n in ROWS[what]:
            rows, losses = taught[:n], []
            for seed in SEEDS[: 1 if small else None]:
                how = dict(seed=seed, max_steps=STEPS[what], per_device_train_batch_size=BATCH)
                policy, _ = train("sft", rows, small, **how, **start)
                replies = replies_of(policy, test, 0.0)
                right = [reply in [row[k] for k in kinds] for reply, row in zip(replies, test)]
                found.setdefault((what, n), []).append(mean(right))
                parts = held_out, rows[:500]
                losses.append([token_loss(policy, trained_on(policy, part)) for part in parts])
            epochs = STEPS[what] * BATCH / n
            table.append([what, n, epochs, mean(found[what, n]), *map(mean, zip(*losses))])

    def draw(figure):
        for axis, what in zip(figure.subplots(1, 2), ROWS):
            for n in ROWS[what]:
                axis.plot([n] * len(found[what, n]), found[what, n], "o", color="C0")
            axis.plot(ROWS[what], [mean(found[what, n]) for n in ROWS[what]], color="C0")
            axis.set(xlabel="rows", ylabel="right answers", xscale="log", title=what)

    few, many = ({what: found[what, ROWS[what][i]] for what in ROWS} for i in (0, -1))
    held = [
        ("from scratch: one epoch is better than the fewest rows, by more than 2 %",
         min(many[SCRATCH]) > max(few[SCRATCH]) + SAME),
        ("a form: the fewest rows do as well as one epoch, to 2 %",
         mean(few[FORM]) > mean(many[FORM]) - SAME),
    ]  # fmt: skip
    columns = ["learned", "rows", "epochs", "right", "nats a token, held out", "on the rows"]
    notes = [
        "From scratch 2,000 rows in 8 epochs lose 6 points of one epoch's right answers, and 8,000 "
        "in 2 epochs one point.",
        "The form takes more than 8 rows: after 100 epochs their loss is next to nothing, and a "
        "fifth of the other answers is wrong. But 40 rows in 20 epochs do as well as 800 in one.",
    ]
    return Report(columns, table, held, draw, notes)

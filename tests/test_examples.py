"""The fourth method: GRPO on a tiny model, with a reward that it can reach."""

import runpy

import pytest
import torch
from scripts import ROOT, metrics, write_rows

from nanoalign import InputError
from nanoalign.logps import PackedLM
from nanoalign.run.flags import parse


def test_grpo_improves_its_reward(model_dir, tmp_path, monkeypatch):
    """Ids below 100 are wanted: their share of the sampled tokens rises from a third or so."""
    script = runpy.run_path(str(ROOT / "examples" / "train_grpo.py"))
    run_grpo, rows = script["run_grpo"], []
    monkeypatch.setitem(
        run_grpo.__globals__, "reward", lambda _, ids: sum(i < 100 for i in ids) / len(ids)
    )
    whole = PackedLM.forward

    def counted(lm, examples, *more):
        rows.append([(len(e.prompt), len(e.texts)) for e in examples])
        return whole(lm, examples, *more)

    monkeypatch.setattr(PackedLM, "forward", counted)
    pairs = [dict(prompt=f"What is {i}?", chosen="Good.", rejected="Bad.") for i in range(8)]
    words = ["--model_name_or_path", model_dir, "--device", "cpu", "--logging_steps", "10"]
    words += ["--dataset_name", str(write_rows(tmp_path / "p.jsonl", pairs))]
    words += ["--output_dir", str(tmp_path / "out"), "--learning_rate", "1e-2", "--max_steps", "40"]
    words += ["--max_completion_length", "6", "--num_generations", "4"]
    run_grpo(parse(script["GRPOConfig"], words, {}))
    found = [line["reward"] for line in metrics(tmp_path / "out")]
    assert len(found) == 4 and found[0] < 0.6 and found[-1] > found[0] + 0.2
    _, *rows = rows  # the first is the probe's
    assert len(rows) == 40 and rows[0] == [(n, 4) for n, _ in rows[0]]  # a prompt once a group
    assert torch.isfinite(torch.tensor(found)).all()
    with pytest.raises(InputError, match="--num_generations 1: must be more than 1"):
        parse(script["GRPOConfig"], [*words[:-1], "1"], {})  # a group of one has no spread

"""What users of transformers and TRL type works, or one line says what does the same here."""

import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import pytest
from scripts import METHODS, argv, command, metrics
from transformers import TrainingArguments
from transformers.training_args import SaveStrategy, SchedulerType

from nanoalign import InputError
from nanoalign.run.flags import (
    FOREIGN,
    SCHEDULES,
    Config,
    SFTConfig,
    flag,
    has_adapter,
    names_of,
    parse,
)
from nanoalign.run.policy import adapter_of

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("no_curves")
NEEDED = {"model_name_or_path": "m", "dataset_name": "d"}
TRL = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig}
MORE = trl.ModelConfig, trl.ScriptArguments  # of TRL's scripts, beside the method's own
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def parsed(method, *words, **flags):
    return parse(METHODS[method][0], [*argv(NEEDED | flags), *words], {})


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_of_theirs_is_known(method, capsys):
    """No field of theirs ends in "unrecognized": it is ours, or a line says why not."""
    kinds = TrainingArguments, *TRL.values(), *MORE
    names = {f.name for kind in kinds for f in fields(kind)} - names_of(METHODS[method][0])
    assert len(names) > 100
    for name in names:
        for word in (f"--{name}=a", f"--{name}", f"--no_{name}"):
            try:
                parsed(method, word)
                assert capsys.readouterr().out.count("\n") <= 1
            except InputError as error:
                said = str(error)
                assert "unrecognized" not in said and f"--{name} " in said and "\n" not in said


def test_no_flag_of_ours_is_called_foreign():
    names = [name for row in FOREIGN for name in row[0].split()]
    assert len(names) == len(set(names))
    for kind, _ in METHODS.values():
        assert not names_of(kind) & set(names)


def test_foreign_flags(capsys):
    parsed("sft", "--push_to_hub=false", "--do_train", "--data_seed", "None", "--no_packing")
    parsed("sft", "--no-save-only-model", "--model-revision=main")
    assert not capsys.readouterr().out
    parsed("dpo", "--no_remove_unused_columns", "--dataset_num_proc", "4", "--do_eval")
    said = capsys.readouterr().out.splitlines()
    names = "remove_unused_columns", "dataset_num_proc", "do_eval"
    assert [line.split(":")[0] for line in said] == [f"--{n} has nothing to do here" for n in names]
    for words, message in (
        (["--push_to_hub"], "--push_to_hub true: not here; hf upload"),
        (["--hub-model-id", "a/b"], "--hub_model_id a/b: not here; hf upload"),
        (["--data_seed=3"], "--data_seed 3: not here; --seed is"),
        (["--packing", "true"], "--packing true: not here; a batch is one row"),
        (["--no_do_train"], "--do_train false: not here"),
        (["--hub_revision", "x"], "--hub_revision is a flag of transformers' Trainer; nothing"),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(message)}"):
            parsed("sft", *words)


def test_what_they_call_otherwise():
    cfg = parsed(
        "sft", "--evaluation_strategy", "steps", "--torch_dtype=bfloat16", "--max_seq_length=9",
        eval_fraction=0.5,
    )  # fmt: skip
    assert (cfg.eval_strategy, cfg.dtype, cfg.max_length) == ("steps", "bfloat16", 9)


def test_choices_are_theirs():
    ours = {f.name: f for f in fields(Config)}
    assert SCHEDULES.keys() <= {kind.value for kind in SchedulerType}
    values = {kind.value for kind in SaveStrategy}
    for name in ("eval_strategy", "save_strategy"):
        for value in values - {"best"}:
            parsed("sft", f"--{name}={value}", eval_fraction=0.5)
    assert ours["save_strategy"].default == TrainingArguments().save_strategy.value


def default(field):
    return field.default_factory() if field.default is MISSING else field.default


@pytest.mark.parametrize("method", METHODS)
def test_readme_has_the_defaults_that_differ(method):
    """Its table names each, with both values where they are plain."""
    theirs = {f.name: f for kind in (TRL[method], *MORE) for f in fields(kind)}
    rows = re.findall(r"^\| `(\w+)` \| `?([^|`]*)`? \| `?([^|`]*)`? \|", README, flags=re.M)
    told = {name: values for name, *values in rows}
    words = {True: "true", False: "false", None: "none"}
    for field in fields(METHODS[method][0]):
        ours, other = default(field), default(theirs.get(field.name, field))
        other = other[0] if isinstance(other, list) and len(other) == 1 else other
        if ours != other and (ours or other):
            assert field.name in told, f"{field.name}: {ours}, TRL {other}"
            for value, cell in zip((ours, other), told[field.name]):
                value = value[0] if isinstance(value, list) and value else value
                assert cell.startswith(str(words.get(value, value))), (field.name, value, cell)


def yaml(path, text):
    path.write_text(text, encoding="utf-8")
    return f"--config={path}"


def test_a_config_file(tmp_path, capsys):
    text = """
    learning_rate: 1e-5   # YAML calls this a text
    eval_strategy: no     # and this False
    bf16: true
    use-peft: yes
    lora_target_modules:
    - q_proj
    - v_proj
    lr_scheduler_type: polynomial
    lr_scheduler_kwargs: {power: 2, "lr_end": 1e-7}
    dataset_name: [d.jsonl]
    max_prompt_length: null
    deepspeed: ~
    push_to_hub: false
    log_level: info
    max_steps: 7
    run_name: 2024-01-01
    """
    file = yaml(tmp_path / "a.yaml", text)
    words = [file, "--max-steps", "3", "--model_name_or_path", "m", "--report_to=wandb"]
    cfg = parse(METHODS["sft"][0], words, {})
    assert (cfg.learning_rate, cfg.eval_strategy, cfg.computing_dtype) == (1e-5, "no", "bfloat16")
    assert cfg.use_peft and cfg.lora_target_modules == ["q_proj", "v_proj"]
    assert cfg.lr_scheduler_kwargs == {"power": 2, "lr_end": 1e-7}
    assert (cfg.dataset_name, cfg.max_steps, cfg.run_name) == (["d.jsonl"], 3, "2024-01-01")
    assert capsys.readouterr().out == "--log_level has nothing to do here: a run says little\n"


BAD_FILES = [
    ("learning_rate: fast", "a.yaml, line 1: argument --learning_rate/--learning-rate: invalid"),
    ("bf16: true\nlora_r: 0", "a.yaml, line 2: --lora_r 0: must be more than 0"),
    ("lora_r: 8\nlora_r: 9", "a.yaml, line 2: lora_r is given more than once"),
    (
        "max_length: null",
        "a.yaml, line 1: argument --max_length/--max-length/--max_seq_length",
    ),
    ("learnig_rate: 1", "a.yaml, line 1: unrecognized arguments: --learnig_rate 1; the nearest is"),
    ("push_to_hub: true", "a.yaml, line 1: --push_to_hub true: not here"),
    ("env: {A: 1}", "a.yaml, line 1: --env {A: 1}: not here; write it before the command"),
    ("beta: 1", "a.yaml, line 1: --beta is a flag of DPO and KTO only"),
    ("config: b.yaml", "a.yaml, line 1: unrecognized arguments: --config b.yaml"),
    ("lora_r: !!python/name:os.system", "a.yaml, line 1: lora_r: expected a plain value"),
    ("lora_r: [[1]]", "a.yaml, line 1: lora_r: expected a plain value, or a list of them"),
    ("lora_r: !!python/object/apply:os.system [touch x]", "a.yaml, line 1: argument --lora_r"),
    ("lora_r: !!python/object/apply:os.abort {}", "a.yaml, line 1: argument --lora_r"),
    ("? [a]\n: 1", "a.yaml, line 1: expected a flag"),
    ("- lora_r: 8", "a.yaml: expected lines as learning_rate: 1e-5"),
    ("", "a.yaml: expected lines as"),
    ("lora_r: [", "a.yaml: while parsing"),
    ("lora_r: &a [*b]", "a.yaml: found undefined alias"),
    ("lora_r: &a [*a]", "a.yaml, line 1: lora_r: expected a plain value"),
    ("lora_r: " + "[" * 5000, "a.yaml: "),
    (b"\xff\xfe", "a.yaml: "),
]


@pytest.mark.parametrize("text, message", BAD_FILES, ids=[str(row[0])[:30] for row in BAD_FILES])
def test_bad_config_files(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        parsed("sft", "--config", "a.yaml")
    said = str(error.value)
    assert said.removeprefix("--config ").startswith(message) and "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]  # nothing ran


def test_a_config_file_that_is_not_there(tmp_path):
    for name in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match=f"^--config {name}: "):
            parsed("sft", f"--config={name}")


def test_when_it_evaluates_and_saves(model_dir, data, tmp_path):
    """11 rows, 3 of them held out, 2 a step: 4 steps an epoch, 8 in all."""
    given = dict(
        model_name_or_path=model_dir, dataset_name=data / "sft.jsonl", device="cpu",
        per_device_train_batch_size=2, num_train_epochs=2, eval_fraction=0.3, logging_steps=3,
    )  # fmt: skip
    for name, flags, evaluated, saved in (
        ("a", {"eval_strategy": "epoch", "save_strategy": "epoch"}, [4, 8], [4]),
        ("b", {"eval_strategy": "steps", "save_steps": 3}, [3, 6, 8], [3, 6]),
        ("c", {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "no"}, [5, 8], []),
        ("d", {"eval_strategy": "no", "save_steps": 2, "save_strategy": "no"}, [], []),
        ("e", {"eval_steps": 5}, [5, 8], []),
    ):
        words = argv(given | flags | {"output_dir": name})
        code, _, errors = command(tmp_path, "train_sft.py", *words)
        assert code == 0, errors
        lines = metrics(tmp_path / name)
        assert [line["step"] for line in lines if "eval_loss" in line] == evaluated
        steps = sorted(int(p.name[11:]) for p in (tmp_path / name).glob("checkpoint-*"))
        assert steps == saved


def test_the_command_line_is_named_where_it_is_wrong(tmp_path):
    file = yaml(tmp_path / "a.yaml", "lora_r: 8\nwarmup_steps: 3\n")
    with pytest.raises(InputError, match="^--lora_r 0: must be more than 0$"):
        parsed("sft", file, "--lora_r", "0")
    with pytest.raises(
        InputError, match="a.yaml, line 2: --warmup_ratio and --warmup_steps contra"
    ):
        parsed("sft", file, "--warmup_ratio=0.1")
    with pytest.raises(InputError, match="^--config is given more than once$"):
        parsed("sft", file, file)


def test_a_setting_of_lora_needs_one_line_to_be_a_flag():
    """It reaches the adapter by its name, and contradicts --use_peft false as the others do."""

    @dataclass
    class OwnConfig(SFTConfig):
        layers_to_transform: list[int] = flag([], "only these layers", idle=has_adapter)

    words = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o", "--lora_bias=all"]
    words += ["--lora_target_modules", "q_proj", "--layers_to_transform", "1", "2"]
    lora = adapter_of(parse(OwnConfig, words, {}), "base", {})
    assert (lora.layers_to_transform, lora.bias, lora.target_modules) == ([1, 2], "all", "q_proj")
    words = [*words[:3], "--use_peft=false", "--layers_to_transform", "1"]
    with pytest.raises(InputError, match="use_peft false and --layers_to_transform contradict"):
        parse(OwnConfig, words, {})

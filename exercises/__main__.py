"""Put your functions into the lesson's place, and train with them.

    python -m exercises run                 # the built-in DPO, then KTO
    python -m exercises run dpo             # one of them

Every exercise that has all its points takes the place of the lesson's own function; where one is
not right yet the lesson's stays. The lesson's other definitions compute too, without their twins in
fast/ (nanoalign.plain), so all that runs can be read and stepped through.
"""

import argparse
from pathlib import Path
from types import ModuleType

import nanoalign
import train_dpo
import train_kto
import train_sft
from exercises.checks import EXERCISES
from exercises.grade import HERE, passed
from nanoalign import train
from nanoalign.chatml import ChatML
from nanoalign.lora import LoRALinear
from nanoalign.packing import Geometry
from nanoalign.run.command import command
from nanoalign.run.flags import DPOConfig, KTOConfig, SFTConfig, parse

TABLE = None  # nanoalign.plain's table
PLACES = {  # exercise -> who has its functions in the lesson, and their names
    "e01_mask": [(ChatML, "pieces"), (TABLE, "ids_and_mask")],
    "e02_until": [(Geometry, "allowed")],
    "e03_lora": [(LoRALinear, "forward"), (LoRALinear, "merge")],
    "e05_nf4": [(TABLE, "quantize")],  # runs with --load_in_4bit
    "e06_logps": [(TABLE, "token_logps")],
    "e07_dpo": [(train_dpo, "dpo_loss")],
    "e08_kto": [(train_kto, "kl_baseline"), (train_kto, "kto_loss")],
    "e09_step": [(train, "optimizer_step")],
    "e10_ranked": [(train_dpo, "pairs_of")],
}
METHODS = {
    "dpo": (DPOConfig, train_dpo.run_dpo, train_dpo.BUILT_IN),
    "kto": (KTOConfig, train_kto.run_kto, train_kto.BUILT_IN),
}


def take_places(answers: dict[str, ModuleType]) -> None:
    """From here on the lesson computes with these functions."""
    table = {}
    for name, answer in answers.items():
        for owner, function in PLACES.get(name, ()):
            if owner is TABLE:
                table[function] = getattr(answer, function)
            else:
                setattr(owner, function, getattr(answer, function))
    nanoalign.plain(**table)
    if answer := answers.get("e04_reference"):

        def reference_of(cfg, policy, loss, all_requests):
            return lambda batches: [answer.reference_logps(policy.lm, b) for b in batches]

        train_dpo.reference_of = train_kto.reference_of = reference_of


def run(methods: list[str], directory: Path, flags: list[str]) -> None:
    answers = passed(directory)
    print(f"in the lesson's place: {', '.join(answers) or 'nothing yet'}")
    if missing := EXERCISES.keys() - answers.keys():
        print(f"the lesson's own stay for {', '.join(sorted(missing))}")
    if not any("model_name_or_path" in flag for flag in flags) and not Path("runs/sft").exists():
        print("first the SFT model that both go on from, once, by the lesson: about a minute")
        train_sft.run_sft(parse(SFTConfig, [], train_sft.BUILT_IN))
    take_places(answers)
    for method in methods:
        kind, script, built_in = METHODS[method]
        own = dict(output_dir=f"runs/exercises-{method}", overwrite_output_dir=True)
        script(parse(kind, flags, {**built_in, **own}))


@command("exercises")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="exercises", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=["run"])
    parser.add_argument("methods", nargs="*", help="dpo, kto; none: both")
    parser.add_argument("--answers", type=Path, default=HERE, help="the directory of the answers")
    args, flags = parser.parse_known_args(argv)
    if wrong := set(args.methods) - METHODS.keys():
        parser.error(f"{min(wrong)}: there are {', '.join(METHODS)}")
    run(args.methods or [*METHODS], args.answers, flags)


if __name__ == "__main__":
    main()

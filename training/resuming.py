"""What a pretraining command continues: nothing, the run in its folder, or a checkpoint elsewhere.

    --resume             --checkpoint_dir has       the command
    none                 no checkpoint              starts a new run
    none                 a checkpoint               continues it, if the flags agree with it
    auto                 no checkpoint, or one      the same as none, or as that FILE
    FILE in that folder                             continues it with its settings
    FILE in that folder, behind latest.pt           is refused
    FILE elsewhere       no run                     starts a branch: a new run from FILE's state
    FILE elsewhere       this branch of FILE        continues the branch
    FILE elsewhere       another run                is refused

pretrain_imagenet.py calls find_branch, prepare_checkpoint_dir and load_run, in this order.
"""

import secrets
from pathlib import Path

from common.errors import UserError
from common.files import write_atomic
from training.checkpoint import (
    BEST,
    FRESH_BEST,
    LATEST,
    TrainState,
    has_checkpoint,
    load_checkpoint,
    read_epoch,
)
from training.distributed import DistributedContext
from training.recipes import upgrade_pretrain_config
from training.run_dir import RunDir


def is_branch(resume: Path | None, checkpoint_dir: Path) -> bool:
    """Whether --resume names a checkpoint in another folder than the run's."""
    return resume is not None and resume.parent.resolve() != checkpoint_dir.resolve()


def find_branch(resume: Path | None, checkpoint_dir: Path) -> Path | None:
    """What --resume stands for: the branch in `checkpoint_dir` where it has begun already.

    Raises UserError where the run would fall back behind its own latest.pt, unless that was resumed
    from the same file.
    """
    if resume is None:
        return None
    if not is_branch(resume, checkpoint_dir):
        return check_is_latest(resume)
    if not has_checkpoint(checkpoint_dir):
        return resume
    branch = checkpoint_dir / LATEST
    try:
        runs = [load_checkpoint(path)[0].config for path in (resume, branch)]
        source = runs[1]["branch_of"], runs[1].get("branch_from", resume.name)  # older: unknown
        begun = source == (runs[0]["run"], resume.name)
    except (UserError, KeyError, TypeError):  # another run, which prepare_checkpoint_dir refuses
        begun = False
    return branch if begun else resume


def check_is_latest(resume: Path) -> Path:
    """The checkpoint to resume in its own folder; UserError where latest.pt is further."""
    latest = resume.with_name(LATEST)
    if resume.name == LATEST or not latest.exists():
        return resume
    try:
        states = [load_checkpoint(path)[0] for path in (resume, latest)]
        runs = [state.config["run"] for state in states]
    except (UserError, KeyError, TypeError):  # damaged, which may be why `resume` was chosen
        return resume
    if runs[0] != runs[1]:
        raise UserError(
            f"--resume {resume} is of another run than {latest}, which would be overwritten: give "
            "it a --checkpoint_dir of its own"
        )
    if states[1].config.get("resumed_from") == resume.name:  # the same command as before
        return latest
    if states[0].step >= states[1].step:
        return resume
    raise UserError(
        f"--resume {resume}: {latest} is further, after {states[1].epoch} epochs, and would be "
        "overwritten: resume that one, or make a branch with another --checkpoint_dir"
    )


def prepare_checkpoint_dir(run_dir: RunDir, resume: Path | None, *, overwrite: bool) -> None:
    """Lock the folder; archive the run in it, or refuse it, unless it is the one to resume."""
    run_dir.lock()
    if not run_dir.contains_run():
        return
    if overwrite:
        run_dir.archive(run_dir.path / "overwritten")
    elif is_branch(resume, run_dir.path):
        latest = run_dir.path / LATEST
        advice = f"resume that one with --resume {latest}, or " if latest.exists() else ""
        raise UserError(
            f"{run_dir.path} already contains another run than {resume}: {advice}choose another "
            "--checkpoint_dir"
        )
    elif resume is None and not has_checkpoint(run_dir.path):
        best = run_dir.path / BEST
        advice = f"resume it with --resume {best}, " if best.exists() else ""
        raise UserError(
            f"{run_dir.path} already contains a run, without {LATEST}: {advice}archive it with "
            "--overwrite, or choose another --checkpoint_dir"
        )


def load_run(
    resume: Path | None, checkpoint_dir: Path, context: DistributedContext
) -> tuple[TrainState, dict[str, dict], Path] | None:
    """Load the checkpoint to continue on all ranks; None for a new run.

    Returns the state, the tensors and the requested path. The state of a branch gets
    the identity of a new run. Raises UserError where the ranks do not see the same.
    """
    path = resume
    if path is None and has_checkpoint(checkpoint_dir):
        path = checkpoint_dir / LATEST
    found = context.gather(path is not None)
    if any(found) and not all(found):
        raise UserError(
            f"some ranks do not find {checkpoint_dir / LATEST}: --checkpoint_dir must be a folder "
            "that all machines share"
        )
    if path is None:
        return None
    try:
        state, tensors, warning = load_checkpoint(path)
    except UserError as error:
        best = path.with_name(BEST)
        epoch = read_epoch(best) if path.name == LATEST else None
        if epoch is None:
            raise
        raise UserError(f"{error}; --resume {best} would continue after epoch {epoch}") from error
    if warning and context.is_main:
        print(warning)
    names = ("model", "img_size", "seed", "precision", "micro_batches")
    if not (isinstance(state.config, dict) and state.config.keys() >= set(names)):
        raise UserError(f"{path} is not a checkpoint of pretrain_imagenet.py")
    if len(set(context.gather(state.step))) > 1:
        # One rank fell back to the predecessor, or a dying run saved in between.
        raise UserError(f"the ranks have read different states of {path}: start them again")
    if is_branch(resume, checkpoint_dir):
        state.config["branch_of"] = state.config.get("run")
        state.config["branch_from"] = path.name
        state.config["run"] = secrets.token_hex(8)
    elif path.name != LATEST:
        state.config["resumed_from"] = path.name
    return state, tensors, path


def find_changed_settings(
    recorded: dict, wanted: dict, *, amp: bool | None, ignore: set[str]
) -> list[str]:
    """Settings of a command line that differ from a checkpoint's config, as "name old → new".

    wanted: the values to compare, by name.  amp: --amp, --no_amp or None.  ignore: names that may
    differ.
    """
    config = upgrade_pretrain_config(recorded)
    changed = [
        f"{name} {config[name]} → {value}"
        for name, value in wanted.items()
        if name not in ignore and value != config[name]
    ]
    if amp is not None and amp != (config["precision"] != "fp32"):
        changed.append(f"precision {config['precision']} → {'mixed' if amp else 'fp32'}")
    return changed


def check_same_data(
    state: TrainState, classes: list[str], num_images: int, digest: str, data_dir: Path
) -> None:
    """Raise UserError unless the training images are those of the run, by class and name."""
    old = state.classes, state.num_images, state.data_digest or digest
    if old != (classes, num_images, digest):
        names = " of other names" if len(classes) == len(state.classes) else ""
        raise UserError(
            f"--data_dir {data_dir} has {len(classes)} classes and {num_images} training images; "
            f"the run was trained on {len(state.classes)} classes and {state.num_images} images"
            f"{names}: restore the files, or start a new run in another --checkpoint_dir"
        )


def copy_best(state: TrainState, source: Path, target: Path) -> None:
    """Give a branch the best.pt of its history, if the folder it comes from still has it.

    It becomes best.pt when the branch has its first checkpoint: see checkpoint.recover_best.
    """
    best = source / BEST
    try:
        if best.exists() and load_checkpoint(best)[0].epoch == state.best_epoch:
            write_atomic(target / FRESH_BEST, best.read_bytes())
    except (UserError, OSError) as error:  # damaged, or a full disk: as if it were missing
        print(f"warning: {error}")


def describe_resumed(state: TrainState, path: Path, epochs: int) -> str:
    if state.epoch == epochs:
        return f"{path} has finished its {state.epoch} epochs: writing its outputs again"
    return f"resuming {path} in epoch {state.epoch + 1}, after step {state.step}"

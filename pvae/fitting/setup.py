"""A training set up: pair and data looked at together, and what the loop needs made of them."""

from __future__ import annotations

from pyro.infer import ELBO as PyroELBO

from pvae import checkpoint, distributed, randomness
from pvae.data import Batches, LoaderSource, Source, as_source, first_batch
from pvae.distributed import World
from pvae.engine import Engine, Stepper, choose, make_optimizer
from pvae.errors import ArgumentError, warn
from pvae.fitting.checks import (
    check_batches,
    check_objective,
    check_overcomplete,
    check_pair,
    check_whole,
)
from pvae.fitting.processes import agree, check_parts, warn_if_apart
from pvae.fitting.saving import restore
from pvae.fitting.settings import Settings
from pvae.fitting.training import Training
from pvae.objectives import Objective, as_objective
from pvae.pair import Pair, Structure
from pvae.terms import check_data, look_at

__all__ = ["set_up"]


def set_up(
    pair: Pair, data: object, objective: PyroELBO | None, valid: object, settings: Settings
) -> Training:
    """Checks everything, and makes a training that is new, or goes on from the folder's.

    Nothing in the folder is changed before all else has been checked.
    """
    world, objective = distributed.current(), as_objective(objective)
    warn_if_apart(world)
    if settings.patience is not None and valid is None:
        fixes = ["valid=x_valid"]
        raise ArgumentError("patience", "validation data to look at", "valid=None", fixes)
    with randomness.forked():  # data sets and samplers may draw, too
        structure, source, validation = _look_at(pair, data, objective, valid, settings)
        batches = _make_batches(objective, structure, source, settings, world)
        parameters = list(structure.parameters.values())
        optimizer = make_optimizer(settings.optimizer, parameters, settings.lr)
        state = None
        if isinstance(objective, Objective):  # Pyro's own have none
            state = objective.make_state(structure, source.num_rows, 1, 1)  # until it has a length
        given = (structure, objective, optimizer, state, settings.clip_norm)
        stepper = Stepper(*given, precision=settings.precision, world=world)
        training = Training(pair, settings, batches, validation, stepper)
        _warn_of_long_schedules(training)
        agree(world, training.identity, training.tensors)
        _open_folder(training)
    return training


def _look_at(
    pair: Pair, data: object, objective: PyroELBO, valid: object, settings: Settings
) -> tuple[Structure, Source, Source | None]:
    """Looks at pair and data together, on the device, and refuses what can't be trained."""
    where, dtype = pair.place(settings.device, data)
    asked = 128 if settings.batch_size == "auto" else settings.batch_size
    structure, source = look_at(pair, data, where, dtype, asked)
    check_pair(structure, objective)
    check_data(structure, source)
    check_overcomplete(structure, source)
    if valid is None:
        return structure, source, None
    validation = as_source(valid, structure.device, structure.dtype, structure.axes)
    if isinstance(validation, LoaderSource):
        validation = validation.ordered()
    check_data(structure, validation, "valid")
    pair.checked_sources.add(validation)
    return structure, source, validation


def _make_batches(
    objective: PyroELBO, structure: Structure, source: Source, settings: Settings, world: World
) -> Batches:
    """The data cut into batches, on which the pair can be trained."""
    asked, rows = settings.batch_size, settings.rows_of_batch(source)
    check_whole(structure, source, None if asked == "auto" else asked)
    if structure.subsample_size is not None:
        rows = source.num_rows
    # With one batch an epoch the order is no matter, but to parameters of single rows.
    batches = Batches(source, rows, settings.seed, shuffle=rows < source.num_rows, world=world)
    size = batches.batch_size
    check_parts(world, objective, structure, source, size)
    check_batches(structure, batches)
    if isinstance(objective, Objective) and objective.refuses_batches:
        check_objective(objective, structure, batches)
    if settings.save_steps is not None and isinstance(source, LoaderSource):
        raise ArgumentError("save_steps", "data by index", "a DataLoader", ["pass loader.dataset"])
    return batches


def _open_folder(training: Training) -> None:
    """Goes on from the folder's checkpoint, or empties the folder; chooses the engine."""
    settings, world = training.settings, training.world
    file = settings.checkpoint_file if settings.resume else None
    saved = world.from_first(lambda: checkpoint.load(file) if file and file.exists() else None)
    before = None if saved is None else saved.meta["settings"].get("engine")
    training.stepper.engine = training.identity["engine"] = _choose_engine(training, before)
    if saved is not None:
        training.progress = restore(saved, training)
        training.generators = randomness.get_state()
        if world.is_first:
            training.progress.history.write(settings.history_file)
        training.set_epochs(settings.epochs)
    elif settings.overwrite and settings.folder is not None and world.is_first:
        settings.checkpoint_file.unlink(missing_ok=True)
        settings.history_file.unlink(missing_ok=True)


def _choose_engine(training: Training, before: Engine | None) -> Engine:
    """The engine asked for; ``"auto"`` is the one before, or the one that pays."""
    asked, world = training.settings.engine, training.world
    if asked != "auto":
        return asked
    if before is not None:
        return before
    rows = max(world.shares(training.batches.batch_size))
    steps = training.settings.epochs * training.steps_per_epoch
    return world.from_first(
        lambda: choose(training.stepper, lambda: first_batch(training.source, rows), steps)
    )


def _warn_of_long_schedules(training: Training) -> None:
    state, steps = training.stepper.state, training.num_steps
    for name, schedule in ({} if state is None else state.schedules).items():
        if schedule.settles_at > steps:
            warn(
                f"{name} reaches its end at step {schedule.settles_at}, but the training has "
                f"{steps} steps: it ends at {schedule(steps):.3g}. Shorten the schedule or train "
                "for longer."
            )

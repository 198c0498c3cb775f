"""A training set up: pair and data looked at together, and what the loop needs made of them."""

from __future__ import annotations

from pyro.infer import ELBO as PyroELBO

from pvae import checkpoint, distributed, randomness
from pvae.data import Batches, LoaderSource, Source, as_source, check_rows, first_batch
from pvae.distributed import World
from pvae.engine import Engine, Stepper, choose, make_optimizer
from pvae.errors import ArgumentError, PairError, oxford, warn
from pvae.fitting.checks import (
    check_batches,
    check_objective,
    check_overcomplete,
    check_parameters,
    check_plate,
)
from pvae.fitting.processes import agree, check_parts, warn_if_apart
from pvae.fitting.saving import restore
from pvae.fitting.settings import Settings
from pvae.fitting.training import Training
from pvae.objectives import Objective, as_objective
from pvae.pair import Pair, Structure
from pvae.terms import check_data

__all__ = ["set_up", "warn_of_stretching"]


def set_up(
    pair: Pair, data: object, objective: PyroELBO | None, valid: object, settings: Settings
) -> Training:
    """Checks everything, and makes a training that is new, or goes on from the folder's.

    Nothing in the folder is changed before all else has been checked.
    """
    world, objective = distributed.current(), as_objective(objective)
    warn_if_apart(world)
    if settings.patience is not None and valid is None:
        raise ArgumentError(
            "patience", "validation data to look at", "valid=None", ["valid=x_valid"]
        )
    with randomness.forked():  # data sets and samplers may draw, too
        structure, source, validation = _look_at(pair, data, objective, valid, settings)
        batches = _make_batches(objective, structure, source, settings, world)
        optimizer = make_optimizer(
            settings.optimizer, list(structure.parameters.values()), settings.lr
        )
        state = None
        if isinstance(objective, Objective):  # Pyro's own have none
            state = objective.make_state(structure, source.num_rows, 1, 1)  # until it has a length
        precision = settings.precision
        stepper = Stepper(
            structure, objective, optimizer, state, settings.clip_norm,
            precision=precision, world=world,
        )  # fmt: skip
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
    source = as_source(data, where, dtype)
    num_rows = min(settings.batch_size or source.num_rows, source.num_rows)
    try:
        structure = pair.inspect_source(source, num_rows)
    except PairError:
        check_rows(source)  # was it the data?
        raise
    check_parameters(structure)
    check_plate(objective, structure)
    if isinstance(objective, Objective):
        objective.check(structure)
    source = as_source(data, structure.device, structure.dtype)
    check_data(structure, source)
    check_overcomplete(structure, source)
    if valid is None:
        return structure, source, None
    validation = as_source(valid, structure.device, structure.dtype)
    check_data(structure, validation, "valid")
    pair.checked_sources.add(validation)
    return structure, source, validation


def _make_batches(
    objective: PyroELBO, structure: Structure, source: Source, settings: Settings, world: World
) -> Batches:
    """The data cut into batches, on which the pair can be trained."""
    rows = settings.batch_size
    if rows is None or structure.subsample_size is not None:
        rows = source.num_rows
    # With one batch an epoch the order is no matter, but to parameters of single rows.
    batches = Batches(source, rows, settings.seed, shuffle=rows < source.num_rows, world=world)
    size = batches.batch_size
    check_parts(world, objective, structure, source, size)
    check_batches(structure, source, size, world)
    if isinstance(objective, Objective) and objective.refuses_batches:
        check_objective(objective, structure, source, size, world)
    if settings.save_steps is not None and isinstance(source, LoaderSource):
        raise ArgumentError("save_steps", "data by index", "a DataLoader", ["pass loader.dataset"])
    return batches


def _open_folder(training: Training) -> None:
    """Goes on from the folder's checkpoint, or empties the folder; chooses the engine."""
    settings, is_first = training.settings, training.world.is_first
    saved = training.world.from_first(lambda: _saved(settings))
    if saved is not None:
        with randomness.forked():
            _set_engine(training, saved.meta["settings"].get("engine"))
            training.progress = restore(saved, training)
            training.generators = randomness.get_state()
        if is_first:
            training.progress.history.write(settings.history_file)
        warn_of_stretching(training, settings.epochs)
        training.progress.epochs = settings.epochs
        return
    _set_engine(training, None)
    if settings.overwrite and settings.folder is not None and is_first:
        settings.checkpoint_file.unlink(missing_ok=True)
        settings.history_file.unlink(missing_ok=True)


def _saved(settings: Settings) -> checkpoint.Checkpoint | None:
    """What there is to go on from."""
    if not settings.resume or not settings.checkpoint_file.exists():
        return None
    return checkpoint.load(settings.checkpoint_file)


def _set_engine(training: Training, before: Engine | None) -> None:
    engine = _engine_for(training, before)
    training.stepper.engine = training.identity["engine"] = engine


def _engine_for(training: Training, before: Engine | None) -> Engine:
    """The engine asked for; ``"auto"`` is the one before, or the one that pays."""
    asked = training.settings.engine
    if asked != "auto":
        return asked
    if before is not None:
        return before
    return training.world.from_first(lambda: _choose_engine(training))


def _choose_engine(training: Training) -> Engine:
    rows = max(training.world.shares(training.batches.batch_size))
    steps = training.settings.epochs * training.steps_per_epoch
    return choose(training.stepper, lambda: first_batch(training.source, rows), steps)


def warn_of_stretching(training: Training, epochs: int) -> None:
    """Warns, of a training that is to have another number of epochs, of what spans it."""
    before = training.progress.epochs
    if epochs != before and training.spanning:
        warn(
            f"{oxford(training.spanning)} spans the whole training, which was {before} epoch(s) "
            f"and now is {epochs}: it goes on as the longer one would at this step, so the result "
            "isn't that of one training of that length."
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

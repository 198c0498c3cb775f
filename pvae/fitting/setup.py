"""A training set up: pair and data looked at together, and what the loop needs made of them."""

from __future__ import annotations

from collections.abc import Mapping

from pyro.infer import ELBO as PyroELBO

from pvae import distributed, randomness
from pvae.data import Batches, LoaderSource, Source, as_source, first_batch
from pvae.devices import is_of_devices, same_device
from pvae.distributed import World
from pvae.engine import Engine, MixedStepper, Stepper, choose, make_optimizer
from pvae.errors import ArgumentError, PairError, warn
from pvae.fitting.checks import (
    check_batches,
    check_objective,
    check_overcomplete,
    check_pair,
    check_whole,
)
from pvae.fitting.folder import training_in
from pvae.fitting.identity import PairRecord
from pvae.fitting.kinds import check_state, mixed, one_training
from pvae.fitting.maker import made_of
from pvae.fitting.processes import agree, check_parts, warn_if_apart
from pvae.fitting.saving import restore
from pvae.fitting.settings import Settings
from pvae.fitting.training import Training
from pvae.objectives import Objective, as_objective
from pvae.pair import Pair, Structure
from pvae.terms import check_data, check_place, look_at

__all__ = ["set_up"]


def set_up(
    pair: Pair, data: object, objective: PyroELBO | None, valid: object, settings: Settings
) -> Training:
    """Checks everything, and makes a training that is new, or goes on from the folder's.

    Nothing in the folder is changed before all else has been checked.
    """
    world, objective, record = distributed.current(), as_objective(objective), PairRecord(pair)
    world.from_first(settings.check_folder)
    warn_if_apart(world)
    if world.size > 1:
        distributed.stop_with_launcher()
    if settings.patience is not None and valid is None:
        fixes = ["valid=x_valid"]
        raise ArgumentError("patience", "validation data to look at", "valid=None", fixes)
    named = dict(data) if isinstance(data, dict) else {"": data}
    if settings.mix is not None and not isinstance(data, dict):
        fixes = ["data={'labelled': (x, y), 'unlabelled': x_more}"]
        raise ArgumentError("mix", "several kinds of data, by name", type(data).__name__, fixes)
    with randomness.forked():  # data sets and samplers may draw, too
        looked = {name: _look_at(pair, part, objective, settings) for name, part in named.items()}
        structures = {name: structure for name, (structure, _) in looked.items()}
        together = one_training(structures)
        validation = _look_at_valid(pair, next(iter(together.values())), valid, len(named) > 1)
        parts = {
            name: _make_batches(objective, structure, looked[name][1], settings, world)
            for name, structure in together.items()
        }
        stepper = _make_stepper(objective, structures, together, parts, settings, world)
        batches = mixed(parts, settings, world) if len(parts) > 1 else next(iter(parts.values()))
        training = Training(pair, settings, batches, validation, stepper, record)
        _warn_of_long_schedules(training)
        if world.size > 1:
            agree(world, training)
        _open_folder(training)
    return training


def _look_at(
    pair: Pair, data: object, objective: PyroELBO, settings: Settings
) -> tuple[Structure, Source]:
    """Looks at pair and data together, on the device, and refuses what can't be trained."""
    asked = 128 if settings.batch_size == "auto" else settings.batch_size
    before = pair.home(data).device
    where, dtype = pair.place(settings.device, data)
    try:
        structure, source = look_at(pair, data, where, dtype, asked)
    except PairError as error:
        if settings.device != "auto" or same_device(where, before) or not is_of_devices(error):
            raise
        pair.place(before)
        structure, source = look_at(pair, data, before, dtype, asked)
        warn(f"The pair is trained on '{before}', as it doesn't run on '{where}': {error}")
    if settings.device != "auto":
        check_place(structure, where)
    check_pair(structure, objective)
    check_data(structure, source)
    check_overcomplete(structure, source)
    return structure, source


def _look_at_valid(
    pair: Pair,
    structure: Structure,
    valid: object,
    of_its_own: bool,  # noqa: FBT001
) -> Source | None:
    """The validation data, checked; of its own are those of one kind of several."""
    if valid is None:
        return None
    if of_its_own:
        structure, source = look_at(pair, valid, structure.device, structure.dtype)
    else:
        source = as_source(valid, structure.device, structure.dtype, structure.axes)
    if isinstance(source, LoaderSource):
        source = source.ordered()
    check_data(structure, source, "valid")
    pair.checked_sources.add(source)
    return source


def _make_stepper(
    objective: PyroELBO,
    looked: Mapping[str, Structure],
    structures: Mapping[str, Structure],
    parts: Mapping[str, Batches],
    settings: Settings,
    world: World,
) -> Stepper | MixedStepper:
    """What runs a step: one optimiser and one state of the objective, for each kind of data."""
    first = next(iter(structures.values()))
    optimizer = make_optimizer(settings.optimizer, list(first.parameters.values()), settings.lr)
    state = None
    if isinstance(objective, Objective):  # Pyro's own have none
        num_rows = sum(part.num_rows for part in parts.values())
        state = objective.make_state(first, num_rows, 1, 1)  # until it has a length
    steppers = {
        name: Stepper(
            *(structure, objective, optimizer, state, settings.clip_norm),
            precision=settings.precision,
            world=world,
        )
        for name, structure in structures.items()
    }
    if len(steppers) == 1:
        return next(iter(steppers.values()))
    check_state(objective, state)
    for name, own in looked.items():
        steppers[name].passes.announced = {*map(id, own.parameters.values())}
    return MixedStepper(steppers)


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
    """Goes on from the folder's checkpoint, if it is to; chooses the engine."""
    settings, world = training.settings, training.world
    if settings.folder is not None and not training.made:
        training.made = made_of(training.pair)
    folder = settings.folder if settings.resume else None
    saved = world.from_first(
        lambda: training_in(folder.checkpoint) if folder and folder.has_checkpoint() else None
    )
    before = None if saved is None else saved.meta["settings"].get("engine")
    training.stepper.engine = training.chosen = _choose_engine(training, before)
    if saved is not None:
        training.progress = restore(saved, training)
        training.generators = training.drawing.get()
        training.set_epochs(settings.epochs)


def _choose_engine(training: Training, before: Engine | None) -> Engine:
    """The engine asked for; ``"auto"`` is the one before, or the one that pays."""
    asked, world = training.settings.engine, training.world
    if asked != "auto":
        return asked
    if before is not None:
        return before
    rows = max(world.shares(training.batches.batch_size))
    steps = training.settings.epochs * training.steps_per_epoch
    stepper = training.stepper
    first = stepper.first if isinstance(stepper, MixedStepper) else stepper
    return world.from_first(
        lambda: choose(first, lambda: first_batch(training.source, rows), steps)
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

"""The exceptions of pvae, and the checks that raise them.

Every message says where (an argument, a site, a file), what was expected, what was there
instead, and what to try. The layout of messages is written here and nowhere else.
"""

from __future__ import annotations

import contextlib
import difflib
import html
import inspect
import itertools
import math
import operator
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pvae.memory import memory_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ContractError",
    "DataError",
    "FileError",
    "OutOfMemoryError",
    "PairError",
    "PvaeError",
    "PvaeWarning",
    "TrainingError",
    "UndefinedError",
    "as_given",
    "as_shape",
    "as_widths",
    "check_choice",
    "check_count",
    "check_file",
    "check_int",
    "check_memory",
    "check_number",
    "check_path",
    "escaped",
    "is_one_of",
    "is_out_of_memory",
    "oxford",
    "quoted",
    "shown",
    "telling_memory",
    "warn",
]


INNER = ("pvae.", "contextlib.")  # modules whose frames aren't a user's code


class PvaeError(Exception):
    """The base of pvae's exceptions.

    Arguments:
        where: The argument, site or file at fault.
        expected: What should have been there.
        actual: What was there.
        fixes: What to try, most likely first.

    With ``where`` alone that is the message: Pyro adds shapes to an error's text and raises it
    anew, with the first error as its cause.

    Example:
        >>> print(PvaeError("latent_dim", "an integer of at least 1", "0", ["latent_dim=2"]))
        latent_dim: expected an integer of at least 1; got 0.
          Try: latent_dim=2
    """

    def __init__(
        self, where: str, expected: str = "", actual: str | None = None, fixes: Sequence[str] = ()
    ) -> None:
        if expected:
            where, expected = shown(where).replace("\n", "\\n"), shown(expected)
            actual, fixes = actual and shown(actual), [shown(fix) for fix in fixes]
        self.where, self.expected, self.actual, self.fixes = where, expected, actual, tuple(fixes)
        got = "" if actual is None else f"; got {actual}"
        lines = [f"{where}: expected {expected}{got}." if expected else where]
        lines += [("  Try: " if i == 0 else "   or: ") + fix for i, fix in enumerate(self.fixes)]
        super().__init__("\n".join(lines))

    def one_line(self) -> str:
        """The same message on one line, as the command line prints it."""
        return " ".join(line.strip() for line in str(self).splitlines())


class ArgumentError(PvaeError, ValueError):
    """An argument has a value that can't be used."""


class DataError(PvaeError, ValueError):
    """The data can't be used: shape, type, missing values, values outside the support."""


class PairError(PvaeError, ValueError):
    """The model and the guide don't fit each other, the batch, or the tool."""


class UndefinedError(PvaeError, ValueError):
    """The quantity has no meaning for this pair, so no number is returned for it."""


class TrainingError(PvaeError, RuntimeError):
    """Training can't go on; the pair is in the state before the step that failed."""


class CheckpointError(PvaeError, RuntimeError):
    """A checkpoint is damaged, foreign, or belongs to another run."""


class FileError(PvaeError, OSError):
    """A file or folder can't be read or written, or another process is writing there."""


class OutOfMemoryError(PvaeError, MemoryError):
    """What was asked for doesn't fit into memory."""


class ContractError(PvaeError, AssertionError):
    """A part or a pair breaks a rule of its contract; raised by `pvae.testing`."""


class PvaeWarning(UserWarning):
    """Something that pvae goes on with, but that a modeller should know."""


_FULL = ("out of memory", "can't allocate memory", "not enough memory", "_ALLOC_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is that memory is full: the host's or a device's.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
    """
    if error is None or isinstance(error, MemoryError):
        return error is not None
    is_full = isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)
    return is_full or is_out_of_memory(error.__cause__)


@contextlib.contextmanager
def telling_memory(where: str, rows: int | None, option: str | None = "max_rows") -> Iterator[None]:
    """Tells that memory is full by an `OutOfMemoryError`, with the option that takes fewer rows.

    Arguments:
        where: What needs the memory.
        rows: How many rows go through the networks at once; None for all of the data.
        option: The argument that bounds them; None where none does.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        first, *_ = (str(error).strip() or type(error).__name__).splitlines()
        fewer = 128 if rows is None else max(1, rows // 4)
        expected = f"memory for {'all' if rows is None else rows} rows at once"
        fixes = [f"{option}={fewer}"] if option else [f"batch_size={fewer}, in a training"]
        raise OutOfMemoryError(where, expected, first, fixes) from error


def shown(text: str) -> str:
    r"""Text as it can be shown anywhere, what a terminal would act on written out.

    Names come from data and from files: a control character in one could clear a screen, reverse
    a line, or be no character at all.

    Example:
        >>> print(shown("a\x1b[2Jb"), shown("z ~ N(0, σ²)"))
        a\x1b[2Jb z ~ N(0, σ²)
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _written_out(c) for c in text)


def escaped(text: str) -> str:
    """Text as it can stand in a page of HTML.

    Example:
        >>> escaped("<b>z</b> & more")
        '&lt;b&gt;z&lt;/b&gt; &amp; more'
    """
    return html.escape(shown(text))


def quoted(value: object) -> str:
    """A value on one line, short, whatever it is: what a message says was there instead.

    Example:
        >>> quoted("a" * 1000)[-25:], quoted([1.0, 2.0])
        ('aaa... (1002 characters)', '[1.0, 2.0]')
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number of too many digits, lists nested too deep, a repr of someone's own
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


_LONGEST = 120  # characters of a value in a message


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode()


def oxford(names: Iterable[object]) -> str:
    """Joins names for a sentence.

    Example:
        >>> oxford(["z1", "z2", "x"])
        "'z1', 'z2' and 'x'"
    """
    quoted = [f"'{name}'" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def warn(text: str) -> None:
    """Warns with a `PvaeWarning` that points at the line of a user's code that led to it."""
    depth, frame = 1, inspect.currentframe()
    while frame and frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(INNER):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(shown(text), PvaeWarning, stacklevel=depth)


_LARGEST = 2**63 - 1
"""The largest integer that torch and NumPy hold."""


def check_int(where: str, value: object, minimum: int = 1) -> int:
    """Returns ``value`` as an int, or raises an `ArgumentError`.

    It must be at least ``minimum``, and at most what torch and NumPy hold in 64 bits.
    """
    try:
        number = minimum - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError, ValueError):  # as of tensors and arrays
        number = minimum - 1
    fixes = as_given(where, str(max(minimum, 1)))
    if number < minimum:
        raise ArgumentError(where, f"an integer of at least {minimum}", quoted(value), fixes)
    if number > _LARGEST:
        raise ArgumentError(where, f"an integer of at most {_LARGEST}", quoted(value), fixes)
    return number


def check_number(
    where: str,
    value: object,
    *,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
) -> float:
    """Returns ``value`` as a finite float within the limits, or raises an `ArgumentError`."""
    limits = [
        ("above", above, operator.gt),
        ("of at least", minimum, operator.ge),
        ("below", below, operator.lt),
        ("of at most", maximum, operator.le),
    ]
    given = [(words, limit, holds) for words, limit, holds in limits if limit is not None]

    def fits(number: float) -> bool:
        return math.isfinite(number) and all(holds(number, limit) for _, limit, holds in given)

    number = _as_float(value)
    if not fits(number):
        bounds = " and ".join(f"{words} {limit:g}" for words, limit, _ in given)
        candidates = (1.0, 0.5, 0.1, 2.0, *(limit for _, limit, _ in given))
        fixes = as_given(where, next((f"{n:g}" for n in candidates if fits(n)), ""))
        raise ArgumentError(where, f"a finite number {bounds}".rstrip(), quoted(value), fixes)
    return number


def _as_float(value: object) -> float:
    """A number, also one in an array; NaN for what is none: text, a truth value, several."""
    if isinstance(value, (str, bytes, bool)):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def as_given(where: str, value: str) -> list[str]:
    """How the argument, option or field of this name is given a value; nothing if it has none."""
    name = where.rpartition(".")[2]
    if name.startswith("--"):
        return [f"{name} {value}"]
    return [f"{name}={value}"] if value and name.isidentifier() else []


def check_choice(where: str, value: object, choices: Iterable[object]) -> None:
    """Raises an `ArgumentError` if ``value`` isn't one of ``choices``."""
    choices = list(choices)
    if not is_one_of(value, choices):
        near = difflib.get_close_matches(str(value), map(str, choices), 1) if choices else []
        best = [choice for choice in choices if str(choice) in near] or choices
        fixes = [fix for choice in best[:2] for fix in as_given(where, repr(choice))]
        raise ArgumentError(where, f"one of {oxford(choices)}", quoted(value), fixes)


def is_one_of(value: object, choices: Iterable[object]) -> bool:
    """Whether a value is one of several, also as NumPy has it; 1 is no truth value.

    Example:
        >>> is_one_of(1, (True, False)), is_one_of("linear", ("linear", "spherical"))
        (False, True)
    """
    if getattr(value, "shape", None) == ():
        with contextlib.suppress(AttributeError, RuntimeError):
            value = value.item()  # type: ignore[attr-defined]
    is_truth = isinstance(value, bool)
    return any(
        value is choice or (isinstance(value, type(choice)) and not is_truth and value == choice)
        for choice in choices
    )


def check_path(where: str, path: str | Path) -> Path:
    """Returns a path, or raises an `ArgumentError`; an empty one would be the folder at hand."""
    if not isinstance(path, (str, Path)) or not str(path).strip() or "\0" in str(path):
        fixes = ["'.', for the folder at hand"]
        raise ArgumentError(where, "the path of a folder or file", quoted(path), fixes)
    return Path(path)


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def check_file(path: Path, error: type[PvaeError], most: int | None = None) -> None:
    """Refuses what isn't a file with something in it: a folder, a device, a pipe that never ends.

    Arguments:
        path: The file.
        error: What to raise.
        most: Most bytes that it may have; None for any number.
    """
    expected, fixes = "a file with something in it", ["is the path right?"]
    try:
        status = path.stat()
    except (OSError, ValueError) as found:
        raise error(
            str(path), expected, getattr(found, "strerror", None) or str(found), fixes
        ) from found
    if not stat.S_ISREG(status.st_mode):
        raise error(
            str(path), expected, _KINDS.get(stat.S_IFMT(status.st_mode), "something else"), fixes
        )
    if status.st_size == 0:
        raise error(str(path), expected, "an empty one", fixes)
    if most is not None and status.st_size > most:
        raise error(str(path), f"a file of at most {most} bytes", f"one of {status.st_size}", fixes)


def check_memory(
    where: str,
    num_bytes: int,
    actual: str,
    fixes: Sequence[str] = (),
    device: torch.device | None = None,
) -> None:
    """Raises an `OutOfMemoryError` for what can't fit: it takes more memory than there is at all.

    Arguments:
        where: The argument that asks for it.
        num_bytes: How much it takes, at the least.
        actual: What was asked for.
        fixes: What to try.
        device: Where it would be; None for the host.
    """
    there = memory_of(device)
    if num_bytes > there:
        expected = f"what fits into the {_gib(there)} of memory that there are"
        raise OutOfMemoryError(where, expected, f"{actual}, which takes {_gib(num_bytes)}", fixes)


def check_count(where: str, count: int, each: int, device: torch.device | None = None) -> None:
    """Raises an `OutOfMemoryError` for a number of things that can't fit, with one that would.

    Arguments:
        where: The argument that counts them.
        count: How many are asked for.
        each: Bytes of one.
        device: Where they would be; None for the host.
    """
    most = max(1, memory_of(device) // (2 * max(1, each)))  # which leaves some for the work
    rounded = most // 10 ** (len(str(most)) - 1) * 10 ** (len(str(most)) - 1)
    check_memory(where, int(count) * each, f"{count}", as_given(where, str(rounded)), device)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes < 2**70 else "more than a billion TiB"


def as_widths(where: str, widths: int | Iterable[int]) -> tuple[int, ...]:
    """Returns the widths of layers, one after another, as a tuple; an integer is one layer's.

    Raises:
        ArgumentError: If it is no integer of at least 1, nor several of them.
        OutOfMemoryError: If the weights between them, in single precision, wouldn't fit.

    Example:
        >>> as_widths("hidden", 64), as_widths("hidden", range(1, 4))
        ((64,), (1, 2, 3))
    """
    sizes = _sizes(where, widths)
    weights = sum(map(math.prod, itertools.pairwise((1, *sizes, 1))))
    check_memory(where, 4 * weights, quoted(widths), as_given(where, "(256, 256)"))
    return sizes


def _sizes(where: str, sizes: int | Iterable[int]) -> tuple[int, ...]:
    several: tuple[object, ...] = (sizes,)
    with contextlib.suppress(TypeError):  # not for several: a number, also in an array
        several = several if isinstance(sizes, (str, bytes)) else tuple(sizes)  # type: ignore[arg-type]
    return tuple(check_int(where, size) for size in several)


def as_shape(where: str, shape: int | Iterable[int], least: int = 0) -> tuple[int, ...]:
    """Returns an event shape as a tuple; an integer is a vector of that length.

    Arguments:
        where: What the shape is of.
        shape: The shape.
        least: How many axes it has to have.

    Raises:
        ArgumentError: If it is no integer of at least 1, nor several of them.
        OutOfMemoryError: If one array of that shape, in single precision, wouldn't fit.

    Example:
        >>> as_shape("event_shape", 784), as_shape("event_shape", (1, 28, 28))
        ((784,), (1, 28, 28))
    """
    sizes = _sizes(where, shape)
    if len(sizes) < least:
        expected = "a shape with at least one axis"
        raise ArgumentError(where, expected, quoted(shape), as_given(where, "1"))
    check_memory(where, 4 * math.prod(sizes), quoted(shape), as_given(where, "256"))
    return sizes

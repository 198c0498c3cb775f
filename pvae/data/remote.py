"""Downloads of public data sets, checked against their published checksums."""

from __future__ import annotations

from pathlib import Path

from pvae.annotations import strict
from pvae.errors import ArgumentError, DataError

__all__ = ["FILES", "REMOTE", "download"]

FILES = tuple(
    f"{p}-{k}-ubyte.gz" for p in ("train", "t10k") for k in ("images-idx3", "labels-idx1")
)
"""Names of a data set's four IDX files where it is downloaded from."""

REMOTE: dict[str, tuple[str, tuple[str, ...]]] = {
    "mnist": (
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
         "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    "fashion_mnist": (
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
        ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
         "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
    "kmnist": (
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        ("bdb82020997e1d708af4cf47b453dcf7", "e144d726b3acfaa3e44228e80efcd344",
         "5c965bf0a639b31b8f53240b1b52f4d7", "7320c461ea6c1c855c0b718fb2a4b134"),
    ),
}  # fmt: skip
"""Name -> where its four IDX files are, and their MD5 sums."""


@strict
def download(name: str, data_dir: str | Path, base_url: str | None = None) -> Path:
    """Downloads a data set of the MNIST family into ``data_dir / name``.

    Files that are there with the right checksum aren't fetched again; a file whose checksum is
    wrong never takes the place of one that is there. Needs pooch (``pip install pvae[download]``).

    Arguments:
        name: ``mnist``, ``fashion_mnist`` or ``kmnist``.
        data_dir: Folder for data sets.
        base_url: A mirror, ending in a slash.

    Returns:
        The folder with the files.

    Raises:
        ArgumentError: If the name is unknown, or pooch isn't installed.
        DataError: If a file can't be fetched or has the wrong content.
    """
    if name not in REMOTE:
        raise ArgumentError("download", f"one of {', '.join(REMOTE)}", repr(name))
    try:
        import pooch
    except ImportError:
        fixes = ["pip install 'pvae[download]'"]
        raise ArgumentError("download", "the package pooch", "none", fixes) from None
    url, sums = REMOTE[name]
    folder = Path(data_dir) / name
    for file, md5 in zip(FILES, sums, strict=True):
        source = (base_url or url) + file
        try:
            pooch.retrieve(source, known_hash=f"md5:{md5}", fname=file, path=folder)
        except (OSError, ValueError) as error:
            got = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            fixes = ["another mirror: base_url=...", f"put the file into {folder} yourself"]
            raise DataError(source, f"a file with MD5 sum {md5}", got, fixes) from error
    return folder

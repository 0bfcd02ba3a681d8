"""How counts, figures and times are written, wherever a person reads them."""

from __future__ import annotations

from pathlib import Path


def counted(number: int, what: str) -> str:
    """Write how many there are of something.

    Example:
        >>> counted(1, "task"), counted(5, "task")
        ('1 task', '5 tasks')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def rounded(value: float, digits: int = 1, sign: str = "") -> str:
    """Write a figure, and never a negative zero.

    Example:
        >>> rounded(-1.25), rounded(-0.01), rounded(-0.01, sign="+")
        ('-1.2', '0.0', '+0.0')
    """
    return f"{value:{sign}z.{digits}f}"


def duration(seconds: float) -> str:
    """Say how long something takes.

    Example:
        >>> duration(4.2), duration(200), duration(5000), duration(200000)
        ('4 s', '3 min', '1 h 23 min', '2 d 8 h')
    """
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 24:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def data_label(data: str) -> str:
    """Name a data set in a word, whether it is given by name, by its file or by its folder.

    Args:
        data: As for ``cl-merge run data=``.

    Returns:
        The last part of a path or hub id, of a file without its ending; otherwise the name itself.

    Example:
        >>> data_label("cifar100"), data_label("mine/cifar10.yaml"), data_label("/photos/v1.5")
        ('cifar100', 'cifar10', 'v1.5')
    """
    path = Path(data)
    return path.stem if path.suffix in (".yaml", ".yml", ".parquet") else path.name

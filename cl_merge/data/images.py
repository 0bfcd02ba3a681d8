"""Labelled images on their way from a table to a data loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cl_merge.data.sampling import Draw, generators_kept, seed_generators
from cl_merge.data.tasks import Indices
from cl_merge.errors import InputError, unknown_name, was_interrupted

if TYPE_CHECKING:
    import datasets

Transform: TypeAlias = Callable[[Image.Image], Tensor]


class Sample(NamedTuple):
    """One image or, collated, one batch of B.

    Attributes:
        image: The transformed image, float32 [3, H, W] or [B, 3, H, W].
        label: The global label, an integer or int64 [B].
        task: Index of the task that the image belongs to, an integer or int64 [B].
    """

    image: Tensor
    label: int | Tensor
    task: int | Tensor


class ImageTable:
    """One split of a data set: its images, labels and domains, none decoded before it is asked for.

    Args:
        rows: A split of a `datasets` data set.
        image: The column with the images, their bytes or the paths of their files.
        label: The column with the labels: `ClassLabel`, whole numbers, or strings.
        domain: The column with the domains, if there is one: `ClassLabel` or strings.
        where: What the split is called in messages.

    Raises:
        InputError: If a column is missing, or that of the images has none; says which argument
            names it.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image: str = "image",
        label: str = "label",
        domain: str | None = None,
        *,
        where: str = "train",
    ) -> None:
        self._columns = {"image": image, "label": label, "domain": domain}
        for kind, column in self._columns.items():
            if column is not None and column not in rows.column_names:
                error = unknown_name(f"column of the {where} split", column, rows.column_names)
                raise InputError(f"{error}; name the one with the {kind}s: {kind}=...")
        self.where = where
        self._rows = _with_images(rows, image, where)
        self._decoded: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def values(self, kind: str) -> list[str] | Indices:
        """Read ``"label"`` or ``"domain"`` of all rows: strings, or int64 [N]. Decodes no image.

        Raises:
            InputError: If a row has none, or several.
        """
        name = self._columns[kind]
        rows = self._rows.select_columns([name])
        column = rows.with_format("arrow")[:][name]
        if column.type.num_fields:
            raise InputError(
                f"column '{name}' of the {self.where} split has {rows.features[name]} for each "
                f"image; expected one {kind}: a whole number, a string or a ClassLabel"
            )
        missing = column.is_null(nan_is_null=True).index(True).as_py()
        if missing >= 0:
            raise InputError(
                f"row {missing} of the {self.where} split, column '{name}', has no {kind}; remove "
                "the row, or fill it in"
            )
        found = rows.with_format("numpy")[name][:]
        if np.issubdtype(np.asarray(found).dtype, np.integer):
            return np.asarray(found, dtype=np.int64)
        return [str(value) for value in found]

    def names(self, kind: str) -> list[str] | None:
        """The names that a `ClassLabel` column carries, or None for any other column."""
        feature = self._rows.features[self._columns[kind]]
        return list(feature.names) if hasattr(feature, "names") else None

    def image(self, row: int) -> Image.Image:
        """Decode one image to RGB; `InputError` if its bytes are no image."""
        if row in self._decoded:
            return self._decoded[row].copy()  # a transform may draw into it
        column = self._columns["image"]
        try:
            return as_rgb(self._rows[int(row)][column])
        # Readers of image formats raise whatever damaged bytes lead them to.
        except Exception as error:
            if was_interrupted(error):
                raise
            raise InputError(
                f"row {row} of the {self.where} split, column '{column}', is no readable "
                f"image ({error}); remove the row, replace the file, or leave out what cannot be "
                "read with unreadable=skip"
            ) from error

    def keep_decoded(self, rows: Indices, limit: float) -> None:
        """Decode images once and keep them, so that later epochs do not decode again.

        None is added to what takes more than `limit` bytes.
        """
        size = sum(map(_bytes, self._decoded.values()))
        for row in rows.tolist():
            if size > limit:
                return
            if row not in self._decoded:
                self._decoded[row] = self.image(row)
                size += _bytes(self._decoded[row])

    def decoded_bytes(self, count: int) -> int:
        """Estimate how many bytes so many decoded images take, from a few all over the split."""
        sizes = []
        for row in sorted({len(self) * part // 8 for part in range(8)}):
            with suppress(InputError):  # one that cannot be read may be left out of all tasks
                sizes.append(_bytes(self.image(row)))
        return sum(sizes) * count // max(len(sizes), 1)


def as_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any mode into one of three channels of 8 bits.

    Grey values of 16 bits are scaled; Pillow by itself cuts them off at 255, which is white.

    Example:
        >>> grey = Image.fromarray(np.full((1, 1), 32896, dtype=np.uint16))
        >>> as_rgb(grey).getpixel((0, 0))
        (128, 128, 128)
    """
    # Of a PNG mode I is 16 bits, too, in some versions of Pillow.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


class ImageDataset(Dataset[Sample]):
    """Some rows of an `ImageTable`, transformed, each with its label and task.

    Indexed with a `Draw`, the transform draws from generators seeded for it, which are put back
    afterwards; indexed with a number, it draws from them as they are.

    Args:
        table: Where the images come from.
        rows: Which rows, int64 [N].
        labels: Labels of all rows of the table, int64.
        tasks: Task index of all rows of the table, int64.
        transform: Turns an image into a float tensor [3, H, W].
    """

    def __init__(
        self,
        table: ImageTable,
        rows: Indices,
        labels: Indices,
        tasks: Indices,
        transform: Transform,
    ) -> None:
        self.rows = rows
        self._table = table
        self._labels = labels[rows]
        self._tasks = tasks[rows]
        self.transform = transform

    def picture(self, index: int) -> Image.Image:
        """Decode an image, before it is transformed."""
        return self._table.image(int(self.rows[index]))

    def label_and_task(self, index: int) -> tuple[int, int]:
        """The global label of an image, and the index of its task."""
        return int(self._labels[index]), int(self._tasks[index])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | Draw) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | Draw]) -> list[Sample]:
        """Load the samples of a batch at once, as a data loader asks for them."""
        drawn = any(isinstance(index, Draw) for index in indices)
        # To keep the generators takes ten times as long as to seed them: once for a batch.
        with generators_kept() if drawn else nullcontext():
            return [self._load(index) for index in indices]

    def _load(self, index: int | Draw) -> Sample:
        if isinstance(index, Draw):
            seed_generators(index.seed)
            index = index.index
        return Sample(self.transform(self.picture(index)), *self.label_and_task(index))


def _with_images(rows: datasets.Dataset, column: str, where: str) -> datasets.Dataset:
    """Have the images of a column decoded, whoever wrote them and whatever the rows' format."""
    import datasets

    if rows.format["type"] == "custom":  # the user's own function decodes
        return rows
    rows, feature = rows.with_format(None), rows.features[column]
    if isinstance(feature, datasets.Image) and feature.decode:
        return rows
    try:
        return rows.cast_column(column, datasets.Image())
    # What cannot be cast raises errors of `datasets` and of its libraries, with no common base.
    except Exception as error:
        raise InputError(
            f"column '{column}' of the {where} split holds {feature}; expected images, their bytes "
            "or the paths of their files: name the column that does with image=..."
        ) from error


def _bytes(image: Image.Image) -> int:
    return 3 * image.width * image.height

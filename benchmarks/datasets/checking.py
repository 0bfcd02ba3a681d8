"""What a run needs, compared with what there is before anything is downloaded or trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_merge.benchmarks.datasets.catalog import (
    DataEntry,
    find_data,
    find_source,
    is_on_hub,
    open_data,
)
from cl_merge.benchmarks.datasets.loading import probe_configs, read_class_names, settings_of
from cl_merge.config.schema import RunConfig, StreamConfig
from cl_merge.data.hub import SPARE, Needs, describe_hub, existing, size
from cl_merge.data.hub_cache import read_cached
from cl_merge.data.images import as_rgb
from cl_merge.data.sources import without_bars
from cl_merge.data.tables import domain_expression, file_domain, parts_of, splits_read
from cl_merge.errors import InputError, listing
from cl_merge.models.pretrained import model_download

if TYPE_CHECKING:
    import datasets

OK, DIFFERS, MISSING = "ok", "differs", "missing"


@dataclass(frozen=True)
class Finding:
    """One thing that a run needs: what is expected of it and what was found."""

    subject: str  # the data set, the model or "here"
    what: str
    expected: str
    found: str
    state: str  # `OK`, `DIFFERS` or `MISSING`


@dataclass(frozen=True)
class DataUse:
    """How runs use a data set: where it comes from and what their settings say of it."""

    entry: DataEntry
    source: str | None  # None for what its entry says
    stream: StreamConfig
    class_names: Any


@dataclass(frozen=True)
class _Found:
    """What a data set turned out to be, before its images are read."""

    where: str
    splits: Sequence[str]
    rows: Mapping[str, int]
    features: datasets.Features
    first: Callable[[str], Mapping[str, Any]]  # a row of a split, its image not decoded
    needs: Needs


def check_runs(configs: Iterable[RunConfig], out: Path) -> list[Finding]:
    """Compare what runs need with what there is: data sets, models, disk, folders.

    Of the hub it reads what it says of its files, and one row of each data set.

    Args:
        configs: Of the runs.
        out: Where they will write.

    Returns:
        What was found: first the data sets, then the models, then this machine.
    """
    configs = list(configs)
    uses = data_uses(configs)
    models = list(dict.fromkeys(config.model for config in configs))
    # One after another: `datasets` is not made for threads.
    with without_bars():
        of_data = [check_data(use) for use in uses]
    found = [finding for findings, _ in of_data for finding in findings]
    needs = [needs for _, needs in of_data]
    for model in models:
        state, download = OK, 0
        try:
            download = model_download(model)
            told = f"{size(download)} to download" if download else "here"
        except InputError as error:
            state, told = MISSING, _one_line(error)
        found.append(Finding(model, "weights", "to be had", told, state))
        needs.append(Needs(download, 0))
    return [*found, *_check_here(needs, out)]


def data_needs(configs: Iterable[RunConfig]) -> dict[str, Needs | str]:
    """What of each data set of runs is still to be downloaded, or why that is not known, by name.

    Data sets that are here, or in the cache, are left out.
    """
    found: dict[str, Needs | str] = {}
    for use in data_uses(configs):
        try:
            source = use.source or find_source(use.entry)
            needs = _cached_or_told(source, use.stream)[1] if is_on_hub(source) else None
        except InputError as error:
            found[use.entry.name] = str(error)
            continue
        if needs is not None:
            found[use.entry.name] = needs
    return found


def data_uses(configs: Iterable[RunConfig]) -> list[DataUse]:
    """The data sets that runs read, each once."""
    # A suite has many runs of the same data.
    every = [each for config in configs for each in (config, *probe_configs(config).values())]
    differing = {repr((c.data, c.source, c.stream, c.class_names)): c for c in every}
    found = [use for config in differing.values() for use in _uses(config)]
    return list({_key(use): use for use in found}.values())


def _uses(config: RunConfig) -> Iterator[DataUse]:
    entry = find_data(config.data)
    if not entry.sources:
        yield DataUse(entry, config.source, config.stream, config.class_names)
    revisions = config.stream.revision if isinstance(config.stream.revision, Mapping) else {}
    for name in entry.sources:
        one = find_data(name)
        recipe = settings_of(one)
        revision = revisions.get(one.name, recipe.stream.revision)
        # A task is all of it: its own order and scenario do not count.
        stream = replace(recipe.stream, revision=revision, scenario="class", order="natural")
        yield DataUse(one, None, stream, recipe.class_names)


def check_data(use: DataUse) -> tuple[list[Finding], Needs]:
    """Compare a data set with what its recipe and a run's settings say of it."""

    def finding(what: str, expected: object, found: object, state: str) -> Finding:
        return Finding(use.entry.name, what, str(expected), str(found), state)

    source = use.source or use.entry.source or "a local copy"
    try:
        found = _find(use.source or find_source(use.entry), use.stream)
    # Whatever its source raises: no network, no access, no such commit, no such folder.
    except Exception as error:
        return [finding("source", source, _one_line(error), MISSING)], Needs(0, 0)
    findings = [finding("source", source, found.where, OK)]
    for what, expected, compare in (
        ("splits", "", _splits),
        ("columns", "", _columns),
        ("classes", "", _classes),
        ("domain of one image", "", _domains),
        ("one image", "readable", _first_image),
    ):
        try:
            findings += [finding(*told) for told in compare(use, found)]
        # A row or a setting that does not fit says so in its own way.
        except Exception as error:
            findings.append(finding(what, expected, _one_line(error), DIFFERS))
    return findings, found.needs


_Told = tuple[str, object, object, str]


def _splits(use: DataUse, found: _Found) -> Iterator[_Told]:
    stream, facts = use.stream, use.entry.facts
    read = splits_read(stream.train_split, stream.test_split, stream.test_fraction)
    if not set(parts_of(read)) <= set(found.splits):
        yield "splits", listing(read), listing(found.splits), MISSING
        return
    yield "splits", listing(read), listing(found.splits, limit=3), OK
    numbers = {s: sum(found.rows.get(part, 0) for part in s.split("+")) for s in read}
    known = {"train": "train", "test": "test"}
    expected = {s: facts.get(k) for s, k in zip(read, known, strict=False)}
    recipe = settings_of(use.entry).stream
    if recipe.test_fraction is not None and stream.test_fraction is not None and facts:
        expected = {read[0]: facts.get("train", 0) + facts.get("test", 0)}
    if use.entry.facts and read == splits_read(
        recipe.train_split, recipe.test_split, recipe.test_fraction
    ):
        for split, number in expected.items():
            if number and all(part in found.rows for part in split.split("+")):
                state = OK if numbers[split] == number else DIFFERS
                yield f"images of {split}", number, numbers[split], state


def _columns(use: DataUse, found: _Found) -> Iterator[_Told]:
    import datasets

    stream = use.stream
    wanted = [c for c in (stream.image, stream.label, stream.domain) if c is not None]
    missing = [column for column in wanted if column not in found.features]
    if missing:
        yield "columns", listing(wanted), listing(found.features, limit=9), MISSING
    elif not isinstance(found.features[stream.image], datasets.Image):
        kind = type(found.features[stream.image]).__name__
        yield f"column {stream.image}", "Image", kind, DIFFERS
    else:
        yield "columns", listing(wanted), listing(found.features, limit=9), OK


def _classes(use: DataUse, found: _Found) -> Iterator[_Told]:
    stream, number = use.stream, use.entry.facts.get("classes")
    names = _names(found.features, stream.label)
    if names is None:
        yield "classes", number or "any", "not told before the labels are read", OK
        if isinstance(stream.order, list) and stream.scenario == "class":
            first = str(found.first(parts_of([stream.train_split])[0])[stream.label])
            state = OK if first in stream.order else DIFFERS
            yield "class of one image", f"one of {len(stream.order)} listed", first, state
        return
    state = OK if number in (None, len(names)) else DIFFERS
    yield "classes", number or "any", f"{len(names)}: {listing(names, limit=2)}", state
    worded = read_class_names(use.class_names, names)
    repeated = sorted({name for name in worded if worded.count(name) > 1 or not name.strip()})
    if repeated:
        yield "class names", "all different", f"repeated: {listing(repeated)}", DIFFERS
    if stream.scenario == "class":
        yield from _order(stream.order, names, "class")


def _domains(use: DataUse, found: _Found) -> Iterator[_Told]:
    stream = use.stream
    if stream.domain is None and stream.domain_pattern is None:
        return
    number = use.entry.facts.get("domains")
    names = _names(found.features, stream.domain) if stream.domain else None
    if names is not None:
        state = OK if number in (None, len(names)) else DIFFERS
        yield "domains", number or "any", listing(names, limit=6), state
        yield from _order(stream.order, names, "domain")
        return
    row = found.first(parts_of([stream.train_split])[0])
    if stream.domain is not None:
        first = str(row[stream.domain])
    else:
        expression = domain_expression(str(stream.domain_pattern))
        first = file_domain(expression, row[stream.image].get("path"), "the first image")
    known = [str(name) for name in stream.order] if isinstance(stream.order, list) else [first]
    state = OK if first in known else DIFFERS
    yield "domain of one image", listing(known), first, state


def _first_image(use: DataUse, found: _Found) -> Iterator[_Told]:
    import datasets

    row = found.first(parts_of([use.stream.train_split])[0])
    image = as_rgb(datasets.Image().decode_example(row[use.stream.image]))
    yield "one image", "readable", f"{image.width} x {image.height} pixels", OK


def _order(order: Any, names: Sequence[str], kind: str) -> Iterator[_Told]:
    if isinstance(order, list):
        text = all(isinstance(item, str) for item in order)
        known = set(names) if text else set(range(len(names)))
        others = [str(item) for item in known.symmetric_difference(order)]
        told = f"not in both: {listing(others)}" if others else "the same"
        yield f"{kind} order", f"{len(order)} listed", told, DIFFERS if others else OK


def _names(features: datasets.Features, column: str | None) -> list[str] | None:
    return list(features[column].names) if hasattr(features.get(column), "names") else None


def _find(source: str, stream: StreamConfig) -> _Found:
    """Find out what a data set is, from the cache, the hub, or where it lies."""
    if not is_on_hub(source):
        return _found_here(open_data(source), stream, "made here" if ":" in source else "here")
    found, needs = _cached_or_told(source, stream)
    if needs is None:
        return _found_here(found, stream, "in the cache")
    told = found.with_footers()
    where, features = f"on the hub; {needs}", told.features
    return _Found(where, list(told.files), told.rows, features, told.first_row, needs)


def _cached_or_told(source: str, stream: StreamConfig) -> tuple[Any, Needs | None]:
    """The splits that a stream reads if the cache has them, or what the hub says of them."""
    parts = parts_of(splits_read(stream.train_split, stream.test_split, stream.test_fraction))
    revision = None if stream.revision is None else str(stream.revision)
    cached = read_cached(source, revision, parts) if revision else None
    if cached is not None:
        return cached, None
    told = describe_hub(source, revision)
    return told, told.needs([part for part in parts if part in told.files])


def _found_here(splits: Mapping[str, datasets.Dataset], stream: StreamConfig, where: str) -> _Found:
    import datasets

    def first(split: str) -> Mapping[str, Any]:
        rows = splits[split].select(range(1))
        row: Mapping[str, Any] = rows.cast_column(stream.image, datasets.Image(decode=False))[0]
        return row

    rows = {split: len(images) for split, images in splits.items()}
    features = next(iter(splits.values())).features
    return _Found(where, list(splits), rows, features, first, Needs(0, 0))


def _check_here(needs: Sequence[Needs], out: Path) -> Iterator[Finding]:
    import datasets
    from huggingface_hub import constants

    for path, wanted, free in sum(needs, Needs(0, 0)).by_disk():
        state = OK if not wanted or wanted + SPARE <= free else MISSING
        yield Finding("here", f"disk at {path}", size(wanted), f"{size(free)} free", state)
    caches = Path(constants.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)
    for folder in dict.fromkeys((out, *caches)):
        can = os.access(existing(folder), os.W_OK)
        told = "it can be" if can else "it cannot be"
        yield Finding("here", f"folder {folder}", "can be written", told, OK if can else MISSING)


def _key(use: DataUse) -> str:
    stream = use.stream
    read = stream.train_split, stream.test_split, stream.test_fraction, stream.scenario
    return repr((use.entry.name, use.source, stream.revision, read))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

"""Ways to follow drifting features: against what they are on features made up for it."""

import pytest
import torch

from cl_merge.benchmarks.studies.drift_compensation import (
    WAYS,
    Streamed,
    _crop,
    _drifted,
    measure,
)
from cl_merge.class_statistics import ClassGaussians, FeatureMoments, unit

SIZE, CLASSES = 8, 6


def streamed(drift):
    """Two tasks of three classes; after the second, all features are moved by `drift`."""
    generator = torch.Generator().manual_seed(0)
    centres = unit(torch.randn(CLASSES, SIZE, generator=generator))

    def images(labels):
        noise = 0.2 * torch.randn(len(labels), SIZE, generator=generator)
        return unit(centres[labels] + noise)

    labels = [torch.arange(3).repeat(20), torch.arange(3, 6).repeat(20)]
    test_labels = torch.arange(CLASSES).repeat(30)
    base, test = [images(one) for one in labels], images(test_labels)
    return Streamed(
        classes=CLASSES,
        head=centres,
        labels=labels,
        base=base,
        before=base,
        merged=[base[0], drift(base[1])],
        final=[drift(features) for features in base],
        crops=[[base[0]] * 3, [base[1], base[1], drift(base[1])]],
        test_base=test,
        test_final=drift(test),
        test_labels=test_labels,
    )


def still(features):
    return features


def moved(features):
    """All features move by as much as classes lie apart."""
    shift = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    return unit(features + shift / shift.norm())


def test_statistics_of_all_images_are_those_of_exact_moments():
    run = streamed(moved)
    moments = FeatureMoments(CLASSES, SIZE)
    for features, labels in zip(run.final, run.labels, strict=True):
        moments.update(features, labels)
    found, expected = WAYS["all images (mark)"](run), ClassGaussians.of(moments)
    assert torch.equal(found.counts, expected.counts)
    torch.testing.assert_close(found.means, expected.means, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.scatter, expected.scatter, atol=1e-4, rtol=0)


def test_the_drift_map_image_by_image_is_that_of_the_statistics():
    run = streamed(moved)
    for name in ("drift map, with crops", "drift map"):  # the crops are the images once more
        found, expected = _drifted(run, crops="crops" in name), WAYS["drift map"](run)
        torch.testing.assert_close(found.means, expected.means, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.scatter, expected.scatter, atol=1e-3, rtol=0)


def test_a_crop_is_a_part_of_the_image():
    ramp = torch.linspace(0, 1, 16).expand(3, 16, 16)
    found = _crop(ramp, torch.Generator().manual_seed(0))
    assert found.shape == (1, 3, 16, 16)
    rise = float(found[0, 0, 0, -1] - found[0, 0, 0, 0])
    assert 0.2 < rise < 0.76  # a side has 35 to 75 per cent of it


def test_without_drift_all_ways_are_the_same():
    found = measure(streamed(still))
    for name in WAYS:
        assert found[name] == pytest.approx(found["base features"], abs=2)


def test_what_drifts_is_lost_unless_a_way_follows_it():
    found = measure(streamed(moved))
    best = found["all images (mark)"]
    assert found["as they were"] < best - 10
    for name in ("mean shift", "one map, last task", "drift map", "one map, all images (mark)"):
        assert found[name] > found["as they were"] + 5, name

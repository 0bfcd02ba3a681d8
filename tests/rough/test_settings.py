"""Settings that no run can have: one line before any work, and no folder is left."""

import pytest

from cl_merge import cli
from cl_merge.kernels.parallel import usable_cores

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.max_epochs=0", "trainer.max_epochs=0; expected a whole number from 1"),
        ("trainer.devices=99", f"trainer.devices=99; expected at most {max(usable_cores(), 2)}: "),
        ("optimizer.lr=-1", "optimizer.lr=-1.0; expected a finite number above 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan; expected a finite number above 0"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0; expected 0 or more, finite"),
        ("optimizer.label_smoothing=2", "optimizer.label_smoothing=2.0; expected from 0 to 1"),
        ("stream.tasks=20", "stream.tasks=20 is more than the 10 classes of the data set; every "),
        ("merge.scale=inf", "merge.scale=inf; expected a finite number, finite numbers by pattern"),
        ("stream.images_per_class=0", "stream.images_per_class=0; expected 1 or more"),
        ("stream.num_workers=-1", "stream.num_workers=-1; expected 0 or more"),
        ("stream.batch_size=0", "stream.batch_size=0; expected 1 or more"),
        ("stream.cache=2", "stream.cache=2; expected true, false or auto"),
        ("stream.test_fraction=0.9999", "stream.test_fraction=0.9999 of 1437 images leaves none "),
        ("stream.order=-1", "the class order is -1; expected natural, a seed of 0 or more, or a "),
        (
            "stream.order=null",
            "the class order is None; expected natural, a seed of 0 or more, or ",
        ),
        (
            "stream.order=true",
            "the class order is True; expected natural, a seed of 0 or more, or ",
        ),
        ("stream.order=[null]", "the class order names index None, but they run from 0 to 9"),
        ("merge.include=[[1]]", "include: [1] is no pattern, such as 'visual.*'"),
        ("class_names={a: {b: c}}", "class_names: 'a' is replaced by {'b': 'c'}; expected text, "),
        ("data=${seed}", "unknown data set '${seed}'. Known: a folder, "),
        ("source=/no/where", "'/no/where', to read images from: no such file or folder"),
        ("trainer.callbacks=[x]", "trainer.callbacks=['x']; expected a list or null"),
        ("=value", "'=value' is no setting; expected key=value, such as stream.tasks=5"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_and_leaves_no_folder(word, said, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["run", "trainer.accelerator=cpu", word, f"out={out}"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"cl-merge: {said}")
    assert shown.count("\n") == 1
    assert not out.exists()

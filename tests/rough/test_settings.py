"""Settings that no run can have: one line before any work, and no folder is left."""

import pytest

from cl_merge import cli
from cl_merge.parallel import usable_cores


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.max_epochs=0", "trainer.max_epochs=0; expected 1 or more"),
        ("trainer.devices=99", f"trainer.devices=99; expected at most {max(usable_cores(), 2)}: "),
        ("optimizer.lr=nan", "optimizer.lr=nan; expected a finite number above 0"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0; expected 0 or more, finite"),
        ("optimizer.label_smoothing=2", "optimizer.label_smoothing=2.0; expected from 0 to 1"),
        ("stream.tasks=20", "stream.tasks=20 is more than the 10 classes of the data set; every "),
        ("merge.scale=inf", "merge.scale=inf; expected a finite number, finite numbers by pattern"),
        ("stream.images_per_class=0", "stream.images_per_class=0; expected 1 or more"),
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

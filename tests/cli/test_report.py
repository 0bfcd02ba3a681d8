"""`cl-merge report` of a folder that is there."""

import pytest
from results_files import write_results_file

from cl_merge.cli import main


@pytest.mark.parametrize("form", [[], ["--format", "markdown"]])
def test_an_unknown_metric_is_named_in_one_line(form, tmp_path, capsys):
    magmax = {"training": "sequential", "merger": "magmax"}
    write_results_file(tmp_path, {"methods": {"magmax": magmax}})
    (tmp_path / "config.yaml").write_text("method: magmax")
    assert main(["report", str(tmp_path), "--metric", "acc", *form]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("cl-merge: unknown metric 'acc'; did you mean 'accuracy'?")
    assert not said.out


def test_a_folder_of_runs_points_at_them_and_at_the_leaderboard(tmp_path, capsys):
    for name in ("second", "first"):
        (tmp_path / name).mkdir()
        write_results_file(tmp_path / name, {"methods": {}})
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "in it lie first, second: name one, or join them with --leaderboard PAGE.html" in said

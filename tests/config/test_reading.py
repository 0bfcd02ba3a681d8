"""The configuration: layers, types, and errors that name the nearest key."""

import re

import pytest

from cl_merge.config.reading import read_config, read_yaml, settings_named, to_yaml
from cl_merge.config.schema import described_keys
from cl_merge.errors import InputError


def test_arguments_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 2\nstream: {batch_size: 2, tasks: 2}\n")
    recipe = {"seed": 1, "stream": {"batch_size": 1, "tasks": 1, "num_workers": 1}}
    config = read_config(["stream.tasks=3"], recipe, file)
    assert (config.stream.tasks, config.stream.batch_size, config.stream.num_workers) == (3, 2, 1)
    assert config.seed == 2


def test_values_are_read_as_people_type_them():
    words = [
        "optimizer.lr=1e-4",
        "stream.order=[3,1,2]",
        "stream.cache=false",
        'prompts=["a {}.", "the {}."]',
        "trainer.max_epochs=3",
        "trainer.precision=bf16-mixed",
        "data=/photos",
    ]
    config = read_config(words, {})
    assert config.optimizer.lr == 1e-4
    assert config.stream.order == [3, 1, 2]
    assert config.stream.cache is False
    assert config.prompts == ["a {}.", "the {}."]
    assert config.trainer == {
        "max_epochs": 3,
        "gradient_clip_val": 1.0,
        "devices": 1,
        "precision": "bf16-mixed",
    }
    assert config.data == "/photos"


def test_a_written_configuration_reads_back_the_same(tmp_path):
    config = read_config(["stream.tasks=7", "merge.scale=0.3", "trainer.max_epochs=2"], {})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert read_config([], {}, file) == config


def test_scales_are_numbers_patterns_or_auto():
    assert read_config(["merge.scale=3e-1"], {}).merge.scale == 0.3
    given = 'merge.scale={"*attn*": 0.3, visual.*: 1}'
    assert read_config([given], {}).merge.scale == {"*attn*": 0.3, "visual.*": 1}
    assert read_config(["merge.scale=auto", "merge.groups=block"], {}).merge.groups == "block"


def test_images_are_held_out_to_choose_a_scale_on_unless_a_share_is_given():
    assert read_config([], {}).stream.held_out == 0.0
    assert read_config(["merge.scale=auto"], {}).stream.held_out == 0.1
    assert read_config(["merge.scale=auto", "stream.held_out=0.3"], {}).stream.held_out == 0.3
    assert read_config(["stream.held_out=0.3"], {}).stream.held_out == 0.3


def test_everything_about_the_merge_reads_back_the_same(tmp_path):
    words = [
        'merge.scale={"*attn*": 0.3, "*": 0.5}',
        "merge.options.density=0.3",
        "merge.options={rate: 2}",
        "merge.include=[visual.*]",
        'merge.exclude=["*.bias"]',
        "merge.store=int4",
        "evaluate=last",
    ]
    config = read_config(words, {})
    assert config.merge.options == {"density": 0.3, "rate": 2}
    assert (config.merge.include, config.merge.exclude) == (["visual.*"], ["*.bias"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert read_config([], {}, file) == config
    assert list(read_config([], {}, file).merge.scale) == ["*attn*", "*"]


@pytest.mark.slow
def test_the_defaults_are_the_recipe_of_the_paper():
    config = read_config([], {})
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-5, 0.1)
    assert (config.optimizer.warmup_steps, config.stream.batch_size) == (500, 128)
    assert config.trainer == {"max_epochs": 10, "gradient_clip_val": 1.0, "devices": 1}


def test_every_key_says_what_it_means():
    keys = described_keys()
    assert {"data", "model", "method", "stream.tasks", "stream.scenario", "trainer"} <= set(keys)
    assert {"optimizer.lr", "seed", "out"} <= set(keys)
    assert all(keys.values())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "stream.taks=1",
            "the command line: unknown key 'stream.taks'; did you mean 'stream.tasks'?",
        ),
        ("methd=ties", "the command line: unknown key 'methd'; did you mean 'method'?"),
        ("probe=digits", "the command line: probe: expected a list, as in [a,b]"),
        ("lr=1", "the command line: unknown key 'lr'; did you mean 'optimizer.lr'?"),
        (
            "max_epochs=1",
            "the command line: unknown key 'max_epochs'; did you mean 'trainer.max_epochs'?",
        ),
        (
            "trainer.max_epoch=1",
            "unknown key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'? It is no argument of Lightning's Trainer",
        ),
        (
            "stream.tasks=two",
            "the command line: stream.tasks: Value 'two' of type 'str' could not be converted to Integer",
        ),
        ("--seed=3", "'--seed=3': settings are written without dashes: seed=3"),
        ("digits", "'digits' is no setting; expected key=value, such as stream.tasks=5"),
        ("merge.density=1.5", "merge.density=1.5; expected more than 0, at most 1"),
        (
            "merge.scale=.nan",
            "merge.scale=nan; expected a finite number, finite numbers by pattern, auto or drift",
        ),
        (
            "merge.scale=much",
            "merge.scale=much; expected a finite number, finite numbers by pattern, auto or drift",
        ),
        (
            "merge.beside.ties=3",
            "merge.beside.ties=3; expected options of the method and scale, by name",
        ),
        ("merge.groups=block", "merge.groups=block; only for merge.scale=auto"),
        (
            "merge.store=int3",
            "unknown value of merge.store 'int3'; did you mean 'int8'? Known: float32, bf16, int8, int4, int2",
        ),
        (
            "evaluate=lats",
            "unknown value of evaluate 'lats'; did you mean 'last'? Known: every, last",
        ),
        ("seed=-1", "seed=-1; expected 0 or more"),
    ],
)
def test_a_wrong_word_is_named(word, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        read_config([word], {})


def test_brackets_without_quotes_are_explained():
    with pytest.raises(
        InputError, match=r"^cannot read 'prompts=\[a \{\}, b\]' .* put quotes around"
    ):
        read_config(["prompts=[a {}, b]"], {})


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="^config .*none.yaml: cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(InputError, match="^config .*list.yaml: expected keys and values"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match=r"^config .*broken.yaml: no valid YAML"):
        read_yaml(tmp_path / "broken.yaml")
    (tmp_path / "typo.yaml").write_text("stream: {taks: 3}\n")
    with pytest.raises(InputError, match="typo.yaml: unknown key 'stream.taks'; did you mean"):
        read_config([], {}, tmp_path / "typo.yaml")


@pytest.mark.parametrize(
    ("group", "message", "expected"),
    [
        ("optimizer", "lr=-1; expected more", "optimizer.lr=-1; expected more"),
        ("stream", "no split 'x': give test_split=...", "no split 'x': give stream.test_split=..."),
        # What is no argument, and what has its group already, stays.
        ("stream", "more tasks than label", "more tasks than label"),
        ("stream", "stream.tasks=3, mytasks=3", "stream.tasks=3, mytasks=3"),
        ("stream", "lr=-1", "lr=-1"),
    ],
)
def test_errors_of_the_library_name_settings_on_the_command_line(group, message, expected):
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"), settings_named(group):
        raise InputError(message)

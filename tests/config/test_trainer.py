import re

import pytest

from cl_merge.config.trainer import check_trainer
from cl_merge.errors import InputError


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_epochs": 3, "gradient_clip_val": 1.0, "accelerator": "cpu", "precision": "16-mixed"},
        {"max_epochs": None, "max_steps": 10, "precision": 32, "deterministic": "warn"},
        {"devices": 2, "strategy": "ddp", "limit_train_batches": 0.5, "limit_test_batches": 3},
        {"devices": [0, 1], "max_time": {"hours": 1}, "deterministic": True, "callbacks": []},
        {"max_steps": -1, "devices": "auto", "fast_dev_run": False, "default_root_dir": "runs"},
    ],
)
def test_what_lightning_takes_is_taken(arguments):
    check_trainer(arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_epochs", 0, "trainer.max_epochs=0; expected a whole number from 1"),
        ("max_epochs", 0.5, "trainer.max_epochs=0.5; expected a whole number or null"),
        ("max_epochs", True, "trainer.max_epochs=True; expected a whole number or null"),
        *(
            ("precision", x, f"trainer.precision={x}; expected 32-true, bf16-mixed or 16-mixed")
            for x in ("bf16-true", 64)
        ),
        ("max_steps", 0, "trainer.max_steps=0; expected a whole number from 1, or -1 for no limit"),
        (
            "accumulate_grad_batches",
            0,
            "trainer.accumulate_grad_batches=0; expected a whole number from 1",
        ),
        (
            "limit_train_batches",
            0,
            "trainer.limit_train_batches=0; expected a number of batches, or a share above 0",
        ),
        (
            "limit_train_batches",
            float("nan"),
            "trainer.limit_train_batches=nan; expected a whole number or a finite number or null",
        ),
        (
            "fast_dev_run",
            True,
            "trainer.fast_dev_run=True; a run needs whole trainings and evaluations: leave it out",
        ),
        ("devices", {}, "trainer.devices={}; expected a whole number or text or a list"),
        ("profiler", 1, "trainer.profiler=1; expected text or null"),
        ("deterministic", "x", "trainer.deterministic=x; expected true or false or warn or null"),
        (
            "max_time",
            {"hours": "x"},
            "trainer.max_time={'hours': 'x'}; expected text or keys and values or null",
        ),
    ],
)
def test_what_it_does_not_take_is_named(name, value, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_trainer({name: value})

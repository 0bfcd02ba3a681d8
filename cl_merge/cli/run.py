"""The command line; the only file that knows every other."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cl_merge.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

_DESCRIPTION = """\
Learn a stream of tasks, merge what each task changed, and show what that gives.

Without settings: scikit-learn's digits in five tasks, with a small model that comes along. It
leaves a folder with the merged weights, every task vector, results.json, logs and two pictures.
A run that was stopped goes on with out=FOLDER; no other setting is needed.
"""
_EXAMPLES = """\
examples:
  cl-merge run
  cl-merge run method=ties stream.tasks=2 trainer.max_epochs=1 seed=3
  cl-merge run data=/photos model=lite image_size=96 stream.tasks=10 out=runs/photos
  cl-merge run data=/photos model=ViT-B-16:openai trainer.devices=2 trainer.strategy=ddp
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the program's name; those of the process if None.

    Returns:
        The exit code: 0 for success, 1 if the disk or the system stops it, 2 for wrong input, 130
        after Ctrl-C.
    """
    parsed = _parser().parse_args(arguments)
    try:
        run(parsed.settings, parsed.config)
    except InputError as error:
        sys.stderr.write(f"cl-merge: {error}\n")
        return 2
    except RunStoppedError as stopped:
        code, why = _explain(stopped.reason)
        sys.stderr.write(f"cl-merge: {why}; go on with: cl-merge run out={stopped.folder}\n")
        return code
    except (KeyboardInterrupt, SystemExit, OSError) as stop:
        code, why = _explain(stop)
        sys.stderr.write(f"cl-merge: {why}\n")
        return code
    return 0


def _explain(reason: BaseException) -> tuple[int, str]:
    """The exit code and the words for what stopped a run."""
    # Lightning answers Ctrl-C within a fit with an exit of its own.
    if isinstance(reason, KeyboardInterrupt) or isinstance(reason.__context__, KeyboardInterrupt):
        return 130, "interrupted; what was finished is kept"
    if isinstance(reason, OSError):
        return 1, str(reason)
    raise reason


def run(settings: Sequence[str], file: str | None = None) -> None:
    """Learn a stream of tasks, show what merging gives, and leave a run folder.

    Args:
        settings: ``key=value`` words.
        file: A YAML file with more of them.

    Raises:
        InputError: If a key, a value or what they name is wrong.
    """
    from rich.console import Console

    from cl_merge.benchmarks.report import show_results, show_start, show_task
    from cl_merge.benchmarks.settings import read_settings
    from cl_merge.journal import is_first_process

    config = read_settings(settings, file)
    console = Console(quiet=not is_first_process(), highlight=False)
    folder = Path(config.out).expanduser() if config.out else None
    if folder is not None and (folder / "results.json").exists():
        if is_first_process():
            console.print(f"{folder} holds this run, finished; nothing is left to do")
            show_results(console, folder)
        return
    _quieten()
    _show_messages(console)
    # What follows loads torch's libraries and a model, which takes seconds: wrong settings first.
    from cl_merge.benchmarks.progress import RunProgress
    from cl_merge.benchmarks.results import results
    from cl_merge.benchmarks.run import count_batches, start_run
    from cl_merge.benchmarks.training import run_stream

    started = start_run(config)
    try:
        show_start(console, started)
        with RunProgress(console, count_batches(started)) as progress:
            run_stream(started, progress, lambda *done: show_task(console, *done))
        started.folder.finish(results(started))
        if is_first_process():
            show_results(console, started.folder.path)
    except (KeyboardInterrupt, SystemExit, OSError) as stop:
        raise RunStoppedError(started.folder.path, stop) from stop
    finally:
        started.folder.release()


class RunStoppedError(Exception):
    """A run that was begun and did not end, for a reason outside of it.

    Args:
        folder: Its folder.
        reason: What stopped it.
    """

    def __init__(self, folder: Path, reason: BaseException) -> None:
        super().__init__(str(folder), reason)
        self.folder = folder
        self.reason = reason


def _parser() -> argparse.ArgumentParser:
    from cl_merge import __version__

    parser = argparse.ArgumentParser(
        prog="cl-merge", description="Continual learning by model merging."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "run",
        help="learn a stream of tasks and show what merging gives",
        description=_DESCRIPTION,
        epilog=_key_help() + "\n" + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings, see below")
    command.add_argument("--config", metavar="FILE", help="YAML file of settings")
    return parser


def _key_help() -> str:
    from cl_merge.benchmarks.catalog import catalog
    from cl_merge.benchmarks.methods import METHODS
    from cl_merge.config import default_of, described_keys

    lines = ["settings:"]
    for key, about in described_keys().items():
        default = default_of(key)
        shown = f"  [{default}]" if default is not None else ""
        lines.append(f"  {key:<26}{about}{shown}")
    lines += ["", "data sets: " + ", ".join(catalog()), "methods: " + ", ".join(METHODS)]
    return "\n".join(lines) + "\n"


def _show_messages(console: Console) -> None:
    """Let what the library has to say appear beside the progress bar instead of breaking it."""
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    library = logging.getLogger("cl_merge")
    library.handlers = [handler]
    library.propagate = False
    library.setLevel(logging.INFO)


def _quieten() -> None:
    """Keep out of the way of the progress bar what a library says to its own developers."""
    for name in ("lightning.pytorch", "lightning.fabric", "httpx", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*tensorboardX.*",
        # What the library does on purpose: no validation data, frozen batch norms.
        ".*but have no `val_dataloader`.*",
        ".*in eval mode at the start of training.*",
        ".*treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)


if __name__ == "__main__":
    sys.exit(main())

"""The command line; the only part that knows every other."""

from __future__ import annotations

import argparse
import errno
import re
from collections.abc import Sequence

from cl_merge import __version__
from cl_merge.cli import bench, export, inspect, merge, predict, report, run
from cl_merge.cli.process import Signals, StoppedError, share_cores, terminated_as_interrupted
from cl_merge.cli.terminal import is_unread, own_terminal, say
from cl_merge.errors import InputError, nearest, was_interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the program's name; those of the process if None.

    Returns:
        The exit code: 0 for success, 1 if the disk or the system stops it, a run of a suite failed,
        an inspection finds what cannot be merged, or an image was skipped, 2 for wrong input, 130
        after Ctrl-C, 141 if nobody reads the output any more, 143 after SIGTERM.
    """
    share_cores()
    with own_terminal(), terminated_as_interrupted() as signals:
        try:
            parsed = _parse(arguments)
            code = int(parsed.execute(parsed) or 0)
            return 141 if is_unread() else code
        except StoppedError as stopped:
            resume_command, reason = stopped.args
            code, why = _explain(reason, signals)
            kept = "what was finished is kept; " if code in (130, 143) else ""
            say(f"{why}; {kept}go on with: {resume_command}")
            return code
        except (Exception, KeyboardInterrupt, SystemExit) as stop:
            code, why = _explain(stop, signals)
            if code != 141:
                say(why)
            return code


def parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; what it finds has ``execute``, the command's function."""
    made = argparse.ArgumentParser(
        prog="cl-merge", description="Continual learning by model merging."
    )
    made.add_argument("--version", action="version", version=__version__)
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (run, bench, report, predict, export, merge, inspect):
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=getattr(module, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(parser=command, hint=getattr(module, "HINT", ""))
    return made


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the words; settings and files may stand before and behind options."""
    made = parser()
    parsed, rest = made.parse_known_args(arguments)
    several = next((name for name in ("settings", "files") if name in parsed), None)
    end = rest.index("--") if "--" in rest else len(rest)  # from which on words are no options
    unknown = [word for word in rest[:end] if word.startswith("-") or several is None]
    if unknown:
        options = re.findall(r"--[\w-]+", parsed.parser.format_usage())
        near = nearest(unknown[0].partition("=")[0], options)
        parsed.parser.error(
            f"unrecognized arguments: {' '.join(unknown)}{near} {parsed.hint}".rstrip()
        )
    rest = [*rest[:end], *rest[end + 1 :]]
    if rest and several is not None:
        setattr(parsed, several, [*getattr(parsed, several), *rest])
    return parsed


def _explain(reason: BaseException, signals: Signals) -> tuple[int, str]:
    """The exit code and the words for what stopped a command."""
    if signals.terminated and isinstance(reason, SystemExit):
        return 143, "terminated"
    # Lightning answers Ctrl-C within a fit with an exit of its own.
    if was_interrupted(reason):
        return (143, "terminated") if signals.terminated else (130, "interrupted")
    if isinstance(reason, InputError):
        return 2, str(reason)
    # Rich makes an exit of a closed pipe.
    if any(isinstance(e, BrokenPipeError) for e in (reason, reason.__context__)):
        return 141, "nobody reads the output any more"
    if isinstance(reason, OSError):
        named = reason.filename is not None and reason.strerror is not None
        code = 2 if reason.errno == errno.ENAMETOOLONG else 1
        return code, f"'{reason.filename}': {reason.strerror}" if named else str(reason)
    raise reason

"""The ``mdgraft`` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from mdgraft import __version__
from mdgraft._console import ProgressReporter, print_check, print_doctor, print_fit
from mdgraft._errors import MDGraftError
from mdgraft._services import service

OK, DIFFERS, BAD_INPUT, NOT_CONVERGED, INTERRUPTED = 0, 1, 2, 3, 130

_EXIT_CODES = """\
exit codes:
  0    fine
  1    check: something differs; doctor: something essential is broken
  2    bad usage or input; one line on standard error says what
  3    fit: ended without convergence; what it has is written
  130  interrupted; a fit continues with --resume
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        The exit code: 0 fine; 1 `check` found a difference, or `doctor` something essential
        broken; 2 bad usage or input; 3 a fit ended without convergence; 130 interrupted.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except MDGraftError as error:
        return _fail(str(error), type(error).__name__, arguments.json)
    except KeyboardInterrupt:
        print("mdgraft: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as head, has seen enough; keep the interpreter from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        # A missing file, a read-only or full disk.
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"{where}{error.strerror or error}", type(error).__name__, arguments.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mdgraft",
        description="Graft gradients onto the molecular-dynamics engine you already use.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mdgraft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = _command(
        commands,
        "check",
        "compare the graft of a System with OpenMM, force by force",
        "Grafts a System and compares energy, forces and box derivative of every force, and on "
        "request the gradient of every parameter family, with OpenMM's Reference platform.",
    )
    check.add_argument("system", metavar="SYSTEM.xml", help="a serialised System")
    check.add_argument(
        "state",
        metavar="STATE",
        nargs="?",
        help="a serialised State (.xml), or a .pdb or .cif file; positions are generated otherwise",
    )
    check.add_argument(
        "--gradients",
        action="store_true",
        help="also compare every parameter family with differences of OpenMM's energies",
    )
    check.add_argument(
        "--tolerance",
        type=_positive,
        metavar="X",
        help="largest relative difference of energies and forces that passes (default: 1e-9)",
    )
    check.add_argument(
        "--gradient-tolerance",
        type=_positive,
        metavar="X",
        help="the same for box derivatives and parameter gradients (default: 1e-6)",
    )
    check.add_argument(
        "--seed", type=int, default=0, help="of generated positions and random directions"
    )
    _add_trust(check)
    check.set_defaults(run=_check)

    fit = _command(
        commands,
        "fit",
        "fit parameters to ensemble and reference data",
        "Samples, reweights and fits as the configuration says, and writes the history, the "
        "fitted parameters, the fitted System and a picture.",
    )
    fit.add_argument("config", metavar="CONFIG.toml", help="what to fit to what")
    fit.add_argument(
        "--output", metavar="DIR", help="where to write (default: CONFIG_fit in the current folder)"
    )
    fit.add_argument("--resume", action="store_true", help="continue a fit that was interrupted")
    _add_trust(fit)
    fit.set_defaults(run=_fit)

    doctor = _command(
        commands,
        "doctor",
        "find out which hosts, plug-ins and platforms work here",
        "Tries every host, plug-in and platform in a process of its own, and says what to "
        "install for those that do not work.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _command(commands: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json", action="store_true", help="write one JSON object to standard output"
    )
    return parser


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load files whose loading runs code, such as a pickled PythonForce",
    )


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a positive number")
    return value


def _check(arguments: argparse.Namespace) -> int:
    from mdgraft.testing import Tolerances

    tolerances = Tolerances()
    if arguments.tolerance is not None:
        tolerances = dataclasses.replace(
            tolerances, energy=arguments.tolerance, forces=arguments.tolerance
        )
    if arguments.gradient_tolerance is not None:
        tolerances = dataclasses.replace(
            tolerances,
            box=arguments.gradient_tolerance,
            parameters=arguments.gradient_tolerance,
        )
    run = service("openmm", "check")
    with ProgressReporter("check") as progress:
        report = run(
            arguments.system,
            arguments.state,
            gradients=arguments.gradients,
            trust=arguments.trust,
            tolerances=tolerances,
            seed=arguments.seed,
            progress=progress,
        )
    if arguments.json:
        _write_json("check", report.to_json())
    else:
        print_check(report)
    return OK if report.agrees else DIFFERS


def _fit(arguments: argparse.Namespace) -> int:
    from mdgraft import fitting

    with ProgressReporter("fit") as progress:
        result = fitting.run(
            arguments.config,
            output=arguments.output,
            resume=arguments.resume,
            trust=arguments.trust,
            progress=progress,
        )
    if arguments.json:
        _write_json("fit", result.to_json())
    else:
        print_fit(result)
    return OK if result.converged else NOT_CONVERGED


def _doctor(arguments: argparse.Namespace) -> int:
    try:
        run = service("openmm", "doctor")
    except ImportError as error:
        # Without a working OpenMM its adapter cannot even be imported.
        print(f"mdgraft: OpenMM cannot be imported ({error}); pip install openmm", file=sys.stderr)
        if arguments.json:
            _write_json("doctor", {"healthy": False, "findings": [], "error": str(error)})
        return DIFFERS
    with ProgressReporter("doctor") as progress:
        progress("trying hosts, plug-ins and platforms", 0, 0)
        report = run()
    if arguments.json:
        _write_json("doctor", report.to_json())
    else:
        print_doctor(report)
    return OK if report.healthy else DIFFERS


def _write_json(command: str, content: dict[str, Any]) -> None:
    document = {"command": command, "mdgraft": __version__, **content}
    print(json.dumps(document, indent=2, allow_nan=False))


def _fail(message: str, kind: str, as_json: bool) -> int:
    line = " ".join(message.split())
    print(f"mdgraft: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"mdgraft": __version__, "error": kind, "message": line}))
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())

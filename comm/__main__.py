"""`python -m comm launch | bench | doctor`: the command line; each verb loads what it needs."""

import argparse
import os
import shlex
import shutil
import sys
from typing import Any

from comm.capabilities import CAPABILITIES
from comm.launcher.job import SSH

BACKENDS = tuple(CAPABILITIES)


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    cut = given.index("--") if "--" in given else len(given)
    parser = _parser()
    options, unknown = parser.parse_known_args(given[:cut])
    if unknown:
        hint = "; the program goes after --" if options.verb == "launch" and cut == len(given) else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if options.verb == "launch":
        return _launch(parser, options, given[cut + 1 :])
    if given[cut:]:
        parser.error(f"{options.verb} takes no program after --")
    if options.verb == "bench":
        try:
            return _bench(options)
        except ValueError as error:
            parser.exit(2, f"error: {error}\n")
    from comm.tools.doctor import main as run_doctor

    return run_doctor(options)


def _launch(
    parser: argparse.ArgumentParser, options: argparse.Namespace, command: list[str]
) -> int:
    from comm.launcher.job import Job, make_hosts, mpi_job
    from comm.launcher.launch import launch

    if not command:
        parser.error("launch needs the program to start: python -m comm launch -n 2 -- python x.py")
    try:
        hosts = make_hosts(options.num_ranks, options.hosts, options.hostfile, options.backend)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    job = Job(
        tuple(command), hosts, hosts.backend, options.timeout, options.max_restarts,
        options.python, options.ssh, options.cwd,
    )  # fmt: skip
    try:
        return launch(mpi_job(job) if job.backend == "mpi" else job)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def _bench(options: argparse.Namespace) -> int:
    if options.launchers:
        import json

        from comm.tools.bench_launch import compare_launchers

        print(json.dumps(compare_launchers(options.repeats)))
        return 0
    from comm.tools.bench import main as run_bench

    return run_bench(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m comm",
        description="Start programs on many ranks, measure their links, and check their hosts.",
        epilog="`python -m comm VERB --help` explains one verb, with an example.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_launch(verbs)
    _add_bench(verbs)
    _add_doctor(verbs)
    return parser


def _add_verb(verbs: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_launch(verbs: Any) -> None:
    example = "python -m comm launch -n 2 -- python -m trainer recipes/quickstart.yaml"
    launch = _add_verb(verbs, "launch", "start a program on every rank: launch ... -- COMMAND", example)
    launch.add_argument("-n", type=_positive, dest="num_ranks", help="ranks per host (default 1)")
    launch.add_argument("--hosts", help="host names for ssh, separated by commas")
    launch.add_argument("--hostfile", help="hosts as mlx.distributed_config writes them")
    launch.add_argument("--backend", choices=BACKENDS, help="default: the hostfile's, else nccl where each rank gets a GPU of this host, else ring")
    launch.add_argument("--max-restarts", type=_not_negative, default=0, help="restarts after a failure (default 0)")
    launch.add_argument(
        "--timeout", type=_seconds, default=300.0, help="seconds a rank may be missing (default 300)"
    )
    launch.add_argument("--python", default=sys.executable, help="interpreter on other hosts (default: the path of this one)")
    launch.add_argument("--ssh", default=SSH, type=_command, help="command that reaches them")
    launch.add_argument("--cwd", default=os.getcwd(), help="folder to start in, where it exists")


def _add_bench(verbs: Any) -> None:
    example = "python -m comm launch --hostfile hosts.json -- python -m comm bench"
    summary = "measure latency, bandwidth and gradient fusion; alone it starts local ranks"
    bench = _add_verb(verbs, "bench", summary, example)
    bench.add_argument("--backend", default="any", choices=("any", *BACKENDS))
    bench.add_argument("-n", type=_positive, dest="num_ranks", default=2, help="local ranks, when started alone (default 2)")
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    bench.add_argument("--launchers", action="store_true", help="compare with mlx.launch instead")
    bench.add_argument("--plot", metavar="FILE", help="draw latency and bandwidth as a PNG")
    bench.add_argument("--max-mib", type=_positive, default=64, help="largest message (default 64)")
    bench.add_argument("--repeats", type=_positive, default=5, help="timings each (default 5)")


def _add_doctor(verbs: Any) -> None:
    example = "python -m comm doctor --hostfile hosts.json"
    doctor = _add_verb(verbs, "doctor", "check the hosts; each line is pass, warn or fail", example)
    doctor.add_argument("--hostfile", help="hosts as mlx.distributed_config writes them")
    doctor.add_argument("--python", default=sys.executable, help="interpreter on other hosts (default: the path of this one)")
    doctor.add_argument("--ssh", default=SSH, type=_command, help="command that reaches them")
    doctor.add_argument("--cwd", default=os.getcwd(), help="folder that the job will start in")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds >= 0")
    return seconds


def _command(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no command: {error}") from None
    if not words or "\0" in text or not shutil.which(words[0]):
        raise argparse.ArgumentTypeError(f"{text!r} is no command that can be found here")
    return text


def _positive(text: str) -> int:
    return _whole(text, 1)


def _not_negative(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= {least}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

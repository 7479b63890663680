"""`python -m serving.demo run | serve`: what `make demo` and `make serve` call."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console

from foretell.errors import ForetellError
from serving.demo.journey import Demo, serve

OUT = Path("out/demo")


def main(arguments: list[str]) -> int:
    """Runs the demo or serves its result; 0 where all went well."""
    parser = argparse.ArgumentParser(prog="python -m serving.demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="from data to predictions and a report")
    run.add_argument("--full", action="store_true", help="all of The Complete Journey")
    run.add_argument("--items", type=Path, help="your own items: item_id, text, ...")
    run.add_argument("--events", type=Path, help="your own events: user_id, behavior_type, ...")
    run.add_argument("--out", type=Path, default=OUT, help="folder of all results")
    again = commands.add_parser("serve", help="both services on their default ports")
    again.add_argument("--out", type=Path, default=OUT, help="folder of the demo's results")
    options = parser.parse_args(arguments)
    # A terminal that is closed must end the services as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    console = Console()
    try:
        if options.command == "serve":
            serve(options.out, console)
        else:
            if options.items and not options.events:
                parser.error("--items needs --events too")
            Demo(options.out, console).run(options.events, options.items, full=options.full)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except (ForetellError, RuntimeError, OSError) as error:
        console.print(f"[bold red]{error}", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

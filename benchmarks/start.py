"""Start-up: ``import formwright`` against nothing, ``formwright --help``, and ``import torch`` for scale.

Whole processes, alternating, median of several; the claims are 0.1 s more than nothing and 0.5 s.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.harness import arguments, race, show


def main() -> None:
    options = arguments(__doc__.split("\n")[0]).parse_args()
    commands = {
        "python -c pass": ["-c", "pass"],
        "import formwright": ["-c", "import formwright"],
        "formwright --help": ["-m", "formwright", "--help"],
        "import torch": ["-c", "import torch"],
    }

    def run(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    contenders = {name: (lambda words=words: run(words)) for name, words in commands.items()}
    agreement = dict.fromkeys(contenders, 1.0)
    show(race("start", "process", contenders, agreement, 0.0, "python -c pass", options.rounds), options.json)


if __name__ == "__main__":
    main()

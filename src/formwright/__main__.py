"""``python -m formwright``."""

from formwright.cli.main import main

main()

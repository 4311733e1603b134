"""The command ``formwright``: one verb a file, found by the registry, imported only when used.

A verb is a function with typer annotations registered as ``@register("verb", NAME)``. Anything the user can put right
ends in one sentence on stderr and exit code 2; Ctrl-C ends with 130 and whatever was saved.
"""

from __future__ import annotations

import os
import sys
import textwrap

from formwright import __version__, registry
from formwright.kit.errors import FormwrightError, nearest

#: The order in which people meet them; verbs not named here follow by name.
ORDER = ("slim", "measure", "plan", "apply", "train", "generate", "encode", "predict", "export", "prove", "new")


def verbs() -> list[str]:
    """Registered verbs in the order of the help."""
    found = registry.names("verb")
    return [verb for verb in ORDER if verb in found] + [verb for verb in found if verb not in ORDER]


def overview() -> str:
    """What ``formwright --help`` prints; imports no verb."""
    lines = [
        "Usage: formwright VERB [OPTIONS] ...",
        "",
        "  Make Transformers, and what comes after them, cheaper, adaptable, servable",
        "  and understandable.",
        "",
        "Verbs (formwright VERB --help tells more):",
    ]
    width = max(len(verb) for verb in verbs()) + 2
    for verb in verbs():
        text = textwrap.wrap(registry.find("verb", verb).summary.rstrip("."), 78 - width)
        lines += [f"  {verb if index == 0 else '':<{width}}{line}" for index, line in enumerate(text)]
    return "\n".join([*lines, "", "Options:", "  --version   Show the version.", "  --help      Show this."])


def run(verb: str, arguments: list[str]) -> int:
    """Run one verb; returns its exit code."""
    import typer

    if verb not in registry.names("verb"):
        raise FormwrightError(f"there is no verb {verb!r}{nearest(verb, verbs())}; formwright --help lists them")
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name=verb)(registry.resolve("verb", verb))
    try:
        code = app(args=arguments, prog_name=f"formwright {verb}", standalone_mode=False)
    except typer.Exit as done:
        return done.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # usage errors of the parser know how to say themselves
            raise
        raise FormwrightError(f"{error.format_message().rstrip('.')}; see formwright {verb} --help") from None
    return code if isinstance(code, int) else 0


def main(arguments: list[str] | None = None) -> None:
    """The entry point. Exit codes: 0 done, 1 a claim or check does not hold, 2 something to put right, 130 Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not given or given[0] in ("-h", "--help", "help"):
            print(overview())
            code = 0
        elif given[0] == "--version":
            print(f"formwright {__version__}")
            code = 0
        else:
            code = run(given[0], given[1:])
        sys.stdout.flush()
    except FormwrightError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of a pipe has gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        print(f"error: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()

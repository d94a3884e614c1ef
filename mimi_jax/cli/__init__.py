"""The command line, `mimi-jax`.

    signals    Ctrl-C and the other signals that ask a command to stop
    pipes      standard input and output as pipes of audio or codes
    checks     what is refused before the slow work starts
    terminal   what the commands print, and how libraries are kept quiet
    coding     encode, decode
    roundtrip  roundtrip
    models     info, convert
    corpora    tokenize, pack, train, evaluate
    serving    serve
    parser     the arguments of all commands
    run        `main`: runs one command and returns its exit status

Modules that are slow to import are imported by the command that needs them.
"""

from mimi_jax.cli.run import main

__all__ = ["main"]

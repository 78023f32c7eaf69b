"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Bad input from a person: a file, a config, a prompt, a flag.

    The message says what was got, what was expected and what to do. The command line prints it
    and exits with code 2; any other exception is a bug and keeps its traceback.
    """

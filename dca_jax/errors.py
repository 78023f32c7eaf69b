"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Bad input from a person: a file, a config, a prompt, a flag.

    The message says what was got, what was expected and what to do. The command line prints it
    and exits with code 2; any other exception is a bug and keeps its traceback.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the host or a device has too little memory.

    JAX raises a JaxRuntimeError or a ValueError for it, PyTorch a RuntimeError.
    """
    signs = ("RESOURCE_EXHAUSTED", "Cannot allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)

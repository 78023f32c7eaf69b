"""The exception for wrong input, as opposed to bugs in the program."""


class InputError(ValueError):
    """Wrong input from the user: a file, a config, a prompt, a flag.

    The message says what was received, what was expected and what to do. The command line prints it
    and exits with code 2; any other exception is a bug and keeps its traceback.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the host or a device ran out of memory.

    JAX raises a JaxRuntimeError or a ValueError for it, PyTorch a RuntimeError.
    """
    signs = ("RESOURCE_EXHAUSTED", "Cannot allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)

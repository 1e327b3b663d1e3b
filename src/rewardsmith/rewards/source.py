"""stub"""


class SourceError(ValueError): ...


def source_of(f):
    import inspect, textwrap

    return textwrap.dedent(inspect.getsource(f))


def check(text):
    return []


def compile_function(text, filename):
    ns = {}
    exec(compile(text, filename, "exec"), ns)
    return next(v for k, v in ns.items() if k != "__builtins__")

"""The commands of `minibert`, one file each: `add_arguments(parser)` declares what it takes, `run(arguments)` does it.

`run` may return an exit status, and None means 0; the first line of its docstring is the command's help. What a
command computes lies in other rooms.
"""

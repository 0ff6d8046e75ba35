"""The safety screen: whether a shell command may be learned, shown or run. Its policy: ``config/screen/``.

``reader`` turns text into the commands that it would start, with ``parsing``, ``words`` and ``loops``.
``spawned_commands`` says what programs start and ``code`` what other languages do, by the facts in ``programs``;
``paths`` says what is read, written, deleted and sent. ``predicates`` are the words of the rules; ``policy`` reads,
checks and asks them. Nothing is executed, and no file, variable or network of this machine is looked at.
"""

"""The safety screen: whether a shell command may be learned, shown or run.

=========== =========================================================================================
module      what it does
=========== =========================================================================================
reader      text -> the simple commands that it would start, each with its words, feeds, files, folder
commands    the classes of what was read
starting    what a program starts: wrappers, builtins, other programs' shells (facts: ``programs.yaml``)
code        what Python, Perl, awk and others do to files, and the shell text that they hand on
paths       what a command reads, writes, deletes and sends, and what kind of place that is
policy      ``config/screen/*.yaml`` -> rules: checked, compiled, judged
measure     how a labelled set or a corpus of somebody else comes out
=========== =========================================================================================

Nothing is executed; no file, variable or network of this machine is looked at.
"""

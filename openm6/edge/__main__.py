"""Start of the edge program. Every version of Python has to be able to parse this file, to say which one is needed."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write("openm6-edge needs Python 3.11 or newer, and this is %d.%d.\n" % sys.version_info[:2])  # noqa: UP031
    sys.exit(2)

from openm6.edge.program import main

main()

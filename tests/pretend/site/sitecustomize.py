"""Python imports this at its start, in every process that ``python -m tests.pretend`` begets."""

import os
import sys
import traceback

try:
    from tests.pretend import LOADED
    from tests.pretend.load import load

    load(*os.environ[LOADED].split(":", 1))
    del sys.modules["tests"]  # a process elsewhere may have tests of its own
except BaseException:  # Python would go on without the device
    traceback.print_exc()
    os._exit(1)

"""One call of every public function and class of pvae, on a device of one's choice.

A call takes a device and returns what it has computed, which `tests/test_calls.py` compares with
what the same call gives on the CPU. A new public name needs a call here: `@call` in the module
where it belongs, with the names as ``module.name``.
"""

from tests.calls import inner, tools, training
from tests.calls.table import CALLS, ELSEWHERE, Call

__all__ = ["CALLS", "ELSEWHERE", "Call", "inner", "tools", "training"]

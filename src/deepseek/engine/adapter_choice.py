"""What a request says of adapters -> as the engine knows it.

    "law"                                   one adapter
    {"law": 0.6, "med": 0.4}                a mixture: the weighted sum of their terms
    {"arrow": ["law", "med"], "top": 2}     every token chooses, in every matrix anew (model/adapters.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError, shown
from ..model.adapters import Adapter, Arrow, Mixture
from ..settings import is_int, is_number

TOP = 2  # adapters that a token chooses, where nothing else is said


def find(choice: Any, names: Sequence[str], targets: Mapping[str, Sequence[str]]) -> Adapter:
    """names: of the adapters that there are; targets: the modules that each adapts. Raises RequestError."""
    weights = {choice: 1.0} if isinstance(choice, str) else choice
    if not isinstance(weights, Mapping) or not weights:
        raise RequestError(f"adapter = {shown(choice)}: must be a name, or weights by name, one at least")
    if isinstance(weights.get("arrow"), list | tuple):
        return _arrow(weights, names, targets)
    for name, weight in weights.items():
        _check_name(name, names)
        if not is_number(weight) or not weight:
            raise RequestError(f"adapter: {name}: weight = {shown(weight)}: must be a finite number other than 0")
    mixture = Mixture.of(weights)
    return mixture.parts[0][0] if mixture.parts == ((mixture.parts[0][0], 1.0),) else mixture


def _check_name(name: Any, names: Sequence[str]) -> None:
    if name not in names:
        raise RequestError(f"adapter = {name!r}: is no adapter that was loaded; there are "
                           f"{', '.join(names) or 'none'}")


def _arrow(choice: Mapping[str, Any], names: Sequence[str], targets: Mapping[str, Sequence[str]]) -> Arrow:
    own, top = choice["arrow"], choice.get("top", TOP)
    if odd := sorted(map(str, set(choice) - {"arrow", "top"})):
        raise RequestError(f"adapter: key {shown(odd[0])}: must be arrow or top where tokens choose")
    for name in own:
        _check_name(name, names)
        if absorbed := [target for target in targets[name] if target.endswith(".kv_b_proj")]:
            raise RequestError(f"adapter: arrow: {name} adapts {absorbed[0]}, which is applied to the whole context, "
                               "not token by token: give weights by name, or train it without kv_b_proj (v_proj)")
    if len({*own}) != len(own) or len(own) < 2:
        raise RequestError(f"adapter: arrow = {shown(own)}: must be two different names at least")
    if not is_int(top) or not 1 <= top <= len(own):
        raise RequestError(f"adapter: arrow: top = {shown(top)}: must be an integer from 1 to {len(own)}, the number "
                           "of names")
    return Arrow(tuple(sorted(own)), top)

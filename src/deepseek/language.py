"""Which language a text is in, where there is enough of it to tell (py3langid: naive Bayes over byte sequences)."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

MIN_CONFIDENCE = 0.5  # a language must be likelier than all others together
LONG = 1000  # characters that are looked at; the rest of a text is taken to be alike
NONE = "und"  # ISO 639's word for a language that is not determined
CHINESE = ("wuu", "yue")  # counted as zh: texts of a few characters are written alike in all of them
NO_LANGUAGE = "zxx"


def language(text: str) -> str:
    """ISO 639 code of a text's language; `und` for one too short to tell, or in none. The first call takes a second."""
    p = Counter[str]()
    for code, share in _identifier().rank(text[:LONG]):
        p["zh" if code in CHINESE else code] += share
    (code, share), = p.most_common(1)
    return code if share > MIN_CONFIDENCE and code != NO_LANGUAGE else NONE


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

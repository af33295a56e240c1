"""A language where the text says which, `und` where it does not."""

from __future__ import annotations

import pytest

from deepseek.language import LONG, language


@pytest.mark.parametrize(("text", "code"), [
    ("What is a contract?", "en"), ("How can I get my deposit back from the landlord?", "en"),
    ("房东不退押金怎么办，我可以起诉他吗", "zh"), ("請問押金可以退嗎", "zh"), ("你好", "zh"), ("唔该晒你", "zh"),
    ("Wie geht es Ihnen?", "de"), ("Bonjour, comment ça va ?", "fr"), ("¿Cómo puedo recuperar mi depósito?", "es"),
    ("こんにちは", "ja"), ("東京へ行きます", "ja"), ("안녕하세요", "ko"),
    ("Как мне вернуть залог от хозяина квартиры?", "ru"),
])
def test_text_of_a_language(text: str, code: str) -> None:
    assert language(text) == code


@pytest.mark.parametrize("text", ["", " ", "hi", "ok", "thanks", "merci", "no", "ja", "lol", "abc", "aaaa", "Summarize",
                                  "hello world", "12345", "1 + 1 = ?", "😀😀", "print(x)", "SELECT * FROM t",
                                  "https://example.org/x", "\n\t", "?!", "int main() { return 0; }", "\ud800"])
def test_too_little_to_tell(text: str) -> None:
    assert language(text) == "und"


def test_the_beginning_of_a_long_text_speaks_for_it() -> None:
    english = "The court held that the contract was void, and the landlord had to pay. "
    assert language(english * 200 + "这座古老的城镇" * 5000) == "en" and len(english * 200) > LONG

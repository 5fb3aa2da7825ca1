"""Metrics of answers in any script and any way of writing numbers."""

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from hedgerow.evaluation.metrics.bleu import Bleu
from hedgerow.evaluation.metrics.exact_match import ExactMatch
from hedgerow.evaluation.metrics.final_answer import FinalAnswer
from hedgerow.evaluation.metrics.rouge_l import RougeL
from hedgerow.evaluation.words import words

TEXTS = {
    "Russian": "Кошка живёт в доме, а собака на улице.",
    "Greek": "Η γάτα ζει στο σπίτι.",
    "Arabic": "القطة تعيش في البيت الكبير",
    "Persian": "می‌خواهم به خانه بروم",
    "Hebrew": "החתול גר בבית הגדול",
    "Hindi": "बिल्ली घर में रहती है।",
    "Korean": "고양이는 집에 살고 있습니다.",
    "Chinese": "我们在2023年去了北京。",
    "Japanese": "猫はデータベースの中に住んでいます。",
    "Thai": "แมวอาศัยอยู่ในบ้าน",
    "Khmer": "ឆ្មារស់នៅក្នុងផ្ទះ",
    "Lao": "ແມວອາໄສຢູ່ໃນເຮືອນ",
    "Burmese": "ကြောင်သည်အိမ်၌နေသည်",
    "emoji": "👍🏽 👨‍👩‍👧 🇫🇷",
    "digits": "١٢٣ ४५",
    "symbols": "→ ± !",
    "empty": " \n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_identical_texts_are_right(text):
    assert RougeL().score(reference=text, answer=text) == pytest.approx(100)
    assert ExactMatch().score(reference=text, answer=text) == 100
    decomposed = unicodedata.normalize("NFD", text)
    assert RougeL().score(reference=text, answer=decomposed) == pytest.approx(100)
    assert ExactMatch().score(reference=text, answer=decomposed) == 100


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_other_texts_are_wrong(text):
    other = "A dog" if text.strip() else "dog"
    assert RougeL().score(reference=text, answer=other) == 0
    assert ExactMatch().score(reference=text, answer=other) == 0


def test_scripts_without_spaces_are_compared_by_characters():
    assert words("Ｗe 去了北京 2023") == ["we", "去", "了", "北", "京", "2023"]
    assert words("ดีครับ") == ["ดี", "ค", "รั", "บ"]
    assert RougeL().score(reference="北京市", answer="北京") == pytest.approx(80)
    assert Bleu().corpus(["猫住在房子里"], ["猫住在房子里"]) == pytest.approx(100)
    assert 0 < Bleu().corpus(["猫住在大房子里面"], ["猫住在大房子外面"]) < 100


ASCII = st.text(st.characters(max_codepoint=127)) | st.lists(
    st.sampled_from(["a", "b", "the", "cats", "running"])
).map(" ".join)


@given(ASCII, ASCII)
def test_ascii_scores_as_rouge_score_does(reference, answer):
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"]
    if words(reference):
        assert RougeL().score(reference, answer) == 100 * expected.fmeasure


def test_english_words_are_stemmed():
    assert RougeL().score(reference="the cats were running", answer="the cat were runs") == 100


def test_long_answers_in_characters_take_no_time():
    text = "".join(chr(0x4E00 + n * n % 5000) for n in range(3000))
    begin = time.process_time()
    assert RougeL().score(reference=text, answer=text[1000:2000]) == pytest.approx(50)
    assert time.process_time() - begin < 0.5  # rouge_score takes ten times as long


@pytest.mark.parametrize(
    ("number", "writings"),
    [
        (
            "1234",
            [
                "1,234",
                "1\u00a0234",
                "1\u202f234",
                "1'234",
                "1’234",
                "１２３４",
                "$1{,}234",
                "1,234.00",
            ],
        ),
        ("1234567", ["1,234,567", "1.234.567", "12,34,567", "1\u2009234\u2009567", "1.234.567,0"]),
        ("1234.5", ["1,234.5", "1.234,5", "1’234.5", "€1.234,50", "1234,5"]),
        ("-5", ["−5", "-$5", "$-5", "－５", "x = -5", "-10/2", r"\boxed{-5} after 3 steps"]),
        ("0.5", ["1/2", ".5", "0,5", r"\frac{1}{2}", r"\boxed{\dfrac{1}{2}}", "5e-1"]),
        (
            "42",
            ["٤٢", "४२", "42.", "(42)", "42 m²", "5, 42", "1,42,42", "#### 42 or 7", "84/2 = 42"],
        ),
    ],
)
def test_a_number_is_the_same_however_it_is_written(number, writings):
    for writing in writings:
        assert FinalAnswer().score(reference=f"#### {number}", answer=writing) == 100, writing


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("1/2", "3/2"),
        ("15", "1,5"),
        ("5", ".5"),
        ("5", "-$5"),
        ("1.234", "1,234"),
        ("7", "9" * 5000),
    ],
)
def test_numbers_that_are_not_the_same(reference, answer):
    assert FinalAnswer().score(reference=reference, answer=answer) == 0

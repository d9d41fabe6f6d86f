"""Short answers in the form in which VQAv2's official evaluator compares them, and in the form in which EvalAI's server is given them.

Both change an answer in the same two passes, whose odd ways are kept, because published numbers contain them. Gives up: the ways of Python 2, in which
VQAv2's evaluator was written; it differs from Python 3 on digits that are not ASCII, on the Turkish dotted I and on a sigma that ends a word.
"""

import re

# Known contractions. What stands for one of them is the same word with one of its apostrophes left out.
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't
it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}
COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(COUNTED)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_WITH_COMMA = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
MOST_STOPS = 32  # the original hands a flag of `re` to an argument that is a count


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(text: str) -> str:
    """A mark leaves nothing where it touches a space anywhere in the text, or where the text has a comma between digits, and a space elsewhere. Full stops
    go, the first 32 of those that no digit follows."""
    plain, glued = text, DIGITS_WITH_COMMA.search(text)
    for mark in PUNCTUATION:
        plain = plain.replace(mark, "" if glued or f"{mark} " in text or f" {mark}" in text else " ")
    return FULL_STOP.sub("", plain, count=MOST_STOPS)


def plain_words(text: str) -> str:
    """Lower case, small numbers as digits, no articles, contractions with their apostrophes, single spaces."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_answer(text: str) -> str:
    """As VQAv2's official evaluator compares a stripped answer."""
    return plain_words(without_punctuation(text))


def evalai_answer(text: str) -> str:
    """As an answer is uploaded to EvalAI's server, and as TextVQA compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_answer(one_line(text))

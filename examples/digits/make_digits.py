"""Make this folder's data: scanned digits -> pictures in one tar, LLaVA conversations about them, and a tokenizer for both.

    pip install scikit-learn && python examples/digits/make_digits.py

A second run writes the same bytes. Gives up: hold-out by writer (the scans do not say who wrote them), so the test pictures hold unseen scans by seen hands.
"""

import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image
from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
from sklearn.datasets import load_digits

HERE = Path(__file__).resolve().parent
SEED = 0
SIDE, SLOT, DIGIT = 32, 16, 14  # pixels of a picture, of one of its four slots, of a digit in the middle of its slot
GREY, WHITE = 64, 255  # paper and ink: near the middle of what CLIP's normalisation expects, so that ink is what differs
NUM_HELD_OUT = 297  # of 1,797 scans
SHARES = {1: 0.6, 2: 0.35, 3: 0.05}  # digits in a picture -> share of the pictures
NUM = {"train": {"picture": 4800, "pair": 600, "text": 300}, "test": {"picture": 300, "pair": 25, "text": 0}}
VOCAB_SIZE = 376  # enough for every word of the data to be one piece; with the special pieces 384
SPECIAL = [f"<extra_id_{i}>" for i in range(8)]

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTIONS = {
    # of any picture
    "which": ("What is written here?", "What does the picture show?", "Read the digits in order."),
    "count": ("How many digits are there?", "How many digits does the picture show?", "Count the digits."),
    # of a picture of one digit
    "parity": ("Is the digit even or odd?", "Is this digit odd or even?"),
    "above_four": ("Is the digit greater than four?", "Is this digit more than four?"),
    # of a picture of several digits
    "largest": ("Which digit is the largest?", "What is the largest digit?"),
    "smallest": ("Which digit is the smallest?", "What is the smallest digit?"),
    # of two pictures of one digit each
    "pair_first": ("Which digit is in the first picture?", "What does the first picture show?"),
    "pair_second": ("Which digit is in the second picture?", "What does the second picture show?"),
    "pair_both": ("Which digits are in the two pictures?", "What do the two pictures show?"),
    # of no picture
    "text_larger": ("Which is larger, {x} or {y}?", "What is larger, {x} or {y}?"),
    "text_smaller": ("Which is smaller, {x} or {y}?", "What is smaller, {x} or {y}?"),
    "text_parity": ("Is {x} even or odd?", "Is {x} odd or even?"),
    "text_after": ("What comes after {x}?", "Which number comes after {x}?"),
    "text_before": ("What comes before {next}?", "Which number comes before {next}?"),
}
KINDS = {  # subject: sets of questions that one conversation asks; no answer of a set about several digits can be read off another
    "one": [("which", "count", "parity", "above_four")],
    "several": [("which", "count"), ("largest", "smallest", "count")],
    "pair": [("pair_both",), ("pair_first", "pair_second"), ("pair_first", "pair_second")],
    "text": [("text_larger", "text_smaller", "text_parity", "text_after", "text_before")],
}
CAPTION_QUESTIONS = ("Describe the picture.", "Describe the picture briefly.", "Write a caption for the picture.", "What can be seen in the picture?")


# ---- Pictures

def split_scans(labels: np.ndarray, rng: Generator) -> dict[str, np.ndarray]:
    """About a sixth of the scans of each digit is held out. -> {"train", "test"}: numbers of scans."""
    train, test = [], []
    for digit in range(10):
        scans = rng.permutation(np.flatnonzero(labels == digit))
        num_test = round(len(scans) * NUM_HELD_OUT / len(labels))
        test.append(scans[:num_test])
        train.append(scans[num_test:])
    return {"train": np.concatenate(train), "test": np.concatenate(test)}


def deal(scans: np.ndarray, num_pictures: int, rng: Generator) -> list[list[int]]:
    """The scans that each picture shows. The scans are dealt like cards, in fresh shuffles of the whole deck, so all are used about equally often."""
    deck = itertools.chain.from_iterable(rng.permutation(scans).tolist() for _ in itertools.count())
    sizes = rng.permutation(np.repeat(list(SHARES), [round(share * num_pictures) for share in SHARES.values()]))
    return [list(itertools.islice(deck, size)) for size in sizes.tolist()]


def draw(scans: np.ndarray, rng: Generator) -> bytes:
    """scans: float[n, 8, 8] of 0..16, in reading order -> a PNG of 32 x 32 grey pixels."""
    picture = np.full((SIDE, SIDE), GREY, np.uint8)
    for scan, slot in zip(scans, sorted(rng.choice(4, len(scans), replace=False)), strict=True):
        digit = Image.fromarray(np.round(GREY + scan * (WHITE - GREY) / 16).astype(np.uint8)).resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)
        top, left = np.array(divmod(slot, 2)) * SLOT + (SLOT - DIGIT) // 2
        picture[top : top + DIGIT, left : left + DIGIT] = digit
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def write_tar(path: Path, pictures: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in sorted(pictures.items()):
            member = tarfile.TarInfo(name)  # no time, no owner
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


# ---- Conversations

def pick(options, rng: Generator):
    return options[rng.integers(len(options))]


def listed(digits: list[int]) -> str:
    """[3, 9, 1] -> "three, nine and one"."""
    words = [WORDS[digit] for digit in digits]
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def ask(kind: str, digits: list[int], rng: Generator) -> tuple[str, str]:
    """-> question, answer. digits: those in the picture or pictures, or the two that a text-only question is about."""
    x, y = digits[0], digits[-1]
    answer = {
        "which": listed(digits),
        "count": WORDS[len(digits)],
        "parity": "odd" if x % 2 else "even",
        "above_four": "yes" if x > 4 else "no",
        "largest": WORDS[max(digits)],
        "smallest": WORDS[min(digits)],
        "pair_first": WORDS[x],
        "pair_second": WORDS[y],
        "pair_both": listed(digits),
        "text_larger": WORDS[max(x, y)],
        "text_smaller": WORDS[min(x, y)],
        "text_parity": "odd" if x % 2 else "even",
        "text_after": WORDS[x + 1],
        "text_before": WORDS[x],
    }[kind]
    question = pick(QUESTIONS[kind], rng).format(x=WORDS[x], y=WORDS[y], next=WORDS[x + 1])
    return question, answer


def tagged(question: str, num_images: int, rng: Generator) -> str:
    """Most often the pictures stand before the question, one time in five behind it."""
    tags = ["<image>"] * num_images
    return "\n".join([*tags, question] if rng.random() < 0.8 else [question, *tags])


def turns(*rounds: tuple[str, str]) -> list[dict]:
    return [{"from": role, "value": value} for pair in rounds for role, value in zip(("human", "gpt"), pair, strict=True)]


def conversation(subject: str, digits: list[int] | None, num_images: int, rng: Generator) -> dict:
    """Up to five questions of different kinds about a subject (a key of KINDS); digits None: each question is about two digits of its own."""
    kinds = rng.permutation(pick(KINDS[subject], rng)).tolist()
    rounds = [ask(kind, digits or rng.choice(10, 2, replace=False).tolist(), rng) for kind in kinds]
    if num_images:
        rounds[0] = tagged(rounds[0][0], num_images, rng), rounds[0][1]
    return {"conversations": turns(*rounds), "kinds": kinds}


def make_records(split: str, shown: list[list[int]], labels: np.ndarray, rng: Generator) -> Iterator[dict]:
    """shown: for each picture its scans. Each record keeps the scans and digits that its pictures show, and the kind of each question."""
    image = f"{split}/{{:05d}}.png".format
    for i, scans in enumerate(shown):
        digits = labels[scans].tolist()
        talk = conversation("several" if digits[1:] else "one", digits, 1, rng)
        yield {"id": f"{split}-{i:05d}", "image": image(i), **talk, "digits": digits, "scans": scans}
    singles = [i for i, scans in enumerate(shown) if len(scans) == 1]
    for i in range(NUM[split]["pair"]):
        pictures = rng.choice(singles, 2, replace=False).tolist()
        scans = [shown[picture][0] for picture in pictures]
        digits = labels[scans].tolist()
        yield {"id": f"{split}-pair-{i:05d}", "image": [*map(image, pictures)], **conversation("pair", digits, 2, rng), "digits": digits, "scans": scans}
    for i in range(NUM[split]["text"]):
        yield {"id": f"{split}-text-{i:05d}", **conversation("text", None, 0, rng)}


def make_captions(split: str, shown: list[list[int]], labels: np.ndarray, rng: Generator) -> Iterator[dict]:
    for i, scans in enumerate(shown):
        digits = labels[scans].tolist()
        question = tagged(pick(CAPTION_QUESTIONS, rng), 1, rng)
        caption = f"the {'digits' if digits[1:] else 'digit'} {listed(digits)}"
        yield {"id": f"{split}-{i:05d}", "image": f"{split}/{i:05d}.png", "conversations": turns((question, caption)), "digits": digits, "scans": scans}


def write_json(path: Path, records: list[dict]) -> None:
    path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")


# ---- Tokenizer

def rendered(record: dict) -> str:
    """A record under NeVA's v1 template, without its pictures and control tokens."""
    values = [turn["value"].replace("<image>", "") for turn in record["conversations"]]
    return " ".join([SYSTEM, *(f"{role} {value}" for role, value in zip(itertools.cycle(["USER:", "ASSISTANT:"]), values, strict=False))])


def train_tokenizer(records: list[dict]) -> bytes:
    """A small BPE model laid out as Llama's, with NeVA's special pieces behind it as NeMo's add_special_tokens_to_sentencepiece puts them."""
    file = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=map(rendered, records), model_writer=file, model_type="bpe", vocab_size=VOCAB_SIZE, hard_vocab_limit=False, num_threads=1,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        required_chars="\n" + "".join(map(chr, range(33, 127))), minloglevel=1,
    )  # fmt: skip
    model = sentencepiece_model_pb2.ModelProto.FromString(file.getvalue())
    for token in SPECIAL:
        model.pieces.add(piece=token, score=0.0, type=model.SentencePiece.USER_DEFINED)
    return model.SerializeToString(deterministic=True)


# ---- All of it

def main() -> None:
    rng = np.random.default_rng(SEED)
    digits = load_digits()
    images, labels = digits.images, digits.target
    pictures = {}
    for split, scans in split_scans(labels, rng).items():
        shown = deal(scans, NUM[split]["picture"], rng)
        pictures |= {f"{split}/{i:05d}.png": draw(images[scans], rng) for i, scans in enumerate(shown)}
        records = list(make_records(split, shown, labels, rng))
        rng.shuffle(records)
        write_json(HERE / f"{split}.json", records)
        write_json(HERE / ("pretrain.json" if split == "train" else "pretrain_test.json"), list(make_captions(split, shown, labels, rng)))
        if split == "train":
            (HERE / "tokenizer.model").write_bytes(train_tokenizer(records))
    write_tar(HERE / "images.tar", pictures)


if __name__ == "__main__":
    main()

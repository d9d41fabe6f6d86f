"""A chat with a model: turns of questions, pictures and answers -> the conversation that the model reads and the messages that a page shows.

One answer is made at a time, in one thread. Gives up: batches of questions of several people, though the model could read them together.
"""

import asyncio
import contextlib
import dataclasses
import html
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from neva_jax.data.conversation import PLACEHOLDER
from neva_jax.data.media import MAX_BYTES
from neva_jax.errors import UserError

MAX_PICTURES = 8  # of a conversation
REFUSED = "Not answered"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question and what became of it. pictures: paths; answer: None before its first word; refused: why there is none."""

    text: str
    pictures: tuple[str, ...] = ()
    answer: str | None = None
    refused: str | None = None


def conversation(turns: list[Turn]) -> tuple[list[dict], list[str]]:
    """Turns, the last one unanswered -> the messages that vlm.stream takes, and the paths of their pictures in order. Other turns without an answer are
    left out, pictures and all."""
    *past, last = turns
    told, messages = [turn for turn in past if turn.answer] + [last], []
    for turn in told:
        messages.append({"from": "human", "value": f"{PLACEHOLDER}\n" * len(turn.pictures) + turn.text})
        if turn is not last:
            messages.append({"from": "gpt", "value": turn.answer.replace(PLACEHOLDER, "")})  # a tag that the model wrote stands for no picture
    return messages, [path for turn in told for path in turn.pictures]


def check(vlm, turns: list[Turn]) -> None:
    """Raises UserError about the last turn, in words for who asked it. vlm.stream checks the rest, such as the length."""
    last, count = turns[-1], len(conversation(turns)[1])
    if not last.text and not last.pictures:
        raise UserError("The question is empty; type one, or add a picture.")
    if PLACEHOLDER in last.text:
        raise UserError(f"The text contains {PLACEHOLDER}, which stands for a picture; leave it out. Pictures that are added come before the text.")
    if count > MAX_PICTURES:
        raise UserError(f"The conversation has {count} pictures, expected at most {MAX_PICTURES}; clear the chat, or add fewer.")
    for path in last.pictures:
        vlm.processor.image_processor(read(path), Path(path).name)


def read(path: str) -> bytes:
    name = Path(path).name
    try:
        if (size := os.path.getsize(path)) > MAX_BYTES:
            raise UserError(f"{name}: {size} bytes, expected at most {MAX_BYTES}; shrink the picture.")
        return Path(path).read_bytes()
    except OSError:
        raise UserError(f"{name} is no longer stored, likely because the chat is old; clear it and add the picture again.") from None


def show(turns: list[Turn]) -> list[dict]:
    """Turns -> the messages of a gr.Chatbot, which takes text for HTML. Pictures of a refused turn are named, not shown: they may be no pictures, or huge."""
    messages = []
    for turn in turns:
        pictures = [html.escape(f"[{Path(path).name}]") if turn.refused else {"path": path} for path in turn.pictures]
        messages.append({"role": "user", "content": [*pictures, *([html.escape(turn.text)] if turn.text else [])] or ["(nothing)"]})
        if turn.refused:
            messages.append({"role": "assistant", "content": html.escape(turn.refused), "metadata": {"title": REFUSED}})
        elif turn.answer is not None:
            messages.append({"role": "assistant", "content": html.escape(turn.answer)})
    return messages


async def pieces(worker: ThreadPoolExecutor, start: Callable[[], Iterator[str]]) -> AsyncIterator[str]:
    """What start() yields, made in the worker's thread; pieces that wait are joined. Closed or cancelled, it makes the thread stop at the next piece."""
    loop, made, stop = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

    def work():
        end = None
        try:
            for piece in start():
                if stop.is_set():
                    return
                loop.call_soon_threadsafe(made.put_nowait, piece)
        except Exception as error:
            end = error
        loop.call_soon_threadsafe(made.put_nowait, end)

    future = worker.submit(work)
    try:
        last = ""
        while isinstance(last, str):
            batch = [await made.get()]
            while not made.empty():
                batch.append(made.get_nowait())
            last = batch[-1]
            if text := "".join(piece for piece in batch if isinstance(piece, str)):
                yield text
        if last is not None:
            raise last
    finally:
        stop.set()
        future.cancel()


def answerer(vlm) -> Callable:
    """-> the handler of a question, an async generator of the chat's turns as the answer grows. Whatever goes wrong becomes the last turn's `refused`."""
    worker = ThreadPoolExecutor(1, "answers")  # the one thread that touches the model

    async def answer(text: str, pictures: list[str], past: list[Turn], options: dict):
        asked = turn = Turn(text.strip(), tuple(pictures))

        def start():
            check(vlm, [*past, asked])
            messages, paths = conversation([*past, asked])
            return vlm.stream(messages, [read(path) for path in paths], **options)

        yield [*past, turn]
        try:
            async with contextlib.aclosing(pieces(worker, start)) as stream:
                async for piece in stream:
                    turn = dataclasses.replace(turn, answer=(turn.answer or "") + piece)
                    yield [*past, turn]
            turn = dataclasses.replace(turn, answer=turn.answer or "(the model answered nothing)")
        except UserError as error:
            turn = dataclasses.replace(asked, refused=str(error))
        except Exception:  # a defect met by one must not end the page for all
            logger.exception("a question could not be answered")
            turn = dataclasses.replace(asked, refused="The program failed, through no fault of the question; its log says more.")
        yield [*past, turn]

    return answer

"""The page to try a model, without a browser: its conversations, what it refuses, and the server under 32 questions at once, on a stand-in for the model.

tests/browser/test_demo_page.py has the same page in a browser, on a model.
"""

import asyncio
import base64
import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from neva_jax import cli
from neva_jax.data.image import ImageProcessor
from neva_jax.demo import __main__ as command
from neva_jax.demo import chat, page, server
from neva_jax.demo.chat import Turn
from neva_jax.errors import UserError

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason='the page needs gradio: pip install -e ".[demo]"')
TOKEN = "0123456789abcdef"
OPTIONS = {"temperature": 0, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "max_new_tokens": 8, "seed": 0}


class StandIn:
    """Answers with the sizes of the pictures and the last question's words, one piece every `pause` seconds, `max_new_tokens` of them."""

    max_length = 64

    def __init__(self, pause: float = 0.0):
        encoder = types.SimpleNamespace(template="v1")
        self.processor = types.SimpleNamespace(encoder=encoder, image_processor=ImageProcessor(crop_size=(32, 32), shortest_edge=32))
        self.pause, self.made, self.alone, self.seen = pause, 0, threading.Lock(), []

    def stream(self, prompt, images=(), *, max_new_tokens=64, **options):
        words = prompt[-1]["value"].replace("<image>", "").split()
        self.seen.append((prompt, [len(data) for data in images], options))
        if len(words) > self.max_length:
            raise UserError(f"prompt 0: {len(words)} tokens, expected at most {self.max_length}")
        if words == ["fail"]:
            raise ZeroDivisionError("a defect")
        assert self.alone.acquire(blocking=False), "two answers at once"
        try:
            for i in range(max_new_tokens):
                time.sleep(self.pause)
                self.made += 1
                yield f"{words[i % len(words)] if words else len(images)} "
        finally:
            self.alone.release()


def picture(path: Path, side: int = 32, seed: int = 0) -> str:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(path)
    return str(path)


def huge() -> bytes:
    """A small file of 36 million pixels."""
    file = io.BytesIO()
    Image.new("1", (6000, 6000)).save(file, "PNG")
    return file.getvalue()


def ask(vlm, text, pictures=(), past=(), **options):
    """-> every state of the chat, as its turns."""

    async def run():
        return [turns async for turns in chat.answerer(vlm)(text, list(pictures), list(past), OPTIONS | options)]

    return asyncio.run(run())


def test_the_conversation_is_what_was_answered(tmp_path):
    a, b, c = (picture(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("abc"))
    past = [Turn("first", (a,), "one <image> two"), Turn("broken", (b,), refused="no"), Turn("stopped at once", (b,)), Turn("second", (), "three")]
    vlm = StandIn()
    states = ask(vlm, " third\n", [b, c], past, temperature=0.5, seed=7)
    messages, sizes, options = vlm.seen[0]
    assert [tuple(message.values()) for message in messages] == [
        ("human", "<image>\nfirst"), ("gpt", "one  two"), ("human", "second"), ("gpt", "three"), ("human", "<image>\n<image>\nthird"),
    ]  # fmt: skip
    assert sizes == [os.path.getsize(path) for path in (a, b, c)]
    assert options == {"temperature": 0.5, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "seed": 7}
    assert all(turns[:-1] == past for turns in states) and states[0][-1] == Turn("third", (b, c)) and states[-1][-1].answer == "third " * 8


def test_an_answer_grows():
    answers = [turns[-1].answer for turns in ask(StandIn(pause=0.01), "a b")]
    assert answers[0] is None and answers[-1] == "a b " * 4 and len(answers) >= 6
    assert all(later.startswith(earlier) for earlier, later in zip(answers[1:], answers[2:], strict=False))


@pytest.mark.parametrize(("text", "data", "reason"), [
    (" \n", [], "is empty"), ("what is <image> here?", [], "contains <image>"), ("?", [b"\x89PNG" * 9], "0.png: no picture"), ("?", [b""], "0.png: no picture"),
    ("?", [huge()], "6000 x 6000 pixels"), ("?", [bytes(20 * 2**20 + 1)], "20971521 bytes, expected at most 20971520"),
    ("?", [None], "0.png is no longer stored"), ("word " * 65, [], "65 tokens, expected at most 64"), ("?", [b""] * 9, "9 pictures, expected at most 8"),
    ("fail", [], "The program failed"),
])  # fmt: skip
def test_a_refusal_is_a_message_and_no_more(tmp_path, text, data, reason):
    for i, content in enumerate(data):
        if content is not None:
            (tmp_path / f"{i}.png").write_bytes(content)
    vlm, paths = StandIn(), [str(tmp_path / f"{i}.png") for i in range(len(data))]
    refused = ask(vlm, text, paths)[-1]
    assert reason in refused[-1].refused and refused[-1].answer is None
    assert not any("path" in part for message in chat.show(refused) for part in message["content"] if isinstance(part, dict))
    again = ask(vlm, "and now", past=refused)[-1]
    assert again[0] == refused[0] and again[1].answer == "and now " * 4 and len(vlm.seen[-1][0]) == 1


def test_text_is_never_markup():
    user, model, asked, why = chat.show([Turn("<b>&amp;", (), "![x](http://elsewhere) <img src=x>"), Turn("?", ("/t/<i>.png",), refused="<u>")])
    assert user["content"] == ["&lt;b&gt;&amp;amp;"] and model["content"] == "![x](http://elsewhere) &lt;img src=x&gt;"
    assert asked["content"] == ["[&lt;i&gt;.png]", "?"] and why["content"] == "&lt;u&gt;"


def test_who_stops_frees_the_model():
    """Stopped in the middle, while waiting, and before the first piece; the next question has the model to itself."""
    vlm = StandIn(pause=0.02)
    answer = chat.answerer(vlm)

    async def run():
        async def asking(text):
            return [turns async for turns in answer(text, [], [], OPTIONS | {"max_new_tokens": 10_000 if text == "long" else 2})][-1][-1].answer

        first, second, third = (asyncio.create_task(asking(text)) for text in ("long", "long", "short"))
        await asyncio.sleep(0.2)
        first.cancel()
        second.cancel()
        assert await asyncio.wait_for(third, 5) == "short short "
        states = answer("long", [], [], OPTIONS | {"max_new_tokens": 10_000})
        async for turns in states:
            if turns[-1].answer:
                break
        await states.aclose()
        return await asyncio.wait_for(asking("last"), 5)

    assert asyncio.run(run()) == "last last " and vlm.made < 100


def request(path="/", method="GET", token=None, **headers):
    headers = {"host": "127.0.0.1:7860"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {"type": "http", "path": path, "method": method, "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]}
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    asyncio.run(server.Guard(app, "/nowhere", token)(scope, None, send))
    return sent[0]["status"]


def basic(word):
    return "Basic " + base64.b64encode(word.encode()).decode()


@pytest.mark.parametrize(("status", "what"), [
    (200, {}), (200, {"host": "localhost:1"}), (200, {"host": "[::1]:7860"}), (403, {"host": "rebound.example:7860"}), (403, {"host": ""}),
    (403, {"host": "[::1"}), (200, {"origin": "http://127.0.0.1:7860"}), (403, {"origin": "http://elsewhere.example"}), (403, {"origin": "null"}),
    (403, {"path": "/gradio_api/file=https://elsewhere.example/x"}), (403, {"path": "/gradio_api/proxy=https:/x"}),
    (411, {"method": "POST"}), (411, {"method": "POST", "content_length": "-1"}), (200, {"method": "POST", "content_length": "100"}),
    (413, {"method": "POST", "content_length": str(2**20 + 1)}), (413, {"method": "POST", "path": "/gradio_api/upload", "content_length": str(2**28)}),
    (401, {"token": TOKEN}), (401, {"token": TOKEN, "path": "/assets/index.js"}), (200, {"token": TOKEN, "authorization": f"Bearer {TOKEN}", "host": "box"}),
    (200, {"token": TOKEN, "authorization": basic(f"me:{TOKEN}")}), (401, {"token": TOKEN, "authorization": f"Bearer {TOKEN}x"}),
    (401, {"token": TOKEN, "authorization": basic(TOKEN)}), (401, {"token": TOKEN, "authorization": "Basic \xe9!"}),
    (401, {"token": TOKEN, "authorization": "Bearer"}), (401, {"token": TOKEN, "authorization": "Bearer \xe9"}),
])  # fmt: skip
def test_guard(status, what):
    assert request(**what) == status


def test_stored_pictures_are_bounded(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(bytes(100))
    monkeypatch.setattr(server, "MAX_STORED", 150)
    guard = server.Guard(None, str(tmp_path))
    scope = {"method": "POST", "path": "/gradio_api/upload", "headers": [(b"host", b"localhost"), (b"content-length", b"50")]}
    assert guard.refusal(scope) is None and guard.refusal(scope | {"headers": [(b"host", b"localhost"), (b"content-length", b"51")]}) == 507


@pytest.mark.parametrize(("arguments", "environment", "reason"), [
    (["--host=0.0.0.0"], {}, "needs --token"), (["--host=::"], {}, "needs --token"), (["--host="], {}, "no address"),
    (["--host=no.such.host.invalid"], {}, "no address"),
    (["--token=short"], {}, "found 5 characters, expected 16"), (["--token=with a space in the token"], {}, "without spaces"), (["--token="], {}, "found 0"),
    (["--host=0.0.0.0"], {"NEVA_DEMO_TOKEN": "short"}, "found 5 characters"), (["--host=192.0.2.1", f"--token={TOKEN}"], {}, "cannot listen"),
    (["--port=65536"], {}, "port"), ([], {}, "no gradio here"), (["--model=/nowhere", "--port=0"], {"gradio": "there"}, "/nowhere"),
])  # fmt: skip
def test_what_cannot_be_served_is_one_line(capsys, monkeypatch, arguments, environment, reason):
    missing = reason == "no gradio here"
    monkeypatch.delenv("NEVA_DEMO_TOKEN", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if missing:
        monkeypatch.setitem(sys.modules, "gradio", None)
    else:
        monkeypatch.setattr(command, "load_gradio", lambda: None)
    with pytest.raises(SystemExit) as exit:
        cli.run(command.main, command.define_flags, ["demo", "--model=/nowhere", *arguments], with_config=False)
    *_, line = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and line.startswith("error: ") and ('pip install -e ".[demo]"' if missing else reason) in line


def test_a_taken_port_is_said():
    with server.listen("127.0.0.1", 0, None) as taken, pytest.raises(UserError, match="choose another --port"):
        server.listen("127.0.0.1", taken.getsockname()[1], None)
    with server.listen("0.0.0.0", 0, TOKEN) as sock:
        assert sock.getsockname()[0] == "0.0.0.0"


def serve_stand_in(token: str, pause: str) -> None:
    """What a process of the tests runs."""
    with server.listen("127.0.0.1", 0, token) as sock:
        server.serve(StandIn(float(pause)), "a <b>stand-in</b>", sock, token)


STAND_IN = "import sys, test_demo; from neva_jax import cli; cli.run(lambda: test_demo.serve_stand_in(*sys.argv[1:]), argv=['demo'], with_config=False)"


@contextlib.contextmanager
def served(folder: Path, *arguments):
    """A page of its own process, which is `python *arguments` -> the process, its address."""
    log = folder / "log"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "TMPDIR": str(folder)}
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, stderr=file, stdout=file, cwd=ROOT)
    try:
        while not (found := re.search(r"the page is at (\S+);", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    import httpx

    folder = tmp_path_factory.mktemp("demo")
    headers = {"authorization": f"Bearer {TOKEN}"}
    with served(folder, "-c", STAND_IN, TOKEN, 0.01) as (process, url), httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        yield process, client, folder


def question(client, text, files=(), most=4):
    """-> (the answer's last message, None) or (None, why it was refused)."""
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in files]
    begun = client.post("/gradio_api/call/ask", json={"data": [{"text": text, "files": files}, 0, 1, 0, 1, most, 0]})
    if begun.status_code != 200:
        return None, begun.json()["detail"]
    lines = client.get(f"/gradio_api/call/ask/{begun.json()['event_id']}").text.strip().splitlines()
    event, data = lines[-2].removeprefix("event: "), json.loads(lines[-1].removeprefix("data: "))
    return (data[1][-1], None) if event == "complete" else (None, str(data))


def upload(client, data: bytes, name="a.png"):
    return client.post("/gradio_api/upload", files={"files": (name, io.BytesIO(data))})


def resident(process) -> int:
    """MiB of memory that a process has, at most so far."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1]) // 1024


@needs_gradio
def test_page(running, tmp_path):
    """Of this server alone, with its facts; nothing on the disk is shown but uploads, nothing is fetched, what is too large is refused."""
    _, client, folder = running
    answer = client.get("/")
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"] and "64 tokens" in answer.text
    assert "<b>stand-in" not in answer.text and "&amp;lt;b&amp;gt;" not in answer.text
    assert '"analytics_enabled":false' in answer.text.replace(" ", "")
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']?(https?:)?//", answer.text)
    assert not re.search(r"@import|url\([\"']?(https?:)?//", client.get("/theme.css").text)
    for name in ("etc/passwd", ROOT / "pyproject.toml"):
        assert client.get(f"/gradio_api/file=/{str(name).lstrip('/')}").status_code in (403, 404)
    assert upload(client, bytes(20 * 2**20 + 1)).status_code == 413
    on_the_disk = picture(tmp_path / "private.png")
    for path in ("https://huggingface.co/x.png", on_the_disk, f"{folder}/../{Path(on_the_disk).parent.name}/private.png", "/gradio_api/file=" + on_the_disk):
        assert question(client, "?", [path])[0] is None
    assert client.post("/gradio_api/run/ask", json={"data": []}).status_code in (403, 404, 405, 422)


@needs_gradio
def test_one_question(running, tmp_path):
    _, client, _ = running
    path = upload(client, Path(picture(tmp_path / "a.png")).read_bytes()).json()[0]
    assert question(client, "", [path])[0]["content"][0]["text"] == "1 1 1 1 "
    broken = question(client, "?", [upload(client, b"no picture").json()[0]])[0]
    assert "no picture" in broken["content"][0]["text"] and broken["metadata"]["title"] == chat.REFUSED
    assert question(client, "?", most=10**9)[0] is None  # beyond the slider


@needs_gradio
def test_32_at_once(running, tmp_path):
    """Each is answered, or told that the queue is full; afterwards the page is as before, and no bigger by more than 32 pictures' bytes and a bit."""
    import httpx

    process, client, _ = running
    question(client, "warm")
    before, data = resident(process), Path(picture(tmp_path / "large.png", side=1024)).read_bytes()
    everyone = threading.Barrier(32)

    def one(i):
        with httpx.Client(base_url=client.base_url, headers=client.headers, timeout=60) as mine:
            path = upload(mine, data, f"{i}.png").json()[0]
            everyone.wait()
            return question(mine, f"q{i}", [path], most=24)

    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(one, range(32)))
    for i, (message, refused) in enumerate(results):
        assert ("Queue is full" in refused) if message is None else (message["content"][0]["text"] == f"q{i} " * 24)
    answered = sum(message is not None for message, _ in results)
    assert page.MAX_WAITING <= answered < 32
    assert question(client, "after")[0]["content"][0]["text"] == "after " * 4
    print(f"memory {before} -> {resident(process)} MiB, {answered} of 32 answered")
    assert resident(process) - before < 200


@needs_gradio
def test_it_ends_when_told(running):
    """The last test of this file: SIGTERM in the middle of an answer. The folder of uploads goes."""
    process, client, folder = running
    assert client.get("/", headers={"authorization": ""}).status_code == 401 and client.get("/").status_code == 200
    upload(client, b"anything")
    assert list(folder.glob("neva_jax_demo_*/*"))
    begun = client.post("/gradio_api/call/ask", json={"data": [{"text": "long", "files": []}, 0, 1, 0, 1, 64, 0]})
    with client.stream("GET", f"/gradio_api/call/ask/{begun.json()['event_id']}") as stream:
        next(stream.iter_lines())
        log = (folder / "log").read_text()
        process.terminate()
        assert process.wait(20) == 143
    assert not list(folder.glob("neva_jax_demo_*")) and "Traceback" not in (folder / "log").read_text()[len(log) :]
